"""gpu-check without a GPU: what it runs, records, decides and shows."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from measure_samples import TEN, made, outputs, times
from tiny_model import ROOT

from export.policy import read_policy
from measure.__main__ import main
from measure.accuracy import compared
from measure.check_page import CheckRecord, page, step_times
from measure.child import Ended
from measure.inspector import summary
from mmdit.artifact import Layout, Manifest, read_manifest, whole
from mmdit.contract import Precision
from mmdit.errors import EngineError, TargetError
from mmdit.target import Gpu


@pytest.fixture
def record() -> CheckRecord:
    """What a check on an H100 may have found."""
    found = CheckRecord(
        date="2026-11-21",
        command="python -m measure check",
        machine={"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13.0"},
        model="sd35-medium",
        target="hopper",
        gates={"fp8": {"passed": False, "mission": {"measured": 0.9512}, "failures": ["SSIM"]}},
        verdict="attention in fp16",
        kept="fp16",
        policy="build/sd35-medium/gpu-check/hopper/attention-fp16.toml",
    )
    found.bounds = {"mmdit fp16": {2: 23.2}, "mmdit fp8 attention-fp8": {2: 11.6}}
    found.torch = [
        {"variant": "compile-fp16", "rows": 2, "milliseconds": 60.0, "peak_bytes": 6 * 10**9},
        {"variant": "compile-fp8", "rows": 2, "error": "out of memory"},
    ]
    for name, step in (("mmdit fp16", 40.0), ("mmdit fp8 attention-fp8", 25.0)):
        shapes = {"latent": [2, 16, 128, 128], "timestep": [2, 1]}
        plan = found.plan(name)
        plan.take({"profile": 0, "shapes": shapes, "milliseconds": times(step + 1), "graph": times(step)})
        plan.take({"summary": summary(json.dumps({"Layers": TEN})).model_dump(), "gpu_bytes": 8 * 10**9})
    for name in ("mmdit fp16", "clip_l fp16"):
        found.plan(name.replace("mmdit", "t5")).error = "ended with status -9"
    (each,) = compared("mmdit", Precision.FP16, **outputs(plan=math.nan))
    found.comparisons = [
        {"variant": "fp16"} | json.loads(each.model_dump_json()),
        {"variant": "fp8 attention-fp16", "component": "", "failure": "ended with status 1: no memory"},
    ]
    return found


def test_the_table_sets_engines_beside_torch_and_the_bounds(record: CheckRecord) -> None:
    """A faster engine can be further from its own bound."""
    written = page(record)
    assert "| TensorRT fp16 | 2 | 41.00 | 40.00 | 1.00× |  | FAILED | 8.0 |  | 58% |" in written
    assert (
        "| TensorRT fp8 attention-fp8 | 2 | 26.00 | 25.00 | 1.60× | 0.9512, FAILED |  | 8.0 |  | 46% |"
        in written
    )
    assert "| torch compile-fp16 | 2 | 60.00 |  | 0.67× |  |  |  | 6.0 | 39% |" in written
    assert "| torch compile-fp8 | 2 | out of memory |" in written
    assert "Kept: attention in fp16." in written and "POLICY=build/sd35-medium/" in written
    assert "| mmdit fp16 | 1 fp8, 2 fp16, 1 fp32 | 1 fp8, 1 fp16 | 1 fp16 | 1 |" in written
    assert "| fp16 mmdit | velocity | not finite |" in written and "no memory |" in written


def test_step_times_are_the_better_of_graph_and_none(record: CheckRecord) -> None:
    found = {each.precision: each for each in step_times(record)}
    assert found["fp8 attention-fp8"].milliseconds == {2: 25.0}
    assert found["fp16"].size == (1024, 1024) and len(found) == 2


@pytest.mark.parametrize("target", ["hopper", "auto", "cpu"])
def test_without_a_gpu_or_tensorrt_nothing_is_begun(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line that says what is missing, and how to get it."""
    monkeypatch.setattr("measure.check.find_gpu", lambda: None)
    monkeypatch.setattr("measure.check.tensorrt_version", lambda: None)
    with pytest.raises(TargetError, match="pip install tensorrt"):
        main(["check", "--target", target, "--build", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, stage: Any, *, dies: str = "", wrong_outputs: tuple[str, ...] = ()
) -> None:
    """An H100 with TensorRT where every child process answers at once, but for the engine that `dies`."""
    h100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "580")
    monkeypatch.setattr("measure.check.find_gpu", lambda: h100)
    monkeypatch.setattr("measure.check.tensorrt_version", lambda: "11.4.0")
    monkeypatch.setattr("measure.check.machine", lambda device: {"gpu": h100.name, "torch": "2.13.0"})
    monkeypatch.setattr("measure.check._stage", stage)
    monkeypatch.setattr("measure.check._bound", lambda *_: None)  # the files are not there

    def lines(module: str, job: str, *, minutes: float, advice: str) -> Any:
        if module == "measure.outputs":
            precision = Precision(json.loads(job)["precision"])
            wrong = {"plan": math.nan} if precision.value in wrong_outputs else {}
            (comparison,) = compared("mmdit", precision, **outputs(**wrong))
            yield json.loads(comparison.model_dump_json())
            return
        folder = Path(json.loads(job)["folder"])
        attention = (folder / "model.plan").read_text() if folder.name == "mmdit-fp8" else "none"
        step = {"none": 40.0, "fp16": 30.0, "fp8": 25.0}[attention]
        shapes = {"latent": [2, 16, 128, 128]} if "mmdit" in folder.name else {"input_ids": [1, 77]}
        yield {"profile": 0, "shapes": shapes, "milliseconds": times(step)}
        if folder.name == dies:
            raise Ended("ended with status -9")

    monkeypatch.setattr("measure.check.lines", lines)
    monkeypatch.setattr("measure.check.rows_of", lambda part, minutes: iter([{"rows": 2, "error": "late"}]))


