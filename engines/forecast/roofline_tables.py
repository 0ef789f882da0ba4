"""The roofline as tables: where the FLOPs are, and the lower bounds per step on each known GPU."""

from collections.abc import Iterable, Sequence

from engines.forecast.model_costs import ModelCosts
from engines.forecast.roofline import FP8, FP8_ATTENTION, FP16, SIZES, bound
from engines.table import table
from mmdit.contract import COMPONENTS, Precision
from mmdit.gpus import CARDS, GB, Card
from mmdit.shapes import Size

_SIZE: Size = (1024, 1024)


def flops_table(models: Iterable[ModelCosts], size: Size = _SIZE) -> str:
    """FLOPs and bytes of one row of each component, the MMDiT's in both precisions."""
    rows = []
    for model in models:
        for component in COMPONENTS:
            for precision in (Precision.FP16, Precision.FP8) if component == "mmdit" else (Precision.FP16,):
                row = model.at(component, size, precision)
                fp8 = sum(products.flops for products in row.products if products.kind == "fp8")
                rows.append(
                    (
                        model.family.name,
                        component,
                        precision.value,
                        f"{row.flops / 1e12:.3f}",
                        f"{100 * row.attention_flops / row.flops:.0f} %",
                        f"{100 * fp8 / row.flops:.0f} %",
                        f"{row.weights_read / GB:.2f}",
                        f"{row.activations / GB:.2f}",
                    )
                )
    return table(
        (
            *("model", "component", "precision", "TFLOP a row", "in attention", "in FP8"),
            *("weights read, GB", "activations, GB"),
        ),
        rows,
    )


def bounds_table(models: Iterable[ModelCosts], size: Size = _SIZE) -> str:
    """The least milliseconds of a step and of a picture on each known GPU."""
    rows = []
    for model in models:
        for card in CARDS:
            found = [bound(model, card, variant, size) for variant in (FP16, FP8, FP8_ATTENTION)]
            steps = (f"{each.step:.1f}" for each in found)
            pictures = (f"{each.picture / 1e3:.2f}" for each in found)
            rest = (f"{found[0].text_encoders:.1f}", f"{found[0].vae_decoder:.1f}")
            rows.append((model.family.name, card.name, *steps, *rest, *pictures))
    return table(
        (
            *("model", "GPU", "step FP16, ms", "FP8", "FP8, attention too", "text encoders", "VAE"),
            *("picture FP16, s", "FP8", "FP8, attention too"),
        ),
        rows,
    )


def gains_table(models: Iterable[ModelCosts], sizes: Sequence[Size] = SIZES, card: Card = CARDS[0]) -> str:
    """The most that FP8 can gain over FP16 in a step on a GPU, by size."""
    rows = []
    for model in models:
        for variant in (FP8, FP8_ATTENTION):
            gains = (f"{bound(model, card, variant, size).gain:.2f}" for size in sizes)
            rows.append((model.family.name, "FP8" if variant.fp8_attention else "FP16", *gains))
    header = (f"{height}×{width}" for height, width in sizes)
    return table(("model", "attention in", *header), rows)
