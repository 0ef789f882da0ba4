"""A measurement in a process of its own, which says what it found in lines of JSON.

Its memory is returned when it ends, and what it said before a crash or the end of its time is kept.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


class Ended(Exception):
    """The process did not come to its end; says why, with the last line that it wrote to stderr."""


def lines(module: str, *arguments: str, minutes: float, advice: str) -> Iterator[dict[str, Any]]:
    """Run a module and yield each line of JSON that it prints, when it prints it.

    Raises Ended for an exit status other than 0, and, with `advice`, when it takes longer than `minutes`.
    """
    late = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            _command(module, *arguments),
            cwd=_ROOT,
            # CUDA numbers GPUs by speed unless told otherwise, NVML (which chose the GPU) by bus.
            env={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as child,
    ):

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(60 * minutes, stop)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            status = child.wait()
        finally:
            timer.cancel()
            child.kill()
        if late.is_set():
            raise Ended(f"not within {minutes:g} minutes: {advice}")
        if status:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise Ended(f"ended with status {status}: {last[:300]}")


def _command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
