"""The pages of docs/benchmarks: their tables are written by the benchmarks, the words between them by hand.

A table stands between `<!-- name -->` and `<!-- /name -->`. A run fills in its own, and leaves the others.
"""

import argparse
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mmdit.artifact import BUILD
from mmdit.errors import ArtifactError

PAGES = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def arguments(about: str) -> argparse.ArgumentParser:
    """What every benchmark takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--out", type=Path, default=BUILD / "benchmarks", help="folder of the pages and charts"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that it runs")
    return parser


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, its columns aligned; all but the first to the right."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def fill(folder: Path, page: str, parts: Mapping[str, str]) -> Path:
    """Write `parts` into the copy of a page that lies in `folder`; the first copy is that of docs/benchmarks.

    Prints them.
    Raises ArtifactError for a part that the page has no place for.
    """
    path = folder / page
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        shutil.copy(PAGES / page, path)
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(text):
            raise ArtifactError(f"{path} has no place <!-- {name} --> for what was measured")
        text = place.sub(lambda found, part=part: f"{found[1]}\n{part}\n\n{found[2]}", text)  # type: ignore[misc]
    path.write_text(text, encoding="utf-8")
    print("\n\n".join(parts.values()) + "\n")
    return path


def machine() -> str:
    """This machine in words, for measured tables."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    count = os.cpu_count()
    return (
        f"{count} CPU cores ({names[0] if names else platform.machine()}), no GPU, "
        f"Python {platform.python_version()}"
    )
