"""The costs of SD3.5's real geometry, from graphs without weights, for the tables of docs/engines.md.

    python -m tests.benchmarks.costs build/medium build/large

Reads each folder's ONNX files, FP16 and FP8; writes docs/measurements/costs-<model>.json and
docs/roofline.png, and prints the tables.
"""

import argparse
from pathlib import Path

from engines.model_costs import ModelCosts, model_costs, read_costs, sizes_planned, write_costs
from engines.planner import SHAPE_SETS, fits_table
from engines.roofline import SIZES
from engines.roofline_chart import draw_ceilings
from engines.roofline_tables import bounds_table, flops_table, gains_table
from engines.source import sources
from mmdit.artifact import Layout, shown
from mmdit.contract import Precision
from mmdit.errors import run_command
from mmdit.gpus import CARDS
from mmdit.shapes import shape_set

DOCS = Path(__file__).resolve().parents[2] / "docs"
MODELS = ("medium", "large")
TABLES = {
    "What fits": fits_table,
    "Where the FLOPs are": flops_table,
    "Lower bounds per step": bounds_table,
    "The ceiling of FP8's gain": gains_table,
}


def published() -> list[ModelCosts]:
    """The costs that are kept in docs/measurements."""
    return [read_costs(DOCS / "measurements" / f"costs-{model}.json") for model in MODELS]


def main() -> None:
    """Compute, write and print."""
    parser = argparse.ArgumentParser(description="The costs of SD3.5's real geometry, and their tables.")
    parser.add_argument("folders", type=Path, nargs="*", help="build folders of the models; none: only print")
    for folder in parser.parse_args().folders:
        layout = Layout(folder.name, folder.parent)
        fp16, family = sources(layout, folder.name, Precision.FP16)
        fp8, _ = sources(layout, folder.name, Precision.FP8)
        planned = {size for name in SHAPE_SETS for size in sizes_planned(shape_set(family, name))}
        wide, (reference,) = fp8, [source for source in fp16 if source.component == "mmdit"]
        found = model_costs(wide, family, sorted({*SIZES, *planned}))
        entries = found.entries + model_costs([reference], family, SIZES).entries
        path = DOCS / "measurements" / f"costs-{family.variant}.json"
        write_costs(ModelCosts(family=family, entries=entries), path)
        print(shown(path))
    models = published()
    draw_ceilings(models, CARDS[0], DOCS / "roofline.png")
    for title, make in TABLES.items():
        print(f"\n## {title}\n\n{make(models)}")


if __name__ == "__main__":
    run_command(main)
