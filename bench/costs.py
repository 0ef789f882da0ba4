"""The costs of SD3.5's real geometry, from graphs without weights, for docs/engines.md.

    python -m bench.graphs medium build       # and large
    python -m bench.costs build/medium build/large

Reads each folder's ONNX files; writes docs/measurements/costs-<model>.json and docs/roofline.png. The tables
are `make forecast`.
"""

import argparse
from pathlib import Path

from bench.roofline_chart import draw_ceilings
from engines.forecast.model_costs import costs_file, published, write_costs
from engines.forecast.page import costs_of
from mmdit.artifact import Layout, shown
from mmdit.errors import run_command
from mmdit.gpus import CARDS

CHART = Path(__file__).resolve().parents[1] / "docs/roofline.png"


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description="The costs of SD3.5's real geometry.")
    parser.add_argument("folders", type=Path, nargs="+", help="build folders of the models")
    for folder in parser.parse_args().folders:
        found = costs_of(Layout(folder.name, folder.parent))
        path = costs_file(found.family.variant)
        write_costs(found, path)
        print(shown(path))
    draw_ceilings(published(), CARDS[0], CHART)
    print(shown(CHART))


if __name__ == "__main__":
    run_command(main)
