"""The ceiling of FP8's gain as a picture: by size, with attention in FP16 and in FP8."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.forecast.model_costs import ModelCosts
from engines.forecast.roofline import FP8, FP8_ATTENTION, SIZES, bound
from mmdit.gpus import Card

_COLOURS = ("#b5651d", "#1f77b4")


def draw_ceilings(models: Sequence[ModelCosts], card: Card, path: Path) -> None:
    """Draw the most that FP8 can gain over FP16 in a step on a GPU, for two models, as PNG.

    The lower gain comes first: its figures stand below its line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.2), dpi=100)
    axes = figure.subplots()
    places = range(len(SIZES))
    for model, colour, dashes, offset in zip(
        models, _COLOURS, ((0, (4, 4)), (4, (4, 4))), (-15, 7), strict=True
    ):
        gains = [bound(model, card, FP8, size).gain for size in SIZES]
        axes.plot(places, gains, color=colour, marker="o", markersize=4.5)
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": colour}
        for place, gain in zip(places, gains, strict=True):
            axes.annotate(f"{gain:.2f}", (place, gain), (0, offset), ha="center", **style)
        end = (places[-1], gains[-1])
        axes.annotate(f"{model.family.name},\nattention in FP16", end, (18, 0), va="center", **style)
        # The two lie on each other: their dashes take turns.
        gains = [bound(model, card, FP8_ATTENTION, size).gain for size in SIZES]
        axes.plot(places, gains, color=colour, linestyle=dashes)
    both = " and ".join(model.family.name for model in models)
    axes.annotate(
        f"{both},\nattention in FP8",
        (places[-1], gains[-1]),
        (18, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )
    axes.set_xticks(places, [f"{height}×{width}" for height, width in SIZES])
    axes.set(ylim=(1, 2.1), xlim=(-0.3, len(SIZES) - 0.75), ylabel="FP16's step over FP8's, at most")
    axes.grid(axis="y", color="0.88")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        f"SD3.5: the ceiling of FP8's gain, {card.name}: computed, not measured", fontsize=11, loc="left"
    )
    figure.savefig(path, bbox_inches="tight")