class Stages:
    """The stages' commands: each makes what it would, but for the one that `breaks`."""

    def __init__(self, layout: Layout, breaks: str = "") -> None:
        self.layout, self.breaks, self.ran = layout, breaks, []
        self.words: list[list[str]] = []

    def __call__(self, module: str, *words: str) -> None:
        known = ("onnx", "fp8", "fp16", "gate")
        self.ran.append(" ".join([module, *(word for word in words if word in known)]))
        self.words.append(list(words))
        engine = self.layout.engine("hopper", "mmdit", Precision.FP8) / "model.plan"
        if self.ran[-1] == "export fp8":
            self.attention = (
                read_policy(Path(words[words.index("--policy") + 1])).attention_on("hopper").value
            )
            made(self.layout, self.attention)
            manifest = Manifest(kind="calibration", checkpoint="", made_from={}, settings={}, versions={})
            with whole(self.layout.calibration, manifest):
                pass
        if self.breaks == f"{self.ran[-1]} {getattr(self, 'attention', '')}".strip():
            raise EngineError(f"`python -m {module}` ended with status 2")
        if module == "quality":
            passed = engine.read_text() == "fp16"
            manifest = Manifest(kind="quality", checkpoint="", made_from={}, settings={}, versions={})
            failures = [] if passed else ["SSIM"]
            manifest.findings = {"passed": passed, "failures": failures, "mission": {"measured": 0.98}}
            made_engine = read_manifest(engine.parent)
            manifest.made_from = {f"mmdit-fp8/{name}": value for name, value in made_engine.files.items()}
            with whole(self.layout.quality("hopper"), manifest):
                pass


def checked(tmp_path: Path, *words: str) -> tuple[CheckRecord, str | None]:
    """Run gpu-check; the record that it wrote, and the error that it ended with."""
    error = None
    own = ["check", "--build", str(tmp_path / "build"), "--out", str(tmp_path / "out"), "--rows", "2"]
    try:
        assert main([*own, *words]) == 0
    except EngineError as ended:
        error = str(ended)
    (written,) = (tmp_path / "out").glob("*-gpu-check-h100-80gb-hbm3-miniature.json")
    return CheckRecord.model_validate_json(written.read_text()), error


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout("miniature", tmp_path / "build")


