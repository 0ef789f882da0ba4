"""gpu-check without a GPU: what is read, derived, chosen and shown; TensorRT's calls against stand-ins.

A child process loads TensorRT's real bindings (tests/tensorrt_stand_in.py). The samples of the engine
inspector's JSON are assumptions: put together after reports of TensorRT 8 to 10, 11 unseen.
"""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_stand_in import BINDINGS, real_bindings, stand_in
from test_engines_onnxruntime import ROOT

from engines.__main__ import main as engines
from export.policy import AttentionPrecision, Policy, Rule, read_policy
from measure.__main__ import main
from measure.accuracy import compared, difference
from measure.attention import Candidate, _write, bring, check_whole, chosen, policy_text
from measure.check_page import CheckRecord, page, step_times
from measure.child import Ended
from measure.inspector import summary
from measure.outputs import Job as outputs_job
from measure.outputs import comparisons
from measure.plan import Job, measured, points
from mmdit.artifact import Layout, Manifest, read_manifest, whole
from mmdit.contract import Precision
from mmdit.errors import ArtifactError, EngineError, TargetError
from mmdit.target import Gpu

ATTENTION = (
    "[ONNX Layer: /blocks.0/attn/MatMul]\x1e[ONNX Layer: /Softmax]\x1e[ONNX Layer: /blocks.0/attn/MatMul_1]"
)
PROFILES = [
    {"latent": [[2, 4, 8, 8], [2, 4, 8, 8], [2, 4, 8, 8]], "timestep": [[2, 1], [2, 1], [2, 1]]},
    {"latent": [[1, 4, 8, 8], [4, 4, 8, 8], [4, 4, 16, 8]], "timestep": [[1, 1], [4, 1], [4, 1]]},
]


def layer(name: str, datatype: str, **more: str) -> dict[str, Any]:
    """A layer as the inspector has it, with one input."""
    return {"Name": name, "Inputs": [{"Name": "x", "Format/Datatype": datatype}], **more}


# TensorRT 10, after reports of Myelin's layers: datatypes by name, ONNX nodes in the metadata.
TEN = [
    layer("/ff/MatMul_myl0_7", "FP8", LayerType="gemm", TacticName="sm90_xmma_gemm_e4m3e4m3_f16"),
    layer(
        "_gemm_mha_v2_myl0_8", "Half", LayerType="kgen", TacticName="_gemm_mha_v2_0xbc", Metadata=ATTENTION
    ),
    layer("__myl_AddMean_myl0_9", "Half", LayerType="kgen", TacticName="__myl_AddMean_0xf2"),
    layer("/norm/Softmax_myl0_10", "Float", LayerType="kgen", Metadata="[ONNX Layer: /Softmax_1]"),
]
# Formats in words, as TensorRT 8 and 9 wrote them; 11 may name a fused attention so.
ELEVEN = [
    layer("to_q", "Row major linear FP8 format", LayerType="MatrixMultiply"),
    layer("attention", "Row major linear FP8 format", LayerType="Attention", TacticName="fmha_v2_e4m3"),
    layer("/attention/to_out/Add", "Row major linear FP16 format", LayerType="PointWise"),
    layer("copy", "Row major linear BFloat16", LayerType="Reformat"),
]


def test_the_inspector_tells_precisions_and_fused_attention() -> None:
    """A softmax by itself is not a fused attention, nor is a layer for its module's name."""
    ten = summary(json.dumps({"Layers": TEN, "Bindings": []}))
    assert ten.layers == {"fp8": 1, "fp16": 2, "fp32": 1} and ten.products == {"fp8": 1, "fp16": 1}
    assert (ten.attention_fused, ten.softmax_alone, ten.fused_share) == ({"fp16": 1}, 1, 0.5)
    eleven = summary(json.dumps({"Layers": ELEVEN}))
    assert eleven.layers == {"fp8": 2, "fp16": 1, "bf16": 1}
    assert (eleven.attention_fused, eleven.softmax_alone, eleven.fused_share) == ({"fp8": 1}, 0, 1.0)


def test_layers_without_details_are_counted_as_unknown() -> None:
    """A plan that was built with LAYER_NAMES_ONLY gives strings."""
    found = summary('{"Layers": ["conv", "/Softmax"]}')
    assert (found.unknown, found.layers, found.softmax_alone) == (2, {"unknown": 2}, 1)
    with pytest.raises(ValueError, match="Expecting"):
        summary("no JSON")


def test_a_difference_is_relative_to_what_was_expected() -> None:
    assert difference(np.array([3.0, 4.1]), np.array([3.0, 4.0])).relative == pytest.approx(0.02)
    assert difference(np.array([2.0, 0.0]), np.array([1.0, 0.0])).cosine == pytest.approx(1)
    assert difference(np.array([math.nan]), np.array([1.0])).relative == math.inf
    assert difference(np.zeros(2), np.zeros(2)).relative == 0


