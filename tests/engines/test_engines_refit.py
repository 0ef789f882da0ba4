"""Weights back into a stripped plan: through stand-ins of both versions' classes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorrt_stand_in import SHAPES, VERSIONS, Stage, real_bindings, told_by
from tiny_model import FAMILY, SIGNATURES, save_source, tiny_graph

import engines.tensorrt.plan_from_onnx as plan_module
import engines.tensorrt.refit as refit_module
from engines.engine import STRIPPED, Build, engine
from engines.source import Source
from engines.tensorrt.options import Options
from engines.tensorrt.refit import plan_from_stripped, refit
from mmdit import artifact
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import ArtifactError, EngineError
from mmdit.target import Gpu, Target

TENSORRT = "11.4.0.106"
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "580.95")
HOPPER = Target("hopper", "tensorrt", (9, 0), fp8=True)


def clip_l(build: Path) -> Source:
    folder = Layout("tiny", build).onnx("clip_l")
    return Source("clip_l", Precision.FP16, folder, read_manifest(folder))


def run_scenarios(folder: Path) -> None:
    """In the child process: refit in several ways, print what TensorRT was told as JSON."""
    trt = real_bindings(folder)
    found: dict[str, Any] = {"version": trt.__version__}
    save_source(folder, "clip_l")
    source = clip_l(folder)
    stripped, plan = folder / "stripped.plan", folder / "model.plan"
    stripped.write_bytes(b"a stripped plan")

    def full() -> Any:
        try:
            return plan_from_stripped(source, stripped, plan, SIGNATURES["clip_l"])
        except EngineError as error:
            return str(error)

    stage = Stage(trt, "clip_l", lambda: None)
    found["findings"] = full()
    found["plan"] = plan.read_text()
    found["loaded"] = [
        bytes(call.args[0]).decode() for call in stage.runtime.deserialize_cuda_engine.call_args_list
    ]
    found["weights of"] = stage.refit_parser.refit_from_file.call_args.args[0]
    found["onnx"] = str(source.onnx)
    config = stage.engine.create_serialization_config()
    found["cleared"] = [call.args[0].name for call in config.clear_flag.call_args_list]
    stage.refit_parser.refit_from_file.side_effect = lambda model: False
    found["do not fit"] = full()
    stage.refit_parser.refit_from_file.side_effect = lambda model: True
    stage.refitter.refit_cuda_engine.side_effect = lambda: False
    found["missing"] = full()
    print(json.dumps(found))


@pytest.fixture(scope="module", params=VERSIONS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_by(request.param, "test_engines_refit", tmp_path_factory.mktemp("tensorrt"))


def test_the_full_plan_holds_the_weights_of_the_onnx_file(told: dict[str, Any]) -> None:
    assert told["weights of"] == told["onnx"]
    assert told["cleared"] == ["EXCLUDE_WEIGHTS"]
    assert told["plan"] == "a full plan"


def test_the_full_plan_is_read_back_and_loaded(told: dict[str, Any]) -> None:
    assert told["loaded"] == ["a stripped plan", "a full plan"]
    assert told["findings"]["engine_bytes"] == len("a full plan")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("do not fit", "the weights of .*model.onnx do not fit: In node 3: weights of another size"),
        ("missing", r"model.onnx lacks the weights \['bias'\]"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_in_tensorrts_words(
    told: dict[str, Any], failure: str, words: str
) -> None:
    with pytest.raises(EngineError, match=f"^clip_l: TensorRT built no full plan: .*{words}"):
        raise EngineError(told[failure])


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Build]:
    """Builds and refits without a child process: plans of a few bytes."""
    monkeypatch.setattr(artifact, "_HASHES", tmp_path / ".sha256.json")
    save_source(tmp_path, "clip_l")

    def built(_component: str, function: Any, *arguments: Any, **_: Any) -> dict[str, object]:
        full = function is plan_from_stripped
        file = arguments[2] if full else arguments[1]
        file.write_bytes(b"a full plan" if full else b"a plan")
        return (
            {"engine_bytes": file.stat().st_size, "seconds_to_build": 1.0}
            if not full
            else {"engine_bytes": file.stat().st_size}
        )

    monkeypatch.setattr(plan_module, "in_child", built)
    monkeypatch.setattr(refit_module, "in_child", built)

    def made(strip: bool = False, gpu: Gpu | None = H100, tensorrt: str = TENSORRT) -> Build:
        target = (
            HOPPER if gpu else Target("hopper", "tensorrt", (9, 0), True, missing="no NVIDIA GPU was found")
        )
        return Build(Layout("tiny", tmp_path), FAMILY, SHAPES, target, Options(strip=strip), gpu, tensorrt)

    return made


def test_a_refitted_plan_says_what_it_was_made_from(build: Callable[..., Build], tmp_path: Path) -> None:
    plan = engine(clip_l(tmp_path), build(strip=True))
    stripped = read_manifest(plan.parent)
    assert stripped.settings["options"]["strip"] is True
    assert refit(clip_l(tmp_path), build()) == plan
    full = read_manifest(plan.parent)
    assert plan.read_bytes() == b"a full plan"
    assert full.made_from == stripped.made_from | {STRIPPED: stripped.files["model.plan"]}
    assert full.settings["options"]["strip"] is False
    assert full.findings["engine_bytes"] == len(b"a full plan")


def test_a_refitted_plan_is_as_good_as_one_built(
    build: Callable[..., Build], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packaging asks for the engines first: it must not build for an hour what was refitted in a minute."""
    engine(clip_l(tmp_path), build(strip=True))
    refit(clip_l(tmp_path), build())
    capsys.readouterr()
    plan = engine(clip_l(tmp_path), build())
    assert capsys.readouterr().out == "clip_l: up to date\n"
    refit(clip_l(tmp_path), build())
    assert capsys.readouterr().out == "clip_l: its plan has its weights\n"
    assert plan.read_bytes() == b"a full plan"
    engine(clip_l(tmp_path), build(strip=True))
    assert "clip_l: building" in capsys.readouterr().out


def test_the_weights_of_other_onnx_files_are_refused_and_the_stripped_plan_stays(
    build: Callable[..., Build], tmp_path: Path
) -> None:
    plan = engine(clip_l(tmp_path), build(strip=True))
    other = tiny_graph("clip_l")
    other.producer_name = "another exporter"
    save_source(tmp_path, "clip_l", model=other)
    with pytest.raises(
        ArtifactError, match="^clip_l: its stripped plan was not built from .*model.onnx differs"
    ):
        refit(clip_l(tmp_path), build())
    assert plan.read_bytes() == b"a plan"


def test_a_stripped_plan_of_another_machine_or_a_damaged_one_is_refused(
    build: Callable[..., Build], tmp_path: Path
) -> None:
    plan = engine(clip_l(tmp_path), build(strip=True))
    with pytest.raises(EngineError, match="built with TensorRT 11.4.0.106, and this machine has 10.13.3.9"):
        refit(clip_l(tmp_path), build(tensorrt="10.13.3.9"))
    ada = Gpu("NVIDIA L40S", (8, 9), "580.95")
    with pytest.raises(EngineError, match="built with compute capability 9.0, and this machine has 8.9"):
        refit(clip_l(tmp_path), build(gpu=ada))
    with pytest.raises(EngineError, match="needs the GPU and TensorRT: no NVIDIA GPU was found"):
        refit(clip_l(tmp_path), build(gpu=None))
    plan.write_bytes(b"half")
    with pytest.raises(ArtifactError, match="model.plan changed since it was built"):
        refit(clip_l(tmp_path), build())
