"""The layers that could be quantized, and the ranges of all their inputs, calibrated once for the study."""

from collections.abc import Mapping
from pathlib import Path

import export.quiet  # noqa: F401  isort: skip

from export.calibration import CALIBRATION_FILE, read_calibration, write_calibration
from export.policy import AttentionPrecision, LayerPrecision, Rule, calibration_digest
from export.prompts import PROMPTS, CalibrationSettings, calibrated_for
from export.remedies import Remedies
from export.trajectories import device
from mmdit.artifact import Manifest, sha256, versions, whole
from mmdit.code import code_of
from mmdit.family import Family

_ATTENTION = AttentionPrecision.FP8  # a candidate too


def candidate_rules(decisions: Mapping[str, Rule]) -> dict[str, Rule]:
    """Every linear outside FP32 islands, in FP8."""
    return {
        name: Rule(pattern=".*", precision=LayerPrecision.FP8, reason="candidate", group="candidate")
        for name, rule in decisions.items()
        if rule.precision is not LayerPrecision.FP32
    }


def ranges_manifest(
    family: Family,
    fingerprint: str,
    candidates: Mapping[str, Rule],
    remedies: Remedies,
    settings: CalibrationSettings,
) -> Manifest:
    """What the ranges are made from."""
    return Manifest(
        kind="calibration",
        checkpoint=fingerprint,
        made_from={PROMPTS.name: sha256(PROMPTS)},
        settings={
            "t5_tokens": family.t5_tokens,
            "device": device().type,
            "candidates": sorted(candidates),
            "remedies": remedies.model_dump(mode="json"),
            **settings.model_dump(mode="json"),
        },
        code=code_of(write_calibration),
        versions=versions("torch", "diffusers", "transformers", "nvidia-modelopt"),
    )


def candidate_ranges(
    family: Family,
    checkpoint: Path,
    manifest: Manifest,
    candidates: dict[str, Rule],
    remedies: Remedies,
    settings: CalibrationSettings,
    kept: Path,
) -> dict[str, float]:
    """Quantizer → the largest magnitude that it saw; from `kept` when the same calibration lies there.

    Raises QuantizationError for a tensor that is not finite.
    """
    saved = kept / "calibration"
    made_for = calibrated_for(manifest.checkpoint, calibration_digest(candidates, _ATTENTION), family)
    reason = manifest.reason_to_rebuild(saved)
    if reason is None:
        print("ranges of all candidates: up to date", flush=True)
    else:
        print(f"ranges of all candidates: calibrating ({reason})", flush=True)
        with whole(saved, manifest.model_copy(deep=True)) as partial:
            write_calibration(
                family,
                checkpoint,
                made_for,
                candidates,
                _ATTENTION,
                remedies,
                settings,
                partial,
            )
    return read_calibration(saved / CALIBRATION_FILE, made_for).amax
