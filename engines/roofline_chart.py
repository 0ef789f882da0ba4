"""The ceiling of FP8's gain as a picture: by size, with attention in FP16 and in FP8."""

from collections.abc import Sequence
from pathlib import Path

from engines.model_costs import ModelCosts
from engines.roofline import FP8, FP8_ATTENTION, SIZES, bound
from mmdit.gpus import Card

_COLOURS = ("#e6a23c", "#1f77b4")


def draw_ceilings(models: Sequence[ModelCosts], card: Card, path: Path) -> None:
    """Draw the most that FP8 can gain over FP16 in a step on a GPU, one colour for each model, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=100)
    axes = figure.subplots()
    places = range(len(SIZES))
    for model, colour in zip(models, _COLOURS, strict=False):
        name = model.family.name
        for variant, style, attention in ((FP8_ATTENTION, "--", "FP8"), (FP8, "-", "FP16")):
            gains = [bound(model, card, variant, size).gain for size in SIZES]
            label = f"{name}, attention in {attention}"
            axes.plot(places, gains, style, color=colour, marker="o", markersize=4.5, label=label)
            if not variant.fp8_attention:
                above = model is models[-1]
                for place, gain in zip(places, gains, strict=True):
                    axes.annotate(
                        f"{gain:.2f}",
                        (place, gain),
                        xytext=(0, 7 if above else -15),
                        textcoords="offset points",
                        ha="center",
                        fontsize=9,
                        color=colour,
                    )
    axes.set_xticks(places, [f"{height}×{width}" for height, width in SIZES])
    axes.set(ylim=(1, 2.1), xlim=(-0.3, len(SIZES) - 0.7), ylabel="FP16's step over FP8's, at most")
    axes.grid(axis="y", color="0.88")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"The ceiling of FP8's gain, {card.name}: computed, not measured", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, bbox_inches="tight")