def outputs(**errors: float) -> dict[str, dict[str, np.ndarray]]:
    """Four ways' outputs: FP32 is ones, the others are off by a part of it."""
    exact = np.ones(8)
    return {
        way: {"velocity": exact + errors.get(way, 0.0)} for way in ("plan", "onnxruntime", "torch_fp16")
    } | {"torch_fp32": {"velocity": exact}}


@pytest.mark.parametrize(
    ("errors", "failure"),
    [
        ({"plan": 0.004, "torch_fp16": 0.001}, None),
        ({"plan": 0.005, "torch_fp16": 0.001}, "relative error 5.00e-03, expected at most 4.24e-03"),
        ({"plan": -0.02, "onnxruntime": 0.01, "torch_fp16": 0.001}, None),
        ({"plan": 0.5, "torch_fp16": math.inf, "onnxruntime": 0.001}, "relative error"),
        ({"plan": math.nan}, "it holds values that are not finite"),
    ],
)
def test_the_bound_is_three_root_two_of_the_larger_error(
    errors: dict[str, float], failure: str | None
) -> None:
    """Where torch's plain FP16 overflows, ONNX Runtime's error alone."""
    (found,) = compared("mmdit", Precision.FP16, **outputs(**errors))
    assert (found.failure or "").startswith(failure or "") and (found.failure is None) == (failure is None)


@pytest.mark.parametrize(("plan", "good"), [(0.0149, True), (0.0151, False), (math.nan, False)])
def test_fp8_is_held_to_one_and_a_half_times_its_files_own_error(plan: float, good: bool) -> None:
    """However far torch's FP16 is: the plan runs the same scales as the file."""
    errors = {"plan": 0.01 + plan * 1.01, "onnxruntime": 0.01, "torch_fp16": 0.5}
    (found,) = compared("mmdit", Precision.FP8, **outputs(**errors))
    assert (found.failure is None) == good and found.bound == pytest.approx(0.015)


def candidate(attention: str, milliseconds: float | None, passed: bool, reason: str = "") -> Candidate:
    return Candidate(attention=attention, milliseconds=milliseconds, passed=passed, reason=reason)


def test_the_faster_engine_that_passes_the_gate_is_kept() -> None:
    slow, fast = candidate("fp16", 40.0, True), candidate("fp8", 30.0, True)
    assert chosen([slow, fast])[0] == fast
    failed = candidate("fp8", 30.0, False, "mean SSIM 0.91 is below 0.95")
    best, why = chosen([slow, failed])
    assert best == slow and "attention in fp8 is out: mean SSIM 0.91" in why
    none, why = chosen([failed, candidate("fp16", None, True, "it ended")])
    assert none is None and "no FP8 engine passed" in why


def test_a_written_policy_reads_back_with_attention_on_every_target(tmp_path: Path) -> None:
    rule = Rule(pattern=r"transformer_blocks\.0\..+", precision="fp16", reason='the "first" block')
    own = Policy(rule=(rule,), attention={"hopper": AttentionPrecision.FP16})
    (tmp_path / "policy.toml").write_text(policy_text("fp8", own))
    found = read_policy(tmp_path / "policy.toml")
    assert found.rules[0] == rule
    assert {found.attention_on(name) for name in ("hopper", "ada", "sm120")} == {AttentionPrecision.FP8}


def made(layout: Layout, attention: str) -> None:
    """An FP8 file and its engine, as the stages leave them."""
    made_from: dict[str, str] = {}
    for folder, file in (
        (layout.onnx("mmdit", Precision.FP8), "model.onnx"),
        (layout.engine("hopper", "mmdit", Precision.FP8), "model.plan"),
    ):
        settings = {"attention": attention}
        manifest = Manifest(kind="", checkpoint="", made_from=made_from, settings=settings, versions={})
        with whole(folder, manifest) as partial:
            (partial / file).write_text(attention)
        made_from = manifest.files


def test_what_is_not_in_place_is_kept_beside_it(tmp_path: Path) -> None:
    """Each variant is made once, and comes back whole."""
    layout = Layout("tiny", tmp_path)
    engine = layout.engine("hopper", "mmdit", Precision.FP8)
    bring(layout, "hopper", "fp16")  # nothing is there
    made(layout, "fp16")
    bring(layout, "hopper", "fp8")
    assert not engine.exists()
    made(layout, "fp8")
    for attention in ("fp16", "fp16", "fp8"):
        bring(layout, "hopper", attention)
        assert (engine / "model.plan").read_text() == attention
        assert (layout.onnx("mmdit", Precision.FP8) / "model.onnx").read_text() == attention


