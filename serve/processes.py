"""What Linux tells of a server's processes: which models they run, and the shared memory that they leave."""

import contextlib
import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def model_processes(session: int) -> dict[int, str]:
    """A session's Python backend processes → their models."""
    models = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not process.name.isdigit() or os.getsid(int(process.name)) != session:
                continue
            command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            for path in map(Path, command):
                if path.name == "model.py":
                    models[int(process.name)] = path.parent.parent.name
    return models


def regions(triton: int) -> set[Path]:
    """The files through which a Triton hands its models' processes their tensors; none once it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{triton}/maps").read_text().splitlines()
        return {Path(line.split()[-1]) for line in lines if f" {SHARED_MEMORY}/triton_python_" in line}
    return set()
