"""`python -m serve launch` as a process, and what tests do to it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mmdit.artifact import Layout
from serve.ports import Ports

ROOT = Path(__file__).resolve().parents[2]


def launch(build: Layout, ports: Ports, *options: str) -> subprocess.Popen[str]:
    """The launcher over the FP8 repository."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "serve", "launch", "--target", "cpu"),
            *("--model", build.name, "--build", str(build.root.parent)),
            *("--grpc-port", str(ports.grpc), "--http-port", str(ports.http)),
            *("--metrics-port", str(ports.metrics), *options),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def launched(build: Layout, *options: str) -> Iterator[tuple[subprocess.Popen[str], Ports]]:
    """The launcher once its server is ready, killed at the end of the block if it still runs."""
    ports = Ports.free()
    process = launch(build, ports, *options)
    try:
        read_until(process, "Ctrl-C stops it")
        yield process, ports
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The process's output up to a line that holds `text`."""
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def server_of(process: subprocess.Popen[str]) -> int:
    """The launcher's Triton, which leads a session of its own."""
    (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(server)


def kill(word: str, session: int) -> None:
    """SIGKILL to the one process of a server's session whose command line holds the word."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and os.getsid(int(path.name)) == session:
                command = (path / "cmdline").read_bytes().decode(errors="replace")
                if word in command:
                    found.append(int(path.name))
    (victim,) = found
    os.kill(victim, signal.SIGKILL)
