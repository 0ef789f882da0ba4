"""The two FP8 MMDiTs that differ in attention's products, in FP16 or in FP8, and which of them is kept.

Both are made in the same places of `build/<model>`. The one that is not in place lies whole beside them, so
that neither is made twice.
"""

import json
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from export.policy import AttentionPrecision, Policy
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import ArtifactError

VARIANTS = tuple(each.value for each in (AttentionPrecision.FP16, AttentionPrecision.FP8))


class Candidate(BaseModel):
    """An FP8 engine that was measured: milliseconds of a step, and what the gate said."""

    model_config = ConfigDict(frozen=True)

    attention: str
    milliseconds: float | None
    passed: bool
    reason: str = ""


def chosen(candidates: list[Candidate]) -> tuple[Candidate | None, str]:
    """The fastest that passes the gate, and why; None where none does."""
    good = [each for each in candidates if each.passed and each.milliseconds is not None]
    if not good:
        told = "; ".join(f"attention in {each.attention}: {each.reason}" for each in candidates)
        return None, f"no FP8 engine passed the gate ({told})"
    best = min(good, key=lambda each: each.milliseconds or 0)
    others = [each for each in candidates if each != best]
    told = "; ".join(
        f"attention in {each.attention} "
        + (f"took {each.milliseconds:.2f} ms" if each in good else f"is out: {each.reason}")
        for each in others
    )
    return best, f"attention in {best.attention}: {best.milliseconds:.2f} ms a step, the gate passed; {told}"


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
    """Put the files of a variant in their places, where they were made before; keep those of the other."""
    try:
        current = read_manifest(layout.onnx("mmdit", Precision.FP8)).settings["attention"]
    except ArtifactError:
        return  # nothing is in place
    if current == attention:
        return
    folders = [
        layout.calibration,
        layout.onnx("mmdit", Precision.FP8),
        layout.engine(target, "mmdit", Precision.FP8),
        layout.quality(target),
    ]
    aside = store(layout, target)
    for folder in folders:
        for variant, move_out in ((current, True), (attention, False)):
            kept = aside / f"attention-{variant}" / folder.relative_to(layout.root)
            source, place = (folder, kept) if move_out else (kept, folder)
            if source.exists():
                shutil.rmtree(place, ignore_errors=True)
                place.parent.mkdir(parents=True, exist_ok=True)
                source.rename(place)


def store(layout: Layout, target: str) -> Path:
    """Where gpu-check keeps its policies, and the variant that is not in place."""
    return layout.root / "gpu-check" / target
