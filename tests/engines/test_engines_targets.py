"""Engine targets: what is chosen on which machine, and what is refused in words."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tiny_model import ROOT, engines

import engines.tensorrt.plan_from_onnx as plan_module
from mmdit import target
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import TargetError
from mmdit.target import CPU, Gpu, find_gpu, has_fp8, resolve

TENSORRT = "11.4.0.106"
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "580.95")
L40S = Gpu("NVIDIA L40S", (8, 9), "580.95")
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), "580.95")
A10 = Gpu("NVIDIA A10", (8, 6), "580.95", 22 << 30, 22 << 30)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", (12, 0), "580.95")


@pytest.mark.parametrize(
    ("gpu", "name", "fp8"),
    [
        (H100, "hopper", True),
        (L40S, "ada", True),
        (A100, "sm80", False),
        (A10, "sm86", False),
        (RTX_5090, "sm120", True),
    ],
)
def test_auto_takes_the_target_of_the_gpu_and_only_sm89_and_later_have_fp8(
    gpu: Gpu, name: str, fp8: bool
) -> None:
    chosen, why = resolve("auto", gpu, TENSORRT)
    assert (chosen.name, chosen.runtime, chosen.fp8) == (name, "tensorrt", fp8)
    assert chosen.compute_capability == gpu.compute_capability
    assert gpu.name in why and TENSORRT in why
    assert resolve(name, gpu, TENSORRT)[0] == chosen
    assert resolve(f"sm{gpu.compute_capability[0]}{gpu.compute_capability[1]}", gpu, TENSORRT)[0] == chosen


@pytest.mark.parametrize(
    ("gpu", "tensorrt", "why"),
    [
        (None, TENSORRT, "no NVIDIA GPU was found"),
        (H100, None, "TensorRT is not installed"),
        (None, None, "TensorRT is not installed and no NVIDIA GPU was found"),
    ],
)
def test_auto_without_tensorrt_or_a_gpu_takes_the_cpu_and_says_why(
    gpu: Gpu | None, tensorrt: str | None, why: str
) -> None:
    assert resolve("auto", gpu, tensorrt) == (CPU, f"ONNX Runtime, because {why}")


@pytest.mark.parametrize(
    ("name", "capability"), [("hopper", (9, 0)), ("ada", (8, 9)), ("sm86", (8, 6)), ("sm120", (12, 0))]
)
@pytest.mark.parametrize(("gpu", "tensorrt"), [(None, TENSORRT), (None, None)])
def test_a_gpu_target_that_cannot_be_built_here_is_prepared_and_says_what_is_missing(
    name: str, capability: tuple[int, int], gpu: Gpu | None, tensorrt: str | None
) -> None:
    chosen, why = resolve(name, gpu, tensorrt)
    assert (chosen.name, chosen.runtime, chosen.compute_capability) == (name, "tensorrt", capability)
    assert chosen.missing and chosen.missing in why
    assert ("TensorRT is not installed" in chosen.missing) is (tensorrt is None)
    assert "no NVIDIA GPU was found" in chosen.missing
    assert chosen.fp8 is (capability >= (8, 9))


def test_a_gpu_without_tensorrt_prepares_its_own_target() -> None:
    chosen, _ = resolve("hopper", H100, None)
    assert chosen.missing == "TensorRT is not installed"


def test_a_target_of_another_compute_capability_than_the_gpu_is_built_elsewhere() -> None:
    chosen, why = resolve("hopper", L40S, TENSORRT)
    assert chosen.name == "hopper" and chosen.compute_capability == (9, 0)
    assert "NVIDIA L40S is ada, and an engine runs only on the compute capability that built it" in why


def test_an_unknown_target_and_an_old_tensorrt_are_refused() -> None:
    with pytest.raises(TargetError, match="'rtx' is unknown: expected auto, ada, hopper, cpu"):
        resolve("rtx", H100, TENSORRT)
    with pytest.raises(TargetError, match=r"TensorRT 10\.9\.0\.34 is too old: expected 10\.13"):
        resolve("auto", H100, "10.9.0.34")
    assert resolve("auto", H100, "10.13.3.9")[0].name == "hopper"


def test_only_a_gpu_without_fp8_or_newer_than_the_policy_draws_a_warning() -> None:
    def warnings(gpu: Gpu, precision: Precision) -> str:
        return "\n".join(resolve("auto", gpu, TENSORRT)[0].warnings(precision))

    assert "sm86 has no FP8" in warnings(A10, Precision.FP8)
    assert "sm120 is newer" in warnings(RTX_5090, Precision.FP16)
    assert not warnings(A10, Precision.FP16)
    assert not warnings(H100, Precision.FP8)
    assert not CPU.warnings(Precision.FP8)


def test_a_gpu_without_fp8_gets_fp16_engines_and_a_warning(
    tiny_build: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def plan(_component: str, _build: object, _source: object, file: Path, **_: object) -> dict[str, object]:
        file.write_bytes(b"plan")
        return {"engine_bytes": 4}

    monkeypatch.setattr(target, "find_gpu", lambda: A10)
    monkeypatch.setattr(target, "tensorrt_version", lambda: TENSORRT)
    monkeypatch.setattr(plan_module, "in_child", plan)
    engines(tiny_build, "--target", "auto", "--precision", "fp8")
    printed = capsys.readouterr()
    assert "warning: sm86 has no FP8" in printed.err
    for component in COMPONENTS:
        folder = Layout("tiny", tiny_build).engine("sm86", component, Precision.FP16)
        versions = read_manifest(folder).versions
        assert (versions["compute_capability"], versions["tensorrt"]) == ("8.6", TENSORRT)
        assert str(folder / "model.plan") in printed.out

    # The same engines do for the next run, but not for the next version of TensorRT.
    engines(tiny_build, "--target", "auto", "--precision", "fp16")
    assert ": building" not in capsys.readouterr().out
    monkeypatch.setattr(target, "tensorrt_version", lambda: "11.5.0.1")
    engines(tiny_build, "--target", "auto", "--precision", "fp16")
    assert f"versions differ: tensorrt {TENSORRT} → 11.5.0.1" in capsys.readouterr().out


def _nvml(capabilities: list[tuple[int, int]]) -> ModuleType:
    """A stand-in for `pynvml` on a machine with GPUs of these compute capabilities, or without any."""
    nvml = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def initialized() -> None:
        if not capabilities:
            raise NVMLError("driver not loaded")

    def by_uuid(uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    names = {
        "NVMLError": NVMLError,
        "nvmlInit": initialized,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: capabilities[handle],
        "nvmlDeviceGetName": lambda handle: f"GPU {handle}",
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlSystemGetDriverVersion": lambda: "580.95",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80 << 30, free=79 << 30),
    }
    for name, value in names.items():
        setattr(nvml, name, value)
    return nvml


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, (8, 9)), ("1", (9, 0)), ("GPU-1,GPU-0", (9, 0)), ("", None), ("-1", None)],
)
def test_the_gpu_is_the_first_one_that_cuda_would_show(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, found: tuple[int, int] | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _nvml([(8, 9), (9, 0)]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = find_gpu()
    assert (gpu and gpu.compute_capability) == found
    assert gpu is None or gpu.uuid == {(8, 9): "GPU-0", (9, 0): "GPU-1"}[gpu.compute_capability]


def test_a_machine_without_a_driver_or_without_nvml_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", _nvml([]))
    assert find_gpu() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gpu() is None


def test_the_names_asked_of_nvml_are_those_of_the_real_binding() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in vars(_nvml([])):
        assert name.startswith("__") or hasattr(pynvml, name), name


def test_tensorrt_of_an_unknown_distribution_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    module.__version__ = "10.99.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(target.util, "find_spec", lambda _: SimpleNamespace())

    def unknown(name: str) -> str:
        raise target.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(target.metadata, "version", unknown)
    assert target.tensorrt_version() == "10.99.0"


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from engines.__main__ import main\n"
        "try:\n    main(['build', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'onnx', 'onnxruntime', 'tensorrt', 'polygraphy', 'pynvml', 'torch'}\n"
        "assert not heavy & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--optimization-level" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "rtx"], "error: target 'rtx' is unknown"),
        (["--target", "cpu", "--model", "org/nothing"], "run `make onnx MODEL=org/nothing` first"),
    ],
)
def test_bad_input_ends_in_status_2_and_one_readable_line(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engines", "build", "--build", str(tmp_path), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "fp8"),
    [("cpu", True), ("ada", True), ("hopper", True), ("sm86", False), ("sm89", True), ("sm120", True)],
)
def test_a_targets_name_tells_whether_it_has_fp8(name, fp8):
    """The packager looks for the engines that the engines stage built, on a machine without the GPU too."""
    assert has_fp8(name) is fp8
