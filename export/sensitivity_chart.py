"""The sensitivity study as a picture: the groups ranked by damage, and what each would gain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FP8, _WEIGHTS, _OTHER = "#1f77b4", "#e6a23c", "0.55"


def draw_sensitivity(
    title: str, groups: Sequence[dict[str, Any]], sets: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draw horizontal bars of the velocity's error, the worst at the top, on a log axis, as PNG.

    `groups` and `sets` as in `sensitivity.json`; a dot is 1 − mean SSIM, the text beside it the
    shares of all FLOPs and of the linear layers' weights that FP8 takes over.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = [*sets, *groups]
    figure = Figure(figsize=(7.0, 1.7 + 0.34 * len(bars)), dpi=100)
    axes = figure.subplots()
    places = [*range(len(sets)), *(len(sets) + 0.5 + index for index in range(len(groups)))]
    errors = [max(entry["damage"]["velocity_error"], 1e-6) for entry in bars]
    losses = [max(1 - entry["damage"]["mean_ssim"], 1e-6) for entry in bars]
    colours = [_OTHER] * len(sets)
    colours += [_WEIGHTS if entry["precision"] == "fp8-weights" else _FP8 for entry in groups]
    axes.barh(places, errors, color=colours, height=0.68)
    axes.plot(losses, places, "o", color="black", markersize=4.5)
    low, high = min(*errors, *losses) / 2, max(*errors, *losses) * 1.5
    axes.set(
        xscale="log", xlim=(low, high), xlabel="bars: relative error of the velocity; dots: 1 − mean SSIM"
    )
    axes.set_yticks(places, [entry["name"] for entry in bars], fontsize=10)
    axes.invert_yaxis()
    for place, entry in zip(places, bars, strict=True):
        axes.text(1.02, place, _gain(entry), transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.text(
        1.02,
        -1.0,
        "in FP8, of all\nFLOPs · weights",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        fontsize=9,
    )
    axes.grid(axis="x", which="major", color="0.88")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, fontsize=11, loc="left", pad=34)
    axes.legend(
        handles=[
            Patch(color=_FP8, label="FP8"),
            Patch(color=_WEIGHTS, label="FP8 weights only"),
            Patch(color=_OTHER, label="together"),
        ],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
    )
    figure.savefig(path, bbox_inches="tight")


def _gain(entry: dict[str, Any]) -> str:
    return f"{_percent(entry['flops_share'])} · {_percent(entry['weights_share'])}"


def _percent(share: float) -> str:
    return (
        "< 0.1 %"
        if 0 < share < 0.0005
        else f"{100 * share:.1f} %"
        if share < 0.0995
        else f"{100 * share:.0f} %"
    )
