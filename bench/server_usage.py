"""What a running server takes of its machine: memory, processes and threads, shared memory."""

import contextlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.processes import model_processes, regions

MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """Of Triton and its models' processes together; memory in bytes.

    `resident` by process (a model's name, or "triton"), without what it shares; `shared` is in /dev/shm.
    """

    resident: dict[str, int]
    processes: int
    threads: int
    shared: int

    @property
    def total(self) -> int:
        """Resident memory of all processes."""
        return sum(self.resident.values())

    def __str__(self) -> str:
        """One line of a report."""
        return (
            f"{self.total / MIB:.1f} MiB resident, {self.processes} processes, {self.threads} threads, "
            f"{self.shared / MIB:.1f} MiB of shared memory"
        )


def usage_of(server: Any) -> Usage:
    """A running server's usage at this moment."""
    triton = server._process.pid
    models = model_processes(triton)
    resident: dict[str, int] = {}
    processes = threads = 0
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it may end meanwhile
            if not process.name.isdigit() or os.getsid(int(process.name)) != triton:
                continue
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            name = models.get(int(process.name), "triton")
            own = sum(int(status[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile"))
            resident[name] = resident.get(name, 0) + own
            processes += 1
            threads += int(status["Threads"])
    shared = sum(region.stat().st_blocks * 512 for region in regions(triton) if region.exists())
    return Usage(resident, processes, threads, shared)


def requests_in_the_loop(server: Any) -> float:
    """The denoiser's own gauge."""
    with urllib.request.urlopen(f"http://localhost:{server.ports.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("denoiser_requests{"))
