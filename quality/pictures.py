"""The pictures of the report: three precisions side by side, with maps of what differs."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pages.picture import data_uri

MOST = 16  # prompts on the page, the worst first
_GAINS = (100, 50, 20, 10, 5, 2, 1)

Picture = npt.NDArray[np.uint8]


def pictures(
    entries: list[dict[str, Any]], folder: Path
) -> tuple[list[tuple[dict[str, Any], dict[str, str]]], int]:
    """Entries with the sources of their pictures and difference maps, and how much those are amplified.

    The least alike and the flawed come first; a source is a data URI by what its picture shows.
    """
    chosen = sorted(entries, key=lambda each: (not each["flaws"]["fp8"], each["fp8"]["ssim"]))[:MOST]
    made = [{name: _opened(folder / file) for name, file in each["files"].items()} for each in chosen]
    differences = [
        (_difference(each["fp8"], each["fp16"]), _difference(each["fp16"], each["fp32"])) for each in made
    ]
    gain = _gain([fp8 for fp8, _ in differences])
    rows = []
    for entry, each, (fp8, floor) in zip(chosen, made, differences, strict=True):
        shown = {
            "FP32": each["fp32"],
            "FP16": each["fp16"],
            "FP8": each["fp8"],
            "difference of FP8 and FP16": _amplified(fp8, gain),
            "difference of FP16 and FP32": _amplified(floor, gain),
        }
        rows.append((entry, {name: data_uri(picture) for name, picture in shown.items()}))
    return rows, gain


def _opened(path: Path) -> Picture:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _difference(one: Picture, other: Picture) -> Picture:
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).astype(np.uint8)


def _gain(differences: list[Picture]) -> int:
    """The largest amplification that leaves 99.5 % of the values as they are, the same for all pictures."""
    usual = max(1.0, float(np.percentile(np.stack(differences), 99.5)))
    return next((gain for gain in _GAINS if gain * usual <= 255), 1)


def _amplified(difference: Picture, gain: int) -> Picture:
    return np.clip(difference.astype(int) * gain, 0, 255).astype(np.uint8)
