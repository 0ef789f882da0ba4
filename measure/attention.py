"""The two FP8 MMDiTs that differ in attention's products, in FP16 or in FP8, and which of them is kept.

Both are made in the same places of `build/<model>`. The one that is not in place lies whole beside them, so
that neither is made twice. A crash between two moves leaves a list of those still to do (`bring`).
"""

import json
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from engines.source import MODEL
from export.policy import AttentionPrecision, Policy
from mmdit.artifact import Layout, read_manifest, shown
from mmdit.contract import Precision
from mmdit.errors import ArtifactError

VARIANTS = tuple(each.value for each in (AttentionPrecision.FP16, AttentionPrecision.FP8))


class Candidate(BaseModel):
    """An FP8 engine: milliseconds of a step, and whether it was built, passed the gate and is accurate."""

    model_config = ConfigDict(frozen=True)

    attention: str
    milliseconds: float | None
    passed: bool
    reason: str = ""


def chosen(candidates: list[Candidate]) -> tuple[Candidate | None, str]:
    """The fastest that passed, and why; None where none did."""
    good = [each for each in candidates if each.passed and each.milliseconds is not None]
    if not good:
        told = "; ".join(f"attention in {each.attention}: {each.reason}" for each in candidates)
        return None, f"no FP8 engine passed ({told})"
    best = min(good, key=lambda each: each.milliseconds or 0)
    others = [each for each in candidates if each != best]
    told = "; ".join(
        f"attention in {each.attention} "
        + (f"took {each.milliseconds:.2f} ms" if each in good else f"is out: {each.reason}")
        for each in others
    )
    return (
        best,
        f"attention in {best.attention}: {best.milliseconds:.2f} ms a step, gate and outputs passed; {told}",
    )


def policy_text(attention: str, own: Policy | None) -> str:
    """A policy file with attention's products as given on every target, and the rules of the user's own."""
    lines = ["# Written by gpu-check.", "[attention]", f'default = "{attention}"']
    lines += [
        f"{json.dumps(name)} = {json.dumps(attention)}"
        for name in (own.attention if own else {})
        if name != "default"
    ]
    for rule in own.rules if own else ():
        lines += ["", "[[rule]]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in rule.model_dump(mode="json").items()]
    return "\n".join(lines) + "\n"


def bring(layout: Layout, target: str, attention: str) -> None:
    """Put the files of a variant in their places, where they were made before; keep those of the other.

    What an earlier call was stopped in is finished first: the moves still to do lie in a file of their own.
    """
    journal, brought = (store(layout, target) / name for name in ("moves.json", "brought.json"))
    if journal.exists():
        _carry_out(journal)
    current = _current(layout, brought)
    moves = []
    for folder in _folders(layout, target) if current != attention else ():
        kept = {
            variant: store(layout, target) / f"attention-{variant}" / folder.relative_to(layout.root)
            for variant in VARIANTS
        }
        if current and folder.exists():
            moves.append((folder, kept[current]))
        if kept[attention].exists():
            moves.append((kept[attention], folder))
    _write(journal, [[str(path.absolute()) for path in move] for move in moves])
    _carry_out(journal)
    _write(brought, attention)


def _current(layout: Layout, brought: Path) -> str | None:
    """Whose files are in place: as the FP8 file says, or, where it was not finished, who was brought last."""
    try:
        return str(read_manifest(layout.onnx("mmdit", Precision.FP8)).settings["attention"])
    except ArtifactError:
        return str(json.loads(brought.read_text(encoding="utf-8"))) if brought.exists() else None


def _carry_out(journal: Path) -> None:
    """Do the moves, first to last; a source that is gone was moved before the list could say so."""
    moves = json.loads(journal.read_text(encoding="utf-8"))
    while moves:
        source, place = map(Path, moves[0])
        if source.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            source.rename(place)
        moves = moves[1:]
        _write(journal, moves)
    journal.unlink()


def _write(path: Path, content: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)


def _folders(layout: Layout, target: str) -> list[Path]:
    return [
        layout.calibration,
        layout.onnx("mmdit", Precision.FP8),
        layout.engine(target, "mmdit", Precision.FP8),
        layout.quality(target),
    ]


def check_whole(layout: Layout, target: str, attention: str) -> None:
    """Raise ArtifactError unless what is in place is of one variant, each made from the one before it.

    The manifests say so: calibration → FP8 file → engine → gate.
    """
    calibration, onnx, engine, gate = (read_manifest(folder) for folder in _folders(layout, target))
    engine_files = {f"mmdit-{Precision.FP8.value}/{name}": value for name, value in engine.files.items()}
    model = {name: value for name, value in onnx.files.items() if name.startswith(MODEL)}
    wrong = [
        what
        for what, holds in (
            ("the FP8 file's attention", onnx.settings["attention"] == attention),
            ("the FP8 file", calibration.files.items() <= onnx.made_from.items()),
            ("the engine", model.items() <= engine.made_from.items()),
            ("the gate", engine_files.items() <= gate.made_from.items()),
        )
        if not holds
    ]
    if wrong:
        policy = shown(policy_file(layout, target, attention))
        raise ArtifactError(
            f"{shown(layout.root)}: {', '.join(wrong)} is not of the variant with attention in {attention} "
            "that was brought back; it is remade by "
            f"`make gate MODEL={layout.model} TARGET={target} POLICY={policy}`"
        )


def policy_file(layout: Layout, target: str, attention: str) -> Path:
    """Where the policy of a variant lies."""
    return store(layout, target) / f"attention-{attention}.toml"


def store(layout: Layout, target: str) -> Path:
    """Where gpu-check keeps its policies, and the variant that is not in place."""
    return layout.root / "gpu-check" / target
