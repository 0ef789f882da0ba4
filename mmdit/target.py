"""Engine targets: which runtime and which GPU the engines are for, and what this machine can build.

Imports no heavy library: the GPU is asked through NVML, TensorRT's version read from its metadata.
"""

import os
import re
from dataclasses import dataclass, replace
from importlib import metadata, util
from typing import Any

from mmdit.contract import Precision
from mmdit.errors import TargetError

OLDEST_TENSORRT = (10, 13)
_FIRST_FP8 = (8, 9)
_GET_TENSORRT = "install it with `pip install tensorrt`, or work in NVIDIA's TensorRT or Triton container"


@dataclass(frozen=True)
class Gpu:
    """The GPU that TensorRT would use; its memory in bytes. 0 and "" where nobody asked."""

    name: str
    compute_capability: tuple[int, int]
    driver: str
    memory: int = 0
    free_memory: int = 0
    uuid: str = ""


@dataclass(frozen=True)
class Target:
    """What engines are built for; `fp8` says whether the runtime executes FP8 graphs there.

    `missing` says why they cannot be built on this machine, where all before the build can run all the same.
    `fp8_attention_tokens` are the most up to which TensorRT is known to fuse attention in FP8 (from the
    release notes of 10.6); None where no limit is known. Whether it pays, `make gpu-check` measures.
    """

    name: str
    runtime: str  # a row of `engines/runtimes.py`
    compute_capability: tuple[int, int] | None
    fp8: bool
    missing: str | None = None
    fp8_attention_tokens: int | None = None

    def warnings(self, precision: Precision) -> list[str]:
        """What a user who asks for `precision` on this target should know."""
        if self.compute_capability is None:
            return []
        found = []
        if precision is Precision.FP8 and not self.fp8:
            found.append(f"{self.name} has no FP8 (it needs sm89, sm90 or later): building FP16 engines")
        if self.compute_capability > max(_NAMES):
            found.append(
                f"{self.name} is newer than the targets that the precision policy was made for "
                f"({', '.join(_NAMES.values())}): compare the pictures with FP16 before you serve"
            )
        return found


CPU = Target("cpu", "onnxruntime", None, fp8=True)
TARGETS = (
    Target("hopper", "tensorrt", (9, 0), fp8=True),
    Target("ada", "tensorrt", (8, 9), fp8=True, fp8_attention_tokens=3072),
    CPU,
)
KNOWN = tuple(target.name for target in TARGETS)
_OF_GPU = {target.compute_capability: target for target in TARGETS if target.compute_capability}
_NAMES = {capability: _OF_GPU[capability].name for capability in sorted(_OF_GPU)}


def resolve(name: str, gpu: Gpu | None, tensorrt: str | None) -> tuple[Target, str]:
    """The target called `name`, and in words why it is that one.

    `auto` takes the GPU's target where TensorRT and a GPU are there, else the CPU. `tensorrt` is
    the version installed. Raises TargetError when `name` is unknown, or TensorRT too old.
    """
    lacks = {
        "TensorRT is not installed": tensorrt is None,
        "no NVIDIA GPU was found": gpu is None,
    }
    without = " and ".join(what for what, holds in lacks.items() if holds)
    if name == "cpu":
        return CPU, "ONNX Runtime, as asked"
    if name == "auto" and without:
        return CPU, f"ONNX Runtime, because {without}"
    if name != "auto" and not known(name):
        raise TargetError(
            f"target {name!r} is unknown: expected auto, {', '.join(_NAMES.values())}, cpu, "
            "or a compute capability such as sm86"
        )
    if tensorrt is not None and tuple(int(part) for part in tensorrt.split(".")[:2]) < OLDEST_TENSORRT:
        raise TargetError(
            f"TensorRT {tensorrt} is too old: expected {'.'.join(map(str, OLDEST_TENSORRT))} or "
            f"later; {_GET_TENSORRT}"
        )
    if gpu is not None and name in ("auto", *_names_of(gpu.compute_capability)):
        if not without:
            return _target(
                gpu.compute_capability
            ), f"{gpu.name}, {_sm(gpu.compute_capability)}, TensorRT {tensorrt}"
    elif gpu is not None:
        found = _names_of(gpu.compute_capability)[0]
        other = f"{gpu.name} is {found}, and an engine runs only on the compute capability that built it"
        without = " and ".join(filter(None, (other, without)))
    capability = _capability(name)
    return replace(
        _target(capability), missing=without
    ), f"{_sm(capability)}, to be built elsewhere: {without}"


def known(name: str) -> bool:
    """Whether a target goes by this name, on whatever machine."""
    return name in KNOWN or re.fullmatch(r"sm\d{2,3}", name) is not None


def has_fp8(name: str) -> bool:
    """Whether a target executes FP8 graphs, told by its name alone: sm86 does not."""
    return not re.fullmatch(r"sm\d{2,3}", name) or int(name[2:]) >= 10 * _FIRST_FP8[0] + _FIRST_FP8[1]


def find_gpu() -> Gpu | None:
    """The first GPU that CUDA would show, asked through NVML; None without one or its driver.

    NVML counts in PCI order, as CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID; else that puts the fastest
    first.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle: Any = (
            pynvml.nvmlDeviceGetHandleByIndex(int(first))
            if first.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(first)
        )
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return Gpu(
            name=pynvml.nvmlDeviceGetName(handle),
            compute_capability=(major, minor),
            driver=pynvml.nvmlSystemGetDriverVersion(),
            memory=int(memory.total),
            free_memory=int(memory.free),
            uuid=pynvml.nvmlDeviceGetUUID(handle),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def tensorrt_version() -> str | None:
    """The version of TensorRT's Python package; None if it is not installed.

    The name of its distribution differs between wheels of one CUDA version, wheels for all, and the
    containers; where none of them is known, TensorRT itself is imported and asked.
    """
    if util.find_spec("tensorrt") is None:
        return None
    for distribution in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    import tensorrt

    return str(tensorrt.__version__)


def _target(capability: tuple[int, int]) -> Target:
    other = Target(_sm(capability), "tensorrt", capability, fp8=capability >= _FIRST_FP8)
    return _OF_GPU.get(capability, other)


def _names_of(capability: tuple[int, int]) -> tuple[str, ...]:
    """A compute capability's names, the usual one first."""
    sm = _sm(capability)
    return (_NAMES[capability], sm) if capability in _NAMES else (sm,)


def _capability(name: str) -> tuple[int, int]:
    """The compute capability of a target that is known by name, other than auto and cpu."""
    for capability, usual in _NAMES.items():
        if name == usual:
            return capability
    return int(name[2:-1]), int(name[-1])


def _sm(capability: tuple[int, int]) -> str:
    return f"sm{capability[0]}{capability[1]}"
