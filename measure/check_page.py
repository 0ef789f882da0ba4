"""What gpu-check will do, and what it found: the record, and the page made from it, its main table first."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from mmdit.family import VAE_SCALE
from mmdit.step_times import StepTimes
from pages import render

BEFOREHAND = """\
It exports the model, builds every component in FP16 and the MMDiT twice in FP8 (attention's products in FP16,
and in FP8), compares each with ONNX Runtime on the CPU, runs the quality gate on both, times all of it beside
torch, and leaves the faster FP8 engine that passes in place. It takes hours: two calibrations, the builds,
two gates. Both FP8 variants are kept on disk: by the weights about 40 GB for SD3.5 Medium and 90 GB for
Large, with the ONNX files and without the checkpoint. What is up to date is not made again."""


class Plan(BaseModel):
    """One plan's measurements: `points` as measure/plan.py says them, and `facts`: memory and layers."""

    points: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    error: str | None = None

    def take(self, line: dict[str, Any]) -> None:
        """Add a line that measure/plan.py said."""
        if "shapes" in line:
            self.points.append(line)
        else:
            self.facts = line

    @property
    def size(self) -> tuple[int, int] | None:
        """The first profile's usual size in pixels; None without latents or points."""
        shape = self.points[0]["shapes"].get("latent") if self.points else None
        return (shape[2] * VAE_SCALE, shape[3] * VAE_SCALE) if shape else None

    @property
    def step(self) -> float | None:
        """The better milliseconds, with CUDA graph or without, of the first profile's usual shapes."""
        return best(self.points[0]) if self.points else None

    def rows(self) -> dict[int, dict[str, Any]]:
        """The points of the first profile's size, by rows."""
        return {
            point["shapes"]["latent"][0]: point
            for point in self.points
            if point["shapes"]["latent"][2:] == self.points[0]["shapes"]["latent"][2:]
        }


class CheckRecord(BaseModel):
    """`gates` by attention's precision; `kept` names the one in place, `policy` its policy's file."""

    model_config = ConfigDict(extra="forbid")

    date: str
    command: str
    machine: dict[str, str | None]
    model: str
    target: str
    plans: dict[str, Plan] = {}
    gates: dict[str, dict[str, Any]] = {}
    comparisons: list[dict[str, Any]] = []
    torch: list[dict[str, Any]] = []
    bounds: dict[str, dict[int, float]] = {}  # plan → rows → milliseconds, by engines/forecast/roofline.py
    verdict: str = ""
    kept: str | None = None
    policy: str | None = None

    def plan(self, name: str) -> Plan:
        """The plan of this name, new."""
        self.plans[name] = Plan()
        return self.plans[name]

    def too_far(self, name: str) -> list[str] | None:
        """Why a plan's outputs are not ONNX Runtime's; None where they were not compared."""
        component, _, variant = name.partition(" ")
        found = [
            each
            for each in self.comparisons
            if each["variant"] == variant and each["component"] in ("", component)
        ]
        told = [f"{each.get('output', 'outputs')}: {each['failure']}" for each in found if each["failure"]]
        return told if found else None

    def failures(self) -> list[str]:
        """Engines that could not be made, run or compared, or are too far; not what the gate refused."""
        ended = [f"{name}: {plan.error}" for name, plan in self.plans.items() if plan.error]
        far = [
            f"{' '.join(_compared(each)[:2]).strip()}: {each['failure']}"
            for each in self.comparisons
            if each["failure"]
        ]
        return ended + far


def best(point: dict[str, Any]) -> float:
    """The median milliseconds of a point, with a CUDA graph where that is faster."""
    times = [point["milliseconds"]["median"], point.get("graph", {}).get("median")]
    return float(min(each for each in times if each is not None))


def step_times(record: CheckRecord) -> list[StepTimes]:
    """Milliseconds by rows of each MMDiT plan, at its first profile's size."""
    found = []
    for name, plan in record.plans.items():
        if name.startswith("mmdit ") and plan.size is not None:
            found.append(
                StepTimes(
                    gpu=record.machine["gpu"] or "",
                    model=record.model,
                    precision=name.removeprefix("mmdit "),
                    size=plan.size,
                    source="measured",
                    milliseconds={rows: best(point) for rows, point in sorted(plan.rows().items())},
                )
            )
    return found


_TORCH_BOUNDS = {"fp8": "mmdit fp8 attention-fp16"}  # torch's variant ends in its precision → whose bound


def _steps(record: CheckRecord) -> list[list[str]]:
    """Each variant at each number of rows, beside the roofline's bound, which no engine is faster than."""
    lines = []
    base = {rows: best(point) for rows, point in record.plans.get("mmdit fp16", Plan()).rows().items()}

    def add(variant: str, rows: int, plain: float, graph: float | None, *more: str) -> None:
        step = plain if graph is None else min(plain, graph)
        own = variant.replace("TensorRT", "mmdit")
        name = own if own in record.plans else _TORCH_BOUNDS.get(variant.rpartition("-")[2], "mmdit fp16")
        least = record.bounds.get(name, {}).get(rows)
        cells = [variant, str(rows), f"{plain:,.2f}", "" if graph is None else f"{graph:,.2f}"]
        cells += [f"{base[rows] / step:.2f}×" if rows in base else "", *more]
        lines.append([*cells, "" if least is None else f"{least / step:.0%}"])

    def failed(variant: str, rows: str, error: str) -> None:
        lines.append([variant, rows, error, *[""] * 7])

    for name, plan in record.plans.items():
        if not name.startswith("mmdit "):
            continue
        variant = name.replace("mmdit", "TensorRT")
        if plan.error:
            failed(variant, "", plan.error)
        gate = _gate(record.gates.get(name.partition("attention-")[2]))
        far = record.too_far(name)
        outputs = "" if far is None else "FAILED" if far else "within bounds"
        for rows, point in sorted(plan.rows().items()):
            graph = point.get("graph", {}).get("median")
            plain, memory = point["milliseconds"]["median"], plan.facts.get("gpu_bytes")
            add(variant, rows, plain, graph, gate, outputs, _gigabytes(memory), "")
    for row in record.torch:
        variant = f"torch {row['variant']}"
        if "milliseconds" in row:
            memory = _gigabytes(row["peak_bytes"])
            add(variant, row["rows"], row["milliseconds"], None, row.get("note", ""), "", "", memory)
        else:
            failed(variant, str(row["rows"]), row["error"])
    return lines


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def _gate(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mission']['measured']:.4f}, {'passed' if found['passed'] else 'FAILED'}"


def page(record: CheckRecord) -> str:
    """The record as Markdown."""
    return render(
        "gpu_check.md.j2",
        record=record,
        machine=", ".join(f"{name} {value}" for name, value in record.machine.items() if value),
        steps=_steps(record),
        comparisons=[_compared(each) for each in record.comparisons],
    )


def _compared(found: dict[str, Any]) -> list[str]:
    engine = f"{found['variant']} {found['component']}".strip()
    if "plan" not in found:
        return [engine, "", "", "", "", "", "", found["failure"]]
    errors = (found["plan"], found["torch_fp16"], found["onnxruntime"])
    # JSON has no infinity: it came as null.
    numbers = [each["relative"] for each in errors] + [found["bound"]]
    told = ["not finite" if number is None else f"{number:.2e}" for number in numbers]
    cosine = f"{found['plan']['cosine']:.6f}"
    return [engine, found["output"], told[0], cosine, *told[1:], found["failure"] or ""]
