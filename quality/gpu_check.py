"""What gpu-check last found about a model, for the report: its verdict and the start of its table.

`docs/measurements/DATE-gpu-check-GPU-MODEL.json` is the record, the .md of that name the page with the table.
"""

import html
import json
from pathlib import Path

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


def summary(page: Path) -> str:
    """As HTML: the page's name, the date, the GPU, the verdict, and the first rows of its first table."""
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    verdict = f"{'kept' if found['kept'] else 'none kept'}: {found['verdict']}" if found["verdict"] else ""
    told = f"{found['date']}, {found['machine'].get('gpu')}: {verdict or 'no verdict on FP8'}."
    table = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = []
    for line, kind in zip(table[: 1 + _ROWS], ["th", *["td"] * _ROWS], strict=False):
        cells = (html.escape(cell.strip()) for cell in line.strip("|").split("|"))
        rows.append("<tr>" + "".join(f"<{kind}>{cell}" for cell in cells))
    return (
        f"<p>{html.escape(told)}</p><div class=wide><table>{''.join(rows)}</table></div>"
        f"<p class=note>All of it: docs/measurements/{html.escape(page.name)}, of that day's engines.</p>"
    )