@pytest.mark.parametrize("crash", range(8))
def test_a_move_that_was_stopped_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    """Before any of the four renames and the four notes after them: no folder is lost, none is mixed."""
    layout = Layout("tiny", tmp_path)
    for attention in ("fp16", "fp8"):
        bring(layout, "hopper", attention)
        made(layout, attention)
    monkeypatch.setattr(
        "measure.attention._write", stopping := Stopping(crash // 2 + 1 if crash % 2 else None)
    )
    rename = Path.rename
    renames = Stopping(None if crash % 2 else crash // 2, lambda path, place: rename(path, place))
    monkeypatch.setattr(Path, "rename", lambda path, place: renames(path, place))
    with pytest.raises(KeyboardInterrupt):
        bring(layout, "hopper", "fp16")
    monkeypatch.undo()
    assert stopping.calls + renames.calls
    bring(layout, "hopper", "fp8")
    for attention in ("fp8", "fp16", "fp8"):
        bring(layout, "hopper", attention)
        for folder in (layout.onnx("mmdit", Precision.FP8), layout.engine("hopper", "mmdit", Precision.FP8)):
            (file,) = folder.glob("model.*")
            assert file.read_text() == attention


class Stopping:
    """A function that is interrupted at its call of this number."""

    def __init__(self, at: int | None, function: Any = _write) -> None:
        self.at, self.function, self.calls = at, function, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        if self.at is not None and self.calls > self.at:
            raise KeyboardInterrupt
        return self.function(*given)


def test_what_an_unfinished_variant_left_makes_way_for_the_other(tmp_path: Path) -> None:
    """FP8 attention was calibrated and then not exported: its calibration stays its own."""
    layout = Layout("tiny", tmp_path)
    bring(layout, "hopper", "fp16")
    made(layout, "fp16")
    bring(layout, "hopper", "fp8")
    layout.calibration.mkdir()
    bring(layout, "hopper", "fp16")
    assert (layout.onnx("mmdit", Precision.FP8) / "model.onnx").read_text() == "fp16"
    assert not layout.calibration.exists()
    bring(layout, "hopper", "fp8")
    assert layout.calibration.exists()


def test_parts_of_two_variants_are_not_kept(tmp_path: Path) -> None:
    """Each manifest must name what the one before it holds."""
    layout = Layout("tiny", tmp_path)
    made(layout, "fp8")
    for folder in (layout.calibration, layout.quality("hopper")):
        with whole(folder, Manifest(kind="", checkpoint="", made_from={}, settings={}, versions={})):
            pass
    engine = read_manifest(layout.engine("hopper", "mmdit", Precision.FP8))
    gate = layout.quality("hopper") / "manifest.json"
    about = {f"mmdit-fp8/{name}": value for name, value in engine.files.items()}
    gate.write_text(json.dumps(json.loads(gate.read_text()) | {"made_from": about}))
    engine.made_from["calibration.json"] = "of the file's own"
    (layout.engine("hopper", "mmdit", Precision.FP8) / "manifest.json").write_text(engine.model_dump_json())
    check_whole(layout, "hopper", "fp8")
    gate.write_text(json.dumps(json.loads(gate.read_text()) | {"made_from": {}}))
    with pytest.raises(ArtifactError, match="the gate is not of the variant with attention in fp8"):
        check_whole(layout, "hopper", "fp8")


def test_each_shape_is_timed_once_in_the_first_profile_that_takes_it() -> None:
    """The static profile has two rows; three are in the second alone, sixteen in none."""
    found = [(profile, shapes["latent"][0]) for profile, shapes in points(PROFILES, (1, 2, 3, 16))]
    assert found == [(0, 2), (1, 1), (1, 3), (1, 4)]


def times(median: float) -> dict[str, float]:
    return {"median": median, "min": median, "max": median, "runs": 5}


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
    assert "| TensorRT fp8 attention-fp8 | | `python -m" in page(found)


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


def test_outputs_of_the_miniature_are_within_the_bound_that_they_give(build: Layout, miniature: Path) -> None:
    """With ONNX Runtime in the plan's place: every component in FP16, then the FP8 MMDiT alone."""
    found = []
    for precision in Precision:
        words = ["build", "--model", str(miniature), "--build", str(build.root.parent), "--target", "cpu"]
        engines([*words, "--precision", precision.value])
        job = outputs_job(model=str(miniature), build=build.root.parent, target="cpu", precision=precision)
        found += list(comparisons(job))
    assert [each.component for each in found] == ["clip_l"] * 2 + ["clip_g"] * 2 + [
        *("t5", "mmdit", "vae_decoder", "mmdit")
    ]
    for each in found:
        assert each.failure is None and each.plan.relative == 0
        assert 0 < each.onnxruntime.relative < 0.1 and 0 < each.torch_fp16.relative < 0.02
    assert found[-1].bound > found[-3].bound  # FP8's scales cost more than FP16's rounding


@pytest.mark.parametrize("command", [[], ["reference"], ["check"]])
def test_help_loads_no_torch(command: list[str]) -> None:
    code = "import sys; sys.argv[1:] = sys.argv[1:] + ['--help']\ntry:\n import runpy\n"
    code += " runpy.run_module('measure', run_name='__main__')\nexcept SystemExit:\n pass\n"
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "usage: python -m measure" in done.stdout and done.stderr.strip() == "False"


def run_scenarios(folder: Path) -> None:
    """In the child process: time a plan over stand-ins, print what TensorRT was told as JSON."""
    trt = real_bindings(folder)
    dtypes = {"latent": trt.DataType.HALF, "timestep": trt.DataType.FLOAT, "velocity": trt.DataType.HALF}
    names, shapes, told = list(dtypes), {}, {"calls": 0, "addresses": set(), "profiles": []}

    def execute(stream: int) -> bool:
        told["calls"] += 1
        return bool(shapes["latent"][0] != 3)

    context = stand_in(
        trt.IExecutionContext,
        set_optimization_profile_async=lambda profile, stream: told["profiles"].append(profile) or True,
        set_input_shape=lambda name, shape: (
            shapes.update({name: shape, "velocity": shapes.get("latent")}) or True
        ),
        get_tensor_shape=lambda name: shapes["latent"] if name == "velocity" else shapes[name],
        set_tensor_address=lambda name, memory: told["addresses"].add(memory) or True,
        execute_async_v3=execute,
    )
    inspector = stand_in(trt.EngineInspector, get_engine_information=json.dumps({"Layers": TEN}))
    engine = stand_in(
        trt.ICudaEngine,
        num_io_tensors=3,
        get_tensor_name=lambda index: names[index],
        get_tensor_dtype=lambda name: dtypes[name],
        create_execution_context=context,
        create_engine_inspector=inspector,
    )
    runtime = stand_in(trt.Runtime, deserialize_cuda_engine=engine)
    trt.Runtime = lambda logger: runtime
    trt.init_libnvinfer_plugins = lambda logger, namespace: True
    settings = {"component": "mmdit", "precision": "fp8", "runtime": "tensorrt", "profiles": PROFILES}
    manifest = Manifest(kind="engine", checkpoint="one", made_from={}, settings=settings, versions={})
    with whole(folder / "mmdit-fp8", manifest) as partial:
        (partial / "model.plan").write_bytes(b"a plan")
    job = Job(folder=folder / "mmdit-fp8", rows=(1,), layers=folder / "layers.json", device="cpu")
    found: dict[str, Any] = {"lines": list(measured(job))}
    found |= {"profiles": told["profiles"], "addresses": len(told["addresses"]), "calls": told["calls"]}
    found["inspected"] = inspector.execution_context is context
    try:
        list(measured(job.model_copy(update={"rows": (3,)})))
    except EngineError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    assert BINDINGS, "TensorRT's bindings are not installed: run `make setup`"
    folder = tmp_path_factory.mktemp("tensorrt")
    code = (
        f"import sys; from pathlib import Path; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from mmdit import artifact; import test_measure_check\n"
        f"artifact._HASHES = Path({str(folder)!r}, '.sha256.json')\n"
        f"test_measure_check.run_scenarios(Path({str(folder)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_plan_is_timed_at_each_point_with_names_that_tensorrt_has(told: dict[str, Any]) -> None:
    """Usual shapes of both profiles, and one row in the second; every tensor has an address of its own."""
    rows = [(line["profile"], line["shapes"]["latent"][0]) for line in told["lines"][:-1]]
    assert rows == [(0, 2), (1, 1), (1, 4)] and told["profiles"][:3] == [0, 1, 1]
    assert all(line["milliseconds"]["median"] > 0 for line in told["lines"][:-1])
    assert told["calls"] >= 3 * 8


def test_a_plans_layers_are_inspected_at_known_shapes(told: dict[str, Any]) -> None:
    assert told["inspected"] and told["lines"][-1]["summary"]["attention_fused"] == {"fp16": 1}
    assert told["lines"][-1]["plan_bytes"] == len("a plan")


def test_a_call_that_tensorrt_refuses_ends_with_its_component(told: dict[str, Any]) -> None:
    assert "mmdit" in told["refused"] and "refused the call" in told["refused"]