def test_both_attentions_are_made_and_judged_and_the_better_one_stays(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP8 attention is faster and fails the gate here: the engine before it comes back, not built again."""
    stages = Stages(layout)
    on_a_gpu(monkeypatch, stages)
    found, error = checked(tmp_path)
    assert error is None
    assert stages.ran == ["export onnx", "engines fp16", *2 * ["export fp8", "engines fp8", "quality gate"]]
    assert (layout.engine("hopper", "mmdit", Precision.FP8) / "model.plan").read_text() == "fp16"
    assert found.kept == "fp16" and "attention in fp8 is out: SSIM" in found.verdict
    assert len(found.comparisons) == 3 and found.torch[0]["error"] == "late"
    assert len(list((tmp_path / "out" / "step-times").iterdir())) == 3
    printed = capsys.readouterr().out
    assert "It takes hours" in printed and "about 40 GB for SD3.5 Medium" in printed
    assert (
        "| TensorRT fp8 attention-fp16 | 2 | 30.00 |  | 1.33× | 0.9800, passed | within bounds |" in printed
    )


def test_what_the_deployed_engines_were_made_with_reaches_every_stage(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else their stages would remake them with the defaults."""
    stages = Stages(layout)
    on_a_gpu(monkeypatch, stages)
    words = ["--onnx-options=--scan-batch 1", "--fp8-options=--calibration-size '64x64'"]
    checked(tmp_path, *words, "--engine-options=--version-compatible", "--calibration", "saved.json")
    ends = {"export onnx": ["--scan-batch", "1"], "engines fp16": ["--version-compatible"]}
    ends |= {"export fp8": ["--calibration-size", "64x64", "--calibration", "saved.json"]}
    ends |= {"engines fp8": ["--version-compatible"]}
    for stage, given in zip(stages.ran, stages.words, strict=True):
        if stage in ends:
            assert given[-len(ends[stage]) :] == ends[stage]


def test_make_hands_its_variables_on_quoted() -> None:
    """Each is one word, and neither make nor the shell expands what is in it."""
    given = {"ONNX_OPTIONS": "--scan-batch 1", "FP8_OPTIONS": "--calibration-batch 2"}
    given |= {"ENGINE_OPTIONS": "--strip", "CALIBRATION": "it's $HOME.json", "COUNT": "4"}
    words = [f"{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "gpu-check", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = shlex.split(done.stdout.replace("\\\n", " "))
    for name, value in given.items():
        assert f"--{name.lower().replace('_', '-')}={value}" in found


@pytest.mark.parametrize("stage", ["export fp8 fp8", "engines fp8 fp8", "quality gate fp8"])
def test_a_variant_that_fails_is_told_and_the_rest_goes_on(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """FP8 attention cannot be built, say: the other variant is back in place, torch is measured, status 2."""
    on_a_gpu(monkeypatch, Stages(layout, breaks=stage))
    found, error = checked(tmp_path)
    assert error is not None and "mmdit fp8 attention-fp8: `python -m" in error
    assert found.kept == "fp16" and "attention in fp8 is out: `python -m" in found.verdict and found.torch
    assert (layout.engine("hopper", "mmdit", Precision.FP8) / "model.plan").read_text() == "fp16"
    assert "| TensorRT fp8 attention-fp8 |  | `python -m" in page(found)


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
def test_outputs_beyond_their_bound_put_an_engine_out(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Also where the gate passed; of FP16 it is told, since FP8 is judged beside it."""
    on_a_gpu(monkeypatch, Stages(layout), wrong_outputs=(precision,))
    found, error = checked(tmp_path)
    assert error is not None and "velocity: it holds values that are not finite" in error
    assert found.kept == (None if precision == "fp8" else "fp16")
    variant = f"| TensorRT {'fp8 attention-fp16 | 2 | 30.00' if precision == 'fp8' else 'fp16 | 2 | 40.00'} |"
    (line,) = (line for line in page(found).splitlines() if line.startswith(variant))
    assert "| FAILED |" in line


def test_an_engine_that_dies_while_it_is_timed_is_told(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, Stages(layout), dies="t5-fp16")
    found, error = checked(tmp_path)
    assert error is not None and "t5 fp16: ended with status -9" in error and found.kept == "fp16"


def test_a_stage_of_fp16_that_fails_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(module: str, *words: str) -> None:
        raise EngineError(f"`python -m {module}` ended with status 2")

    on_a_gpu(monkeypatch, stage)
    with pytest.raises(EngineError, match="python -m export"):
        main(["check", "--build", str(tmp_path / "build"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("command", [[], ["reference"], ["check"]])
def test_help_loads_no_torch(command: list[str]) -> None:
    code = "import sys; sys.argv[1:] = sys.argv[1:] + ['--help']\ntry:\n import runpy\n"
    code += " runpy.run_module('measure', run_name='__main__')\nexcept SystemExit:\n pass\n"
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "usage: python -m measure" in done.stdout and done.stderr.strip() == "False"
