"""GPU memory and disk that a model's engines need, before the first hour of building is paid for.

Computed from the ONNX graphs, not measured:

- An engine holds its weights once, in the precision of its file.
- Each optimization profile has an execution context with the activation memory of its largest shape: the
  graph's largest live set there (`liveness.py`). The packaged repository asks Triton for contexts
  of their own size; its default gives each profile the memory of the largest.
- Building takes about twice the memory of running (an L40S built FLUX with 49.9 GB that ran in 23.6 GB:
  2.1 times), one component at a time.
- A process that uses CUDA takes up to 1 GB by itself; Triton's CUDA memory pool 64 MB unless told otherwise.
- On disk a plan is about as large as its weights. It replaces an earlier one when it is whole; the packaged
  repository links to it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from engines.forecast.model_costs import ModelCosts
from engines.table import table
from engines.tensorrt.options import Options
from mmdit.contract import COMPONENTS, Precision, bounds, components
from mmdit.errors import EngineError
from mmdit.gpus import CARDS, GB
from mmdit.shapes import ShapeSet, shape_set

BUILDING = 2.1  # times the memory of running
PROCESS = 1 * GB
POOL = 64 << 20
_CLOSE = 0.85  # of the memory; an estimate beyond it may not hold
SHAPE_SETS = ("square-1024", "buckets-1mp", "any-256-1536")  # of the published models


@dataclass(frozen=True)
class ComponentPlan:
    """One engine, in bytes: `activations` of each profile; `scores` more at its largest if attention does
    not fuse."""

    component: str
    weights: int
    activations: tuple[int, ...]
    scores: int

    @property
    def serving(self) -> int:
        """With a context for each profile."""
        return self.weights + sum(self.activations)

    @property
    def building(self) -> int:
        """While TensorRT times its kernels, for one profile after the other."""
        return round(BUILDING * (self.weights + max(self.activations)))


@dataclass(frozen=True)
class MemoryPlan:
    """All engines of a model, in bytes."""

    model: str
    shapes: str
    components: tuple[ComponentPlan, ...]

    @property
    def serving(self) -> int:
        """Of GPU memory in one server."""
        return PROCESS + POOL + sum(each.serving for each in self.components)

    @property
    def largest(self) -> ComponentPlan:
        """The component that needs the most memory to build."""
        return max(self.components, key=lambda each: each.building)

    @property
    def building(self) -> int:
        """Of GPU memory, for the largest component."""
        return PROCESS + self.largest.building

    @property
    def disk(self) -> int:
        """Of disk for all plans."""
        return sum(each.weights for each in self.components)


def plan_build(model: ModelCosts, shapes: ShapeSet, precision: Precision) -> MemoryPlan:
    """What a model's engines need; `model` holds the costs at `sizes_planned(shapes)`."""
    signatures = components(model.family, shapes)
    planned = []
    for component in COMPONENTS:
        own = precision if component == "mmdit" else Precision.FP16
        largest = [
            (rows, model.at(component, size, own))
            for _, _, (rows, size) in bounds(signatures[component], shapes)
        ]
        planned.append(
            ComponentPlan(
                component=component,
                weights=largest[0][1].weights,
                activations=tuple(rows * row.live for rows, row in largest),
                scores=max(rows * row.scores for rows, row in largest),
            )
        )
    return MemoryPlan(model.family.name, shapes.name, tuple(planned))


