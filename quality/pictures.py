"""The pictures of the report: three precisions side by side, with maps of what differs."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

MOST = 16  # prompts on the page, the worst first
_OPEN = 6  # of them seen at once, the others behind a click
_PIXELS = 448  # of a picture on the page: larger ones are made smaller
_GAINS = (100, 50, 20, 10, 5, 2, 1)

Picture = npt.NDArray[np.uint8]


def picture_table(content: dict[str, Any], folder: Path) -> str:
    """Rows of FP32, FP16, FP8 and two difference maps; the least alike and the flawed first."""
    entries = sorted(content["pictures"], key=lambda each: (not each["flaws"]["fp8"], each["fp8"]["ssim"]))
    chosen = entries[:MOST]
    made = [{name: _opened(folder / file) for name, file in each["files"].items()} for each in chosen]
    differences = [
        {"fp8": _difference(each["fp8"], each["fp16"]), "floor": _difference(each["fp16"], each["fp32"])}
        for each in made
    ]
    gain = _gain([each["fp8"] for each in differences])
    head = (
        "<tr><th>prompt<th>FP32<th>FP16<th>FP8"
        f"<th>FP8 − FP16, ×{gain}<th>FP16 − FP32, ×{gain}<br><span class=note>the floor</span>"
    )
    rows = []
    for entry, pictures, difference in zip(chosen, made, differences, strict=True):
        maps = [np.clip(difference[pair].astype(int) * gain, 0, 255) for pair in ("fp8", "floor")]
        images = [pictures["fp32"], pictures["fp16"], pictures["fp8"], *(m.astype(np.uint8) for m in maps)]
        alts = ("FP32", "FP16", "FP8", "difference of FP8 and FP16", "difference of FP16 and FP32")
        cells = "".join(
            f'<td><img src="{_data_uri(image)}" alt="{alt}">' for image, alt in zip(images, alts, strict=True)
        )
        rows.append(f"<tr><td class=prompt>{_told(entry)}{cells}")
    told = (
        f"<p>The least alike first, from the same noise. Difference maps, amplified {gain} times: black "
        f"means equal. All {len(entries)} in full size: "
        f"<code>quality/{html.escape(content['target'])}/pictures</code>.</p>"
    )
    table = f"<table class=pictures>{head}{''.join(rows[:_OPEN])}</table>"
    if rest := rows[_OPEN:]:
        table += (
            f"<details><summary>The next {len(rest)}</summary><table class=pictures>{head}{''.join(rest)}"
            "</table></details>"
        )
    return told + table


def _told(entry: dict[str, Any]) -> str:
    lines = [html.escape(entry["prompt"])]
    if entry["negative_prompt"]:
        lines.append(f"<span class=note>not: {html.escape(entry['negative_prompt'])}</span>")
    figures = [
        f"SSIM {entry['fp8']['ssim']:.4f} <span class=note>(floor {entry['floor']['ssim']:.4f})</span>"
    ]
    figures.append(f"over objects {entry['fp8']['ssim_objects']:.4f}")
    figures.append(f"PSNR {entry['fp8']['psnr']:.1f} dB, seed {entry['seed']}")
    lines += figures
    lines += [f"<b class=bad>{name.upper()} is {flaw}</b>" for name, flaw in entry["flaws"].items() if flaw]
    read = entry.get("read", {})
    if read and read["fp8"] != read["fp16"]:
        lines.append(
            f"<b class=bad>FP8 shows {html.escape(read['fp8'])}</b>, FP16 {html.escape(read['fp16'])}"
        )
    return "<br>".join(lines)


def _opened(path: Path) -> Picture:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _difference(one: Picture, other: Picture) -> Picture:
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).astype(np.uint8)


def _gain(differences: list[Picture]) -> int:
    """The largest amplification that leaves 99.5 % of the values as they are, the same for all pictures."""
    usual = max(1.0, float(np.percentile(np.stack(differences), 99.5)))
    return next((gain for gain in _GAINS if gain * usual <= 255), 1)


def _data_uri(picture: Picture) -> str:
    image, stream = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    if max(image.size) > _PIXELS:
        image.thumbnail((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
        image.save(stream, format="JPEG", quality=90)
        kind = "jpeg"
    else:
        image.save(stream, format="PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
