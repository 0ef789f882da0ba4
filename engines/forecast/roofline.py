"""Lower bounds: what a GPU's peaks allow, so that measured times have something to stand beside.

Each product takes the longer of its multiplications at the peak of its precision and of reading its weights
once; products run one after another. FP32 runs as TF32, at half of FP16's rate. Nothing else is counted:
neither norms, softmax and other pointwise work, nor activations, which a cache may hold. So no engine that
accumulates in FP32 is faster. The gain of FP8 is a ceiling, as long as what is not counted gains no more
than the products do: most of it is the same work in either precision.
"""

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from engines.forecast.costs import Costs, Kind
from engines.forecast.model_costs import ModelCosts
from mmdit.contract import TEXT_ENCODERS, Precision
from mmdit.gpus import CARDS, Card
from mmdit.shapes import Size
from mmdit.step_times import StepTimes

SIZES: tuple[Size, ...] = ((512, 512), (768, 768), (1024, 1024), (1536, 1536))
ROWS = (1, 2, 4, 8)


class Variant(BaseModel):
    """How the MMDiT runs: the precision of its file, and whether attention's products are FP8 besides."""

    model_config = ConfigDict(frozen=True)

    name: str
    precision: Precision
    fp8_attention: bool = False


FP16 = Variant(name="fp16", precision=Precision.FP16)
FP8 = Variant(name="fp8", precision=Precision.FP8)
FP8_ATTENTION = Variant(name="fp8, attention too", precision=Precision.FP8, fp8_attention=True)
VARIANTS = (FP16, FP8, FP8_ATTENTION)


class Bound(BaseModel):
    """The least milliseconds on a GPU: of a step, of the rest of a picture, and of a whole one.

    `rows` of a step are those of one request; `gain` is FP16's step over this one. `text_encoders` encode
    each prompt of the request by itself, as the server does.
    """

    model_config = ConfigDict(frozen=True)

    gpu: str
    model: str
    variant: str
    size: Size
    rows: int
    steps: int
    text_encoders: float
    step: float
    vae_decoder: float
    picture: float
    gain: float


def milliseconds(row: Costs, card: Card, rows: int = 1, *, fp8_attention: bool = False) -> float:
    """The least milliseconds of one call with `rows` rows of a component."""
    rates: dict[Kind, float] = {"fp8": card.fp8, "fp16": card.fp16, "fp32": card.fp16 / 2}
    return 1e3 * sum(
        max(
            rows * products.flops / rates["fp8" if fp8_attention and products.attention else products.kind],
            products.weight_bytes / card.bandwidth,
        )
        for products in row.products
    )


def step(model: ModelCosts, card: Card, variant: Variant, size: Size, rows: int) -> float:
    """The least milliseconds of one MMDiT call."""
    row = model.at("mmdit", size, variant.precision)
    return milliseconds(row, card, rows, fp8_attention=variant.fp8_attention)


def bound(model: ModelCosts, card: Card, variant: Variant, size: Size) -> Bound:
    """The lower bounds of one request, with guidance where the model's defaults have it."""
    family = model.family
    rows = 2 if family.guidance_scale > 1 else 1
    one_step = step(model, card, variant, size, rows)
    encoders = rows * sum(milliseconds(model.at(name, size), card) for name in TEXT_ENCODERS)
    decoder = milliseconds(model.at("vae_decoder", size), card)
    return Bound(
        gpu=card.name,
        model=family.name,
        variant=variant.name,
        size=size,
        rows=rows,
        steps=family.steps,
        text_encoders=encoders,
        step=one_step,
        vae_decoder=decoder,
        picture=encoders + family.steps * one_step + decoder,
        gain=step(model, card, FP16, size, rows) / one_step,
    )


def bounds(models: Iterable[ModelCosts], sizes: Sequence[Size] = SIZES) -> list[Bound]:
    """Every bound: of each model, size, known GPU and variant, in this order; `model_dump` gives JSON."""
    return [
        bound(model, card, variant, size)
        for model in models
        for size in sizes
        for card in CARDS
        for variant in VARIANTS
    ]


def step_times(model: ModelCosts, card: Card, variant: Variant, size: Size) -> StepTimes:
    """The lower bounds by rows, in the form that the serving benchmarks' stand-in engine reads."""
    return StepTimes(
        gpu=card.name,
        model=model.family.name,
        precision=variant.name,
        size=size,
        source="roofline",
        milliseconds={rows: round(step(model, card, variant, size, rows), 3) for rows in ROWS},
    )
