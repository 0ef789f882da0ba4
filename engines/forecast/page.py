"""What can be computed about a model before anything is built: what fits where, and how fast it could be."""

from collections.abc import Sequence

from engines.forecast.model_costs import ModelCosts, model_costs, sizes_planned
from engines.forecast.planner import SHAPE_SETS, fits_table
from engines.forecast.roofline import SIZES
from engines.forecast.roofline_tables import bounds_table, flops_table, gains_table
from engines.source import sources
from mmdit.artifact import Layout
from mmdit.contract import Precision
from mmdit.errors import ContractError
from mmdit.family import VAE_SCALE
from mmdit.shapes import shape_set

TABLES = {
    "What fits": fits_table,
    "Where the FLOPs are": flops_table,
    "Lower bounds per step": bounds_table,
    "The ceiling of FP8's gain": gains_table,
}


LEGENDS = {
    "What fits": "* not served: T5 runs in FP16. close: above 85 % of the memory. no build: it could serve "
    "what it cannot build.\nBeside each GPU its memory. GB are 10^9 bytes. Computed, not measured.",
    "Where the FLOPs are": "One row of 1024×1024; a request with guidance is two.",
    "Lower bounds per step": "One request with guidance at 1024×1024; real engines are slower.",
    "The ceiling of FP8's gain": "FP16's step over FP8's, at most.",
}


def forecast(models: Sequence[ModelCosts]) -> str:
    """All tables, as docs/engines.md has them for SD3.5 Medium and Large; it explains more."""
    return "\n\n".join(f"{title}\n\n{make(models)}\n\n{LEGENDS[title]}" for title, make in TABLES.items())


def costs_of(layout: Layout) -> ModelCosts:
    """The costs of a model's ONNX files, FP16 and FP8, at all sizes that the tables have.

    Takes about half a minute at full size. Raises ArtifactError where a file is missing, ContractError for a
    model that is too small for pictures of 1536².
    """
    fp16, family = sources(layout, layout.model, Precision.FP16)
    limit, largest = family.max_latent * VAE_SCALE, max(max(size) for size in SIZES)
    if limit < largest:
        raise ContractError(
            f"{family.name} serves up to {limit} pixels, and the forecast goes up to {largest}: it is for "
            "models of SD3.5's size; `make forecast` without MODEL shows Medium and Large"
        )
    fp8, _ = sources(layout, layout.model, Precision.FP8)
    planned = {size for name in SHAPE_SETS for size in sizes_planned(shape_set(family, name))}
    reference = [source for source in fp16 if source.component == "mmdit"]
    found = model_costs(fp8, family, sorted({*SIZES, *planned}))
    return ModelCosts(family=family, entries=found.entries + model_costs(reference, family, SIZES).entries)
