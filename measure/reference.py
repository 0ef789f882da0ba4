"""A floor to beat without TensorRT: the MMDiT in torch on this machine's GPU, part by part.

Each part, one model in one variant, is a process of its own: its memory is returned, and a crash or a lack
of memory becomes a row that says so. What is finished is on disk after each row; a second run goes on there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.child import Ended, lines
from measure.part import Part
from measure.record import opened, save
from mmdit.artifact import shown
from mmdit.errors import TargetError
from mmdit.target import find_gpu


@dataclass(frozen=True)
class Asked:
    """What to measure; `minutes` is the most that a part may take."""

    models: Sequence[str]
    variants: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    device: str
    toy: bool
    again: bool
    minutes: float
    folder: Path


def reference(asked: Asked, command: str) -> Path:
    """Measure what is asked for and not measured yet; returns the record's path.

    Raises TargetError where torch has no GPU.
    """
    record, path = opened(asked.folder, "gpu-reference", machine(asked.device), command)
    for part in _parts(asked):
        left = part if asked.again else record.missing(part)
        height, width = part.size
        name = f"{part.model} {part.variant} {height}×{width}"
        if left is None:
            print(f"{name}: measured before")
            continue
        print(f"{name}: measuring {', '.join(map(str, left.rows))} rows", flush=True)
        for row in rows_of(left, asked.minutes):
            record.put(part, row)
            save(record, path)
            print(f"  {told(row)}", flush=True)
    print(f"{shown(path)}\n{shown(path.with_suffix('.md'))}")
    return path


def _parts(asked: Asked) -> Iterator[Part]:
    for size in asked.sizes:
        for model in asked.models:
            for variant in asked.variants:
                yield Part(
                    model=model,
                    variant=variant,
                    size=size,
                    rows=tuple(asked.rows),
                    device=asked.device,
                    toy=asked.toy,
                )


def machine(device: str) -> dict[str, str | None]:
    """The GPU and the versions that torch reports, and the driver.

    Raises TargetError where torch is not there or has no GPU.
    """
    try:
        (found,) = lines("measure.part", minutes=10, advice="does `nvidia-smi` answer?")
    except Ended as error:
        raise TargetError(
            f"torch, diffusers and modelopt cannot be imported ({error}): `make setup`, or "
            "`pip install torch diffusers nvidia-modelopt`"
        ) from None
    if device == "cpu":
        return found | {"gpu": None, "driver": None}
    if found["gpu"] is None:
        raise TargetError(
            f"torch {found['torch']} finds no CUDA GPU: run it where an NVIDIA GPU, its driver and torch's "
            "CUDA build are; `python -m measure reference --device cpu --toy` only tries the command"
        )
    gpu = find_gpu()
    return found | {"driver": gpu.driver if gpu else None}


def rows_of(part: Part, minutes: float) -> Iterator[dict[str, Any]]:
    """Run a part in a child process and yield its rows; those that it did not come to yield an error."""
    waiting = sorted(part.rows)
    try:
        advice = "run it again, torch keeps what it compiled"
        for row in lines("measure.part", part.model_dump_json(), minutes=minutes, advice=advice):
            waiting.remove(row["rows"])
            yield row
    except Ended as error:
        yield from ({"rows": rows, "error": str(error)} for rows in waiting)


def told(row: dict[str, Any]) -> str:
    """A row as a line to print."""
    if "error" in row:
        return f"{row['rows']} rows: {row['error']}"
    memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
    note = f" ({row['note']})" if "note" in row else ""
    return f"{row['rows']} rows: {row['milliseconds']:,.1f} ms{memory}{note}"
