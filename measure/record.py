"""What was measured on one GPU: rows in a JSON file of docs/measurements, and the table made from it."""

import datetime
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from measure.part import Part
from mmdit.artifact import shown
from mmdit.errors import ArtifactError, first_line
from mmdit.gpus import card_named
from mmdit.step_times import StepTimes, write
from pages import render

_KEY = ("model", "variant", "size", "rows")


class Record(BaseModel):
    """`machine`: GPU, driver and versions; `rows`: one entry for each model, variant, size and rows."""

    model_config = ConfigDict(extra="forbid")

    date: str
    command: str
    machine: dict[str, str | None]
    rows: list[dict[str, Any]] = []

    def missing(self, part: Part) -> Part | None:
        """What of a part is not measured yet; what failed before is tried again."""
        done = {_key(row) for row in self.rows if "milliseconds" in row}
        rows = tuple(rows for rows in part.rows if _key(_of(part, {"rows": rows})) not in done)
        return part.model_copy(update={"rows": rows}) if rows else None

    def put(self, part: Part, row: dict[str, Any]) -> None:
        """Add a part's row, in the place of an older one of the same key."""
        full = _of(part, row)
        self.rows = [each for each in self.rows if _key(each) != _key(full)] + [full]


def _of(part: Part, row: dict[str, Any]) -> dict[str, Any]:
    return {"model": part.model, "variant": part.variant, "size": list(part.size)} | row


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[field] for field in _KEY])


def opened(folder: Path, kind: str, machine: dict[str, str | None], command: str) -> tuple[Record, Path]:
    """The newest record of this machine with the same versions, to go on with; else one of today.

    Raises ArtifactError for a record that cannot be read.
    """
    name = f"{kind}-{slug(machine['gpu'] or 'cpu')}.json"
    for path in sorted(folder.glob(f"????-??-??-{name}"), reverse=True)[:1]:
        try:
            found = Record.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise ArtifactError(
                f"{shown(path)} cannot be read ({first_line(error)}): mend it or move it away"
            ) from None
        if found.machine == machine:
            return found, path
    today = datetime.date.today().isoformat()
    return Record(date=today, command=command, machine=machine), folder / f"{today}-{name}"


def slug(name: str) -> str:
    """A GPU's or model's name as part of a file's name: "NVIDIA H100 80GB HBM3" → "h100-80gb-hbm3"."""
    return "-".join(name.removeprefix("NVIDIA ").lower().replace("/", " ").replace(",", "").split())


def save(record: Record, path: Path) -> None:
    """Write the record, its table beside it, and a table of step times for each model, precision and size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    for times in step_times(record):
        height, width = times.size
        name = f"{path.stem}-{times.model}-{slug(times.precision)}-{height}x{width}.json"
        (path.parent / "step-times").mkdir(exist_ok=True)
        write(times, path.parent / "step-times" / name)


def step_times(record: Record) -> list[StepTimes]:
    """Of each model, precision and size the milliseconds by rows, of whichever variant was faster.

    Rows with a note are not what their variant says, and stay out, as does all that a CPU tried at toy size.
    """
    if not record.machine["gpu"]:
        return []
    best: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in record.rows:
        if "milliseconds" in row and "note" not in row:
            precision = row["variant"].partition("-")[2]
            table = best.setdefault((row["model"], precision, *row["size"]), {})
            table[row["rows"]] = min(row["milliseconds"], table.get(row["rows"], row["milliseconds"]))
    return [
        StepTimes(
            gpu=record.machine["gpu"],
            model=model,
            precision=f"{precision}, torch",
            size=(height, width),
            source="measured",
            milliseconds=dict(sorted(table.items())),
        )
        for (model, precision, height, width), table in sorted(best.items())
    ]


def peak_seconds(
    flops: dict[str, int], gpu: str | None, *, linears: str, attention: str = "fp16"
) -> float | None:
    """Seconds of the FLOPs at the card's dense peaks of fp8, or of 16 bits; None for a card not known."""
    card = card_named(gpu or "")
    if card is None:
        return None
    rates = {"fp8": card.fp8, "fp16": card.fp16, "bf16": card.fp16}
    return flops["linears"] / rates[linears] + flops["attention"] / rates[attention]


def page(record: Record) -> str:
    """The record as Markdown."""
    rows = sorted(record.rows, key=lambda row: (row["model"], row["size"], row["variant"], row["rows"]))
    return render(
        "reference.md.j2",
        record=record,
        machine=", ".join(f"{name} {value}" for name, value in record.machine.items() if value),
        rows=[_cells(row, record.machine["gpu"]) for row in rows],
    )


def _cells(row: dict[str, Any], gpu: str | None) -> list[str]:
    height, width = row["size"]
    cells = [row["model"], f"{height}×{width}", row["variant"], str(row["rows"])]
    if "milliseconds" not in row:
        return [*cells, "", "", "", "", "", row["error"]]
    seconds = row["milliseconds"] / 1000
    peak = peak_seconds(row["flops"], gpu, linears=row["variant"].partition("-")[2])
    memory = row["peak_bytes"]
    return [
        *cells,
        f"{row['milliseconds']:,.1f}",
        f"{row['min']:,.1f} to {row['max']:,.1f}",
        "" if memory is None else f"{memory / 1e9:.1f}",
        f"{sum(row['flops'].values()) / seconds / 1e12:,.1f}",
        "" if peak is None else f"{peak / seconds:.0%}",
        row.get("note", ""),
    ]
