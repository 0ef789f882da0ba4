"""The calibration prompt set, and how much of it to run."""

import csv
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmdit.artifact import sha256
from mmdit.errors import QuantizationError
from mmdit.family import VAE_SCALE, Family

PROMPTS = Path(__file__).with_name("calibration_prompts.tsv")
# The overflow scan's settings. Few prompts: every operation is measured, and a safety factor stands for those
# left out. Small batches: explicit attention at 1024² holds 3 GB of FP32 scores a row for SD3.5 Large.
SCAN = {"prompts": 8, "steps": 4, "batch": 2}


class CalibrationSettings(BaseModel):
    """How much to calibrate. `sizes`, (height, width) in pixels, take turns; seeds count up from `seed`."""

    model_config = ConfigDict(frozen=True)

    prompts: int = Field(default=128, ge=1)
    steps: int = Field(default=8, ge=2)
    batch: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)
    sizes: tuple[tuple[int, int], ...]
    guidance_scale: float

    @classmethod
    def for_family(cls, family: Family, **given: Any) -> "CalibrationSettings":
        """The defaults for a family, with what was `given` in their place.

        Without guidance in the family's defaults, the negative prompt's rows are calibrated too.
        """
        values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        scale = family.guidance_scale if family.guidance_scale > 1 else 2.0
        try:
            settings = cls(**{"sizes": ((family.default_size,) * 2,), "guidance_scale": scale, **values})
        except ValidationError as error:
            wrong = error.errors()[0]
            raise QuantizationError(
                f"calibration {wrong['loc'][0]} cannot be {wrong['input']}: {wrong['msg']}"
            ) from None
        for size in settings.sizes:
            if any(
                side % family.size_multiple or not 0 < side <= family.max_latent * VAE_SCALE for side in size
            ):
                raise QuantizationError(
                    f"calibration size {size[0]}x{size[1]} cannot be: expected multiples of "
                    f"{family.size_multiple}, at most {family.max_latent * VAE_SCALE}"
                )
        available = len(calibration_prompts())
        if settings.prompts > available:
            raise QuantizationError(
                f"{settings.prompts} calibration prompts were asked for, but {PROMPTS.name} has {available}"
            )
        return settings


def calibration_prompts() -> list[tuple[str, str]]:
    """The project's (prompt, negative prompt) pairs."""
    with PROMPTS.open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        return [(prompt, negative) for prompt, negative in rows]


def calibrated_for(checkpoint: str, policy: str, family: Family) -> dict[str, Any]:
    """What a calibration must be made for, to be used: hashes of checkpoint, quantizers and prompts."""
    return {
        "checkpoint": checkpoint,
        "policy": policy,
        "prompts_sha256": sha256(PROMPTS),
        "t5_tokens": family.t5_tokens,
    }
