"""NVIDIA's perf_analyzer as the load generator: fetched once, asked for clients or for arrivals.

tritonclient's wheels carried the program up to 2.51; two libraries that it needs lie in nvidia-pytriton's.
Percentiles are computed from its own record of every request.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdit.artifact import BUILD
from mmdit.errors import ServerError

_WHEEL = "tritonclient==2.51.0"
_PROGRAM = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
_LIBRARIES = ("libb64.so.0d", "libcudart.so.12")
_LIMIT = 900  # seconds of one run


@dataclass(frozen=True)
class Load:
    """What a run found: begins and ends of its requests in seconds, in the order of their begins."""

    begins: np.ndarray
    ends: np.ndarray

    @property
    def latencies(self) -> np.ndarray:
        """Seconds."""
        return self.ends - self.begins

    @property
    def pictures_per_second(self) -> float:
        """While every client still had another request: up to the last one's begin."""
        last = self.begins[-1]
        early = int((self.ends <= last).sum())
        if not early:  # as many requests as clients
            return len(self.ends) / float(self.ends.max() - self.begins[0])
        return early / float(np.sort(self.ends)[early - 1] - self.begins[0])

    def percentile(self, share: float) -> float:
        """Of latencies, in seconds."""
        return float(np.percentile(self.latencies, share))


def program(folder: Path = BUILD / "tools") -> tuple[Path, dict[str, str]]:
    """perf_analyzer and the environment that it needs; downloads it when it is not there.

    Raises ServerError when it cannot be had.
    """
    path = folder / "perf_analyzer"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _fetch(Path(temporary), path)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError("nvidia-pytriton is not installed: run `make setup`")
    libraries = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
    for name in _LIBRARIES:
        stem, _, version = name.partition(".so.")
        found = sorted(libraries.glob(f"{stem}-*.so.{version}*"))
        if not found:
            raise ServerError(f"{libraries} holds no {name}, which perf_analyzer needs")
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(found[0])
    return path, {"LD_LIBRARY_PATH": f"{folder}:{libraries}"}


def _fetch(folder: Path, path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "-d", str(folder), _WHEEL], capture_output=True, text=True)
    if done.returncode:
        raise ServerError(f"{_WHEEL}, which carries perf_analyzer, cannot be had: {done.stderr.strip()}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (folder / "program").write_bytes(wheel.read(_PROGRAM))
    (folder / "program").chmod(0o755)
    (folder / "program").rename(path)


class LoadGenerator:
    """Asks the `text_to_image` of a server for pictures: each request the next of `requests`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._program, self._environment = program()

    def clients(self, count: int, requests: Sequence[dict[str, Any]]) -> Load:
        """`count` clients, each of which asks for a picture once it has its last."""
        return self._run(requests, "--concurrency-range", str(count))

    def arrivals(self, gaps: Sequence[float], requests: Sequence[dict[str, Any]]) -> Load:
        """A request after each gap (seconds), whatever of the earlier ones is answered."""
        with tempfile.NamedTemporaryFile("w") as stream:
            stream.writelines(f"{round(1e6 * gap)}\n" for gap in gaps)
            stream.flush()
            return self._run(requests, "--request-intervals", stream.name, "--async")

    def _run(self, requests: Sequence[dict[str, Any]], *how: str) -> Load:
        """Raises ServerError when it fails, or a request did."""
        data = [
            {name: {"content": [value], "shape": [1]} for name, value in request.items()}
            for request in requests
        ]
        with tempfile.TemporaryDirectory() as folder:
            wanted, found = Path(folder) / "requests.json", Path(folder) / "found.json"
            wanted.write_text(json.dumps({"data": data}))
            done = subprocess.run(
                [str(self._program), "-m", "text_to_image", "-i", "grpc", "-u", self.url, *how]
                + ["--input-data", str(wanted), "--request-count", str(len(requests))]
                + ["--profile-export-file", str(found)],
                capture_output=True,
                text=True,
                timeout=_LIMIT,
                env=os.environ | self._environment,
            )
            if done.returncode:
                reason = (done.stderr or done.stdout).strip().splitlines()
                raise ServerError(f"perf_analyzer ended with {done.returncode}: {reason[:1]}")
            (experiment,) = json.loads(found.read_text())["experiments"]
        return load_from(experiment["requests"], len(requests))


def load_from(record: Sequence[dict[str, Any]], expected: int) -> Load:
    """The record of a run as perf_analyzer exports it, times in ns.

    Raises ServerError unless every request was answered and had a prompt of its own, which no cache knows.
    """
    prompts = {each["request_inputs"]["prompt"] for each in record}
    answered = [each for each in record if each["response_timestamps"]]
    if not len(prompts) == len(answered) == expected:
        raise ServerError(
            f"{len(answered)} of {expected} requests were answered, of {len(prompts)} prompts: expected all, "
            "and each of its own"
        )
    ordered = sorted(answered, key=lambda each: each["timestamp"])
    begins = np.array([each["timestamp"] for each in ordered], np.int64)
    ends = np.array([each["response_timestamps"][-1] for each in ordered], np.int64)
    return Load((begins - begins[0]) / 1e9, (ends - begins[0]) / 1e9)