def check_fits(
    plan: MemoryPlan,
    *,
    memory: int,
    free_memory: int,
    free_disk: int,
    options: Options,
    stale: Collection[str] = COMPONENTS,
) -> list[str]:
    """Warnings where the estimates come close to what there is, or pass it; bytes.

    `stale`: the components that will be built. Raises EngineError where the weights alone are too large for
    the GPU, unless they are streamed, or their plans for the disk, unless they are stripped.
    """
    built = [each for each in plan.components if each.component in stale]
    disk = sum(each.weights for each in built)
    if disk > free_disk and not options.strip:
        raise EngineError(
            f"{plan.model}: its plans take about {_gb(disk)} on disk, and {_gb(free_disk)} are free: "
            "make room, or build elsewhere with --build"
        )
    least = PROCESS + max(each.weights for each in plan.components)
    if least > memory and not options.weight_streaming:
        heavy = max(plan.components, key=lambda each: each.weights)
        raise EngineError(
            f"{heavy.component}: its weights take {_gb(heavy.weights)} and CUDA about {_gb(PROCESS)} of the "
            f"GPU's {_gb(memory)}: take a GPU with more memory, or build with --weight-streaming, "
            "which Triton does not serve"
        )
    warnings = []
    largest = max(built, key=lambda each: each.building)
    building = PROCESS + largest.building
    if building > _CLOSE * free_memory and options.workspace_gib is None:
        warnings.append(
            f"building {largest.component} takes about {_gb(building)} of GPU memory, "
            f"{BUILDING:g} times what it runs in; {_gb(free_memory)} are free: free the GPU, bound the build "
            "with --workspace-gib, or choose a smaller shape set with --shapes"
        )
    if plan.serving > _CLOSE * memory and not options.weight_streaming:
        contexts = sum(sum(each.activations) for each in plan.components)
        warnings.append(
            f"serving takes about {_gb(plan.serving)} of the GPU's {_gb(memory)}, {_gb(contexts)} of it for "
            f"the profiles' contexts: choose a smaller shape set with --shapes, or another GPU"
        )
    return warnings


def plan_table(plan: MemoryPlan) -> str:
    """A plan as text, one component a line."""
    rows = [
        (
            each.component,
            _gb(each.weights),
            " + ".join(map(_gb, each.activations)),
            _gb(each.scores),
            _gb(each.serving),
            _gb(PROCESS + each.building),
        )
        for each in plan.components
    ]
    header = ("component", "weights", "contexts", "attention scores, if not fused", "serving", "building")
    rows.append(("all", _gb(plan.disk), "", "", _gb(plan.serving), _gb(plan.building)))
    return table(header, rows)


def fits_table(models: Iterable[ModelCosts]) -> str:
    """Which known GPU builds and serves which model, with the MMDiT in FP8, by shape set and T5.

    "close" is above 85 % of the memory, "no build" a GPU that would serve what it cannot build. Of the three
    ways of T5 the FP16 one is served; the others show what they would change.
    """
    rows = []
    for model in models:
        for name in SHAPE_SETS:
            plan = plan_build(model, shape_set(model.family, name), Precision.FP8)
            t5 = model.at("t5", (0, 0))
            for words, changed in {
                "FP16": plan.components,
                "FP8 weights*": [
                    replace(each, weights=t5.weights - t5.weights_read // 2)
                    if each.component == "t5"
                    else each
                    for each in plan.components
                ],
                "none*": [each for each in plan.components if each.component != "t5"],
            }.items():
                variant = replace(plan, components=tuple(changed))
                rows.append(
                    (
                        model.family.name,
                        name,
                        words,
                        f"{variant.building / GB:.1f}",
                        f"{variant.serving / GB:.1f}",
                        *(verdict(variant, card.memory) for card in CARDS),
                    )
                )
    cards = (f"{card.name}: {card.memory / GB:.1f}" for card in CARDS)
    return table(("model", "shape set", "T5", "build, GB", "serve, GB", *cards), rows)


def verdict(plan: MemoryPlan, memory: int) -> str:
    """Whether a GPU of `memory` bytes builds and serves it: yes, close (above 85 %), no build, no."""
    if plan.serving > memory:
        return "no"
    if plan.building > memory:
        return "no build"
    return "close" if max(plan.serving, plan.building) > _CLOSE * memory else "yes"


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 or not size else f"{size / 1e6:.0f} MB"
