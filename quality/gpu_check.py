"""What gpu-check last found about a model, for the report: its verdict and the start of its table.

`docs/measurements/DATE-gpu-check-GPU-MODEL.json` is the record, the .md of that name the page with the table.
"""

import json
from pathlib import Path
from typing import Any

_ROWS = 6  # of the table


def newest(folder: Path, model: str, target: str) -> Path | None:
    """The page of the newest record of a model for a target; None where there is none.

    Other records are passed over, also those that cannot be read.
    """
    for record in sorted(folder.glob("????-??-??-gpu-check-*.json"), reverse=True):
        page = record.with_suffix(".md")
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            if (found["model"], found["target"]) == (model, target) and page.is_file():
                return page
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def summary(page: Path) -> dict[str, Any]:
    """The page's name, the date, the GPU, the verdict, and the first rows of its first table, as cells."""
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    verdict = f"{'kept' if found['kept'] else 'none kept'}: {found['verdict']}"
    table = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {
        "page": page.name,
        "date": found["date"],
        "gpu": found["machine"].get("gpu"),
        "verdict": verdict if found["verdict"] else "no verdict on FP8",
        "rows": [[cell.strip() for cell in line.strip("|").split("|")] for line in table[: 1 + _ROWS]],
    }
