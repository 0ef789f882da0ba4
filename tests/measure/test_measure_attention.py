"""The two FP8 variants: which is kept, and that none is mixed with the other."""

import json
from pathlib import Path
from typing import Any

import pytest
from measure_samples import made

from export.policy import AttentionPrecision, Policy, Rule, read_policy
from measure.attention import Candidate, _write, bring, check_whole, chosen, policy_text
from mmdit.artifact import Layout, Manifest, read_manifest, whole
from mmdit.contract import Precision
from mmdit.errors import ArtifactError


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
