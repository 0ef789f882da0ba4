"""A floor to beat without TensorRT: the MMDiT in torch on this machine's GPU, part by part.

Each part, one model in one variant, is a process of its own: its memory is returned, and a crash or a lack
of memory becomes a row that says so. What is finished is on disk after each row; a second run goes on there.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.part import Part
from measure.record import opened, save
from mmdit.artifact import shown
from mmdit.errors import TargetError
from mmdit.target import find_gpu

_ROOT = Path(__file__).resolve().parent.parent


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
    record, path = opened(asked.folder, "gpu-reference", _machine(asked.device), command)
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
            print(f"  {_told(row)}", flush=True)
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


def _machine(device: str) -> dict[str, str | None]:
    done = subprocess.run(
        _command(), cwd=_ROOT, env=_environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise TargetError(
            "torch, diffusers and modelopt cannot be imported (see above): `make setup`, or "
            "`pip install torch diffusers nvidia-modelopt`"
        )
    machine: dict[str, str | None] = json.loads(done.stdout)
    if device == "cpu":
        return machine | {"gpu": None, "driver": None}
    if machine["gpu"] is None:
        raise TargetError(
            f"torch {machine['torch']} finds no CUDA GPU: run it where an NVIDIA GPU, its driver and torch's "
            "CUDA build are; `--device cpu --toy` only tries the command"
        )
    gpu = find_gpu()
    return machine | {"driver": gpu.driver if gpu else None}


def rows_of(part: Part, minutes: float) -> Iterator[dict[str, Any]]:
    """Run a part in a child process and yield its rows; those that it did not come to yield an error."""
    waiting = list(sorted(part.rows))
    late = threading.Event()
    with tempfile.TemporaryFile("w+") as said, _child(part, said) as child:

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(60 * minutes, stop)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    row = json.loads(line)
                    waiting.remove(row["rows"])
                    yield row
            status = child.wait()
        finally:
            timer.cancel()
        if waiting:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
            why = (
                f"not within {minutes:g} minutes: run it again, torch keeps what it compiled"
                if late.is_set()
                else f"ended with status {status}: {last[:300]}"
            )
            for rows in waiting:
                yield {"rows": rows, "error": why}


@contextlib.contextmanager
def _child(part: Part, said: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        _command(part.model_dump_json()),
        cwd=_ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "measure.part", *arguments]


def _environment() -> dict[str, str]:
    # CUDA numbers GPUs by speed unless told otherwise, NVML (which is asked for the driver) by bus.
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ}


def _told(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['rows']} rows: {row['error']}"
    memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
    note = f" ({row['note']})" if "note" in row else ""
    return f"{row['rows']} rows: {row['milliseconds']:,.1f} ms{memory}{note}"
