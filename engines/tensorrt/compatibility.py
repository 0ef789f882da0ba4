"""Which TensorRT plans a server can load: asked by the packager as far as it can know, then by the launcher.

A plan is bound to the GPU's compute capability and to the TensorRT that built it. Triton would say so
after minutes, in words of the deserializer; here it is said before it starts, with the way out.
"""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from engines.intact import check_whole
from mmdit.artifact import Manifest, shown
from mmdit.errors import ArtifactError, RepositoryError, ServerError
from mmdit.target import Gpu, resolve


class Plan(BaseModel):
    """What a repository's manifest keeps about a plan. `file` is its path in the repository.

    `compute_capability` is "9.0", `tensorrt` the whole version that built it, `made_from` the hashes of
    its ONNX files and, for FP8, of their calibration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    target: str
    file: str
    bytes: int
    compute_capability: str
    tensorrt: str
    version_compatible: bool
    gpu: str
    driver: str
    made_from: dict[str, str]


def plan_of(folder: Path, manifest: Manifest, target: str, file: str, model: str) -> Plan:
    """The plan of the engine in `folder`, to be served as `file` on `target`.

    Raises ArtifactError for an engine that is not what its manifest says, RepositoryError for one that
    Triton cannot serve there.
    """
    build = f"run `make engines MODEL={model} TARGET={target}` on a GPU of that target"
    (plan,) = (name for name in manifest.files if name.endswith(".plan"))
    sizes = {plan: manifest.findings.get("engine_bytes")}
    check_whole(folder, manifest.files, sizes, f"copy it again, or {build}")
    options = manifest.settings.get("options", {})
    try:
        capability, tensorrt = manifest.versions["compute_capability"], manifest.versions["tensorrt"]
    except KeyError as error:
        raise ArtifactError(
            f"{shown(folder)}: its manifest does not tell the {error.args[0]} that it was built for: {build}"
        ) from None
    wanted = "{}.{}".format(*(resolve(target, None, None)[0].compute_capability or ()))
    if capability != wanted or manifest.settings["target"] != target:
        gpu = manifest.findings.get("gpu", "another GPU")
        raise RepositoryError(
            f"{shown(folder)} was built for {manifest.settings['target']} (compute capability {capability}, "
            f"on {gpu}), and {target} is {wanted}: a plan runs only on the compute capability that built "
            f"it; {build}"
        )
    if options.get("strip"):
        raise RepositoryError(
            f"{shown(folder / plan)} is stripped of its weights, and Triton cannot refit it: run "
            f"`python -m engines refit --model {model} --target {target}` first"
        )
    if options.get("weight_streaming"):
        raise RepositoryError(
            f"{shown(folder / plan)} was built for weight streaming, but Triton's TensorRT backend sets no "
            "budget for it: build it without, for a GPU that holds it or with a smaller model or shape set"
        )
    return Plan(
        component=manifest.settings["component"],
        target=target,
        file=file,
        bytes=(folder / plan).stat().st_size,
        compute_capability=capability,
        tensorrt=tensorrt,
        version_compatible=bool(options.get("version_compatible", False)),
        gpu=manifest.findings.get("gpu", "unknown"),
        driver=manifest.findings.get("driver", "unknown"),
        made_from=manifest.made_from,
    )


def check_together(plans: Iterable[Plan]) -> None:
    """Raise RepositoryError unless one TensorRT can load them all, each target on GPUs of its own."""
    targets: dict[str, str] = {}
    first: Plan | None = None
    for plan in plans:
        if targets.setdefault(plan.compute_capability, plan.target) != plan.target:
            raise RepositoryError(
                f"{targets[plan.compute_capability]} and {plan.target} are the same GPUs (compute capability "
                f"{plan.compute_capability}): name one of them"
            )
        first = first or plan
        both = first.version_compatible and plan.version_compatible
        if plan.tensorrt != first.tensorrt and not (
            both and _numbers(plan.tensorrt)[0] == _numbers(first.tensorrt)[0]
        ):
            raise RepositoryError(
                f"{plan.component} for {plan.target} was built with TensorRT {plan.tensorrt}, "
                f"{first.component} for {first.target} with {first.tensorrt}: one server loads them all, "
                "and has one TensorRT; build them with the same"
            )


def loadable(plans: Iterable[Plan], gpu: Gpu | None, tensorrt: str) -> list[Plan]:
    """The plans that a server loads on a GPU, one for each component.

    `tensorrt` is the server's version, as far as it is known. Raises ServerError, with the reason and the
    way out, when it cannot load them.
    """
    plans = list(plans)
    targets = ", ".join(dict.fromkeys(f"{plan.target} ({plan.compute_capability})" for plan in plans))
    if gpu is None:
        raise ServerError(
            f"no NVIDIA GPU was found (or its driver, or CUDA_VISIBLE_DEVICES hides it), and this repository "
            f"holds plans for {targets}: start the container with --gpus, or package engines for TARGET=cpu"
        )
    capability = "{}.{}".format(*gpu.compute_capability)
    chosen = [plan for plan in plans if plan.compute_capability == capability]
    if not chosen:
        raise ServerError(
            f"{gpu.name} has compute capability {capability}, and this repository holds plans for {targets}: "
            "a plan runs only on the compute capability that built it; build engines on this GPU "
            "(`make engines TARGET=auto`) and package them, or serve on another"
        )
    server = _numbers(tensorrt)
    for plan in chosen:
        built = _numbers(plan.tensorrt)[: len(server)]
        if plan.version_compatible and built[0] == server[0] and built <= server:
            continue
        if built != server:
            rule = (
                "a version-compatible plan loads in later versions of the same major release"
                if plan.version_compatible
                else "a plan loads in the version that built it alone"
            )
            raise ServerError(
                f"{plan.file} was built with TensorRT {plan.tensorrt}, this server has {tensorrt}: {rule}; "
                f"serve it in the Triton container that carries {plan.tensorrt}, or build it again with "
                f"`pip install 'tensorrt=={tensorrt}.*'`"
            )
    return chosen


def built_elsewhere(plans: Iterable[Plan], gpu: Gpu) -> str | None:
    """A warning of plans that load here and were built on another model of GPU; None where none was."""
    others = sorted({plan.gpu for plan in plans} - {gpu.name, "unknown"})
    if not others:
        return None
    return (
        f"built on {', '.join(others)}, here is {gpu.name}: it loads, but it was tuned and judged there; "
        "engines built on this GPU may be faster"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
