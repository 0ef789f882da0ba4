"""Plans built in real child processes, where TensorRT's builder is a stand-in that fails in every way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tensorrt_stand_in import SHAPES, bindings
from tiny_model import FAMILY, save_source

from engines.engine import Build, engine
from engines.source import Source
from engines.tensorrt.options import Options
from mmdit import artifact
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import ContractError, EngineError
from mmdit.shapes import ShapeSet, SizeRange
from mmdit.target import Gpu, Target

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "580.95")
HOPPER = Target("hopper", "tensorrt", (9, 0), fp8=True)
PLAN = b"plan" * 2**18
Attempt = Callable[..., Path]


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Builds CLIP-L's plan in a child process in which something goes wrong, or nothing."""
    bindings("11.4")
    pytest.importorskip("polygraphy")
    monkeypatch.setattr(artifact, "_HASHES", tmp_path / ".sha256.json")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "support/pretended"))
    folder = tmp_path / "build"
    save_source(folder, "clip_l")
    layout = Layout("tiny", folder)
    onnx = layout.onnx("clip_l")
    source = Source("clip_l", Precision.FP16, onnx, read_manifest(onnx))

    def built(what: str = "", shapes: ShapeSet = SHAPES, **options: object) -> Path:
        monkeypatch.setenv("PRETENDED", what)
        monkeypatch.setenv("PRETENDED_BUILD", str(layout.root / "engines"))
        build = Build(layout, FAMILY, shapes, HOPPER, Options(**options), H100, "11.4.0.106")  # type: ignore[arg-type]
        return engine(source, build)

    return built


def test_a_plan_comes_with_its_manifest_and_the_build_shows_its_progress(
    attempt: Attempt, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = attempt()
    assert plan.read_bytes() == PLAN
    manifest = read_manifest(plan.parent)
    assert sorted(path.name for path in plan.parent.iterdir()) == ["manifest.json", "model.plan"]
    assert manifest.findings["engine_bytes"] == len(PLAN)
    assert manifest.findings["gpu"] == H100.name
    assert manifest.settings["options"]["strip"] is False
    assert "clip_l: 100/100 %" in capfd.readouterr().err


def test_a_plan_that_is_there_is_not_built_again_and_other_options_build_another(
    attempt: Attempt, capfd: pytest.CaptureFixture[str]
) -> None:
    attempt()
    attempt("killed")
    assert "clip_l: up to date" in capfd.readouterr().out
    attempt(version_compatible=True)
    assert "clip_l: building (settings differ: options" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("killed", "died of SIGKILL: the machine's memory probably ran out"),
        ("crashed", "died of SIGSEGV: TensorRT or the GPU's driver crashed"),
        ("killed while it writes", "died of SIGXFSZ"),
        ("refused", r"implementation for node \{ForeignNode\[/cast.../add\]\}.*No kernel of this GPU does"),
        ("disk full", "No space left on device.*The disk is full"),
        ("file too large", "File too large.*The disk is full"),
        ("truncated afterwards", "model.plan holds 7 bytes, and 1048576 were built"),
    ],
)
def test_a_build_that_fails_says_why_and_leaves_the_earlier_plan(
    attempt: Attempt, what: str, words: str
) -> None:
    plan = attempt()
    before = read_manifest(plan.parent)
    with pytest.raises(EngineError, match=f"^clip_l: .*{words}[^\n]*$"):
        attempt(what, optimization_level=5)
    assert plan.read_bytes() == PLAN
    assert read_manifest(plan.parent) == before
    assert [path.name for path in plan.parent.parent.iterdir()] == [plan.parent.name]


def test_an_interrupted_build_leaves_the_earlier_plan(attempt: Attempt) -> None:
    plan = attempt()
    with pytest.raises(KeyboardInterrupt):
        attempt("interrupted", optimization_level=5)
    assert plan.read_bytes() == PLAN
    assert [path.name for path in plan.parent.parent.iterdir()] == [plan.parent.name]


RANGE = SizeRange(min=(64, 64), opt=(128, 128), max=(256, 256), max_rows=4)


@pytest.mark.parametrize(
    ("size_range", "words"),
    [
        ({"max": (512, 256)}, "64×64 to 512×256 pixels.*512 is more than the 256 that the position"),
        ({"min": (72, 64)}, "72×64 to 256×256 pixels.*72 is no multiple of 16"),
        ({"max_rows": 40}, "40 rows there are more than its budget of 2000 rows × tokens"),
    ],
)
def test_a_profile_outside_the_contract_is_refused_before_tensorrt_sees_it(
    attempt: Attempt, size_range: dict[str, object], words: str
) -> None:
    plan = attempt()
    outside = ShapeSet(
        name="custom", multiple=16, row_tokens=2000, ranges=(RANGE.model_copy(update=size_range),)
    )
    with pytest.raises(ContractError, match=f"^shape set 'custom': .*{words}"):
        attempt("killed", outside)
    assert plan.read_bytes() == PLAN


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"workspace_gib": 0.0}, "a workspace of 0.0 GiB holds nothing"),
        ({"optimization_level": 6}, "optimization level 6 is unknown: expected 0 to 5"),
    ],
)
def test_an_option_that_tensorrt_would_refuse_is_refused_when_it_is_made(
    wrong: dict[str, object], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        replace(Options(), **wrong)  # type: ignore[arg-type]
