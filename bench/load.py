"""Mixed requests of many clients to one real server, each picture compared with that of the request alone.

    python -m bench.load --requests 2000 --clients 16 --repository build/miniature/repository/cpu-fp16

Sizes, steps, guidance, seeds, unary and streamed; one in ten is left at a random moment, one in twenty is
malformed. Starts the server, prints a report, and ends with status 1 when a well-formed request that nobody
left had no picture or another one, a malformed one was not refused by name, or the server grew.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.server_usage import MIB, Usage, requests_in_the_loop, usage_of
from mmdit.errors import ServerError, UnavailableError, run_command
from mmdit.progress import Progress
from serve.client import Client
from serve.launcher import Server, running
from serve.picture import Picture
from serve.ports import Ports

QUARTERS = 4
POOL = 60  # distinct requests
LEFT, MALFORMED = 0.1, 0.05  # shares
TRIES, PAUSE = 100, 0.1  # of a request that is refused because all places are taken; seconds
# Of the values of a picture, which the company in its calls may change (tests/serve/test_serve_pictures.py).
NEAR, SHARE = 2, 0.999
# One of the pool's pictures turns on a rounding: with company 98.95 to 99.11 % of its values, all within 6.
TURNS, TURNED = 8, 0.985
# What may come in the second half: a fresh server still grows a little, and its shared memory grows to what
# requests took when most of them met (MiB after each quarter of 2,000: 44, 49, 54, 55).
MORE_RESIDENT, MORE_THREADS, MORE_SHARED = 24 * MIB, 2, 8 * MIB
PROMPTS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue", "green")]

# What is wrong, and the name that the error has to tell.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps"),
    ({"steps": 100_000}, "steps"),
    ({"height": 120}, "height"),
    ({"width": 8192}, "size"),
    ({"seed": -1}, "seed"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_start": 0.9, "guidance_end": 0.1}, "guidance_start"),
    ({"negative_prompt": "x" * 9000, "guidance_scale": 4.5}, "negative_prompt"),
    ({"latents": np.full((16, 8, 8), np.inf, np.float32), "height": 64, "width": 64}, "latents"),
]


@dataclass(frozen=True)
class Ask:
    """One request of the load: `options` of the client's, and what becomes of it.

    `streamed`, or unary; `left`: the part of its steps, or of a second, after which its client leaves it;
    `wrong`: the name that its error has to tell.
    """

    options: dict[str, Any]
    alone: int  # the request of the pool that it is
    streamed: bool
    left: float | None = None
    wrong: str | None = None


def pool_of(random_: random.Random) -> list[dict[str, Any]]:
    """Distinct requests: 64 to 192 pixels, 1 to 8 steps, guidance on, off and in a part of the steps."""
    guidance: list[dict[str, Any]] = [
        {"guidance_scale": 4.5, "negative_prompt": "blurry"},
        {"guidance_scale": 7.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.5, "guidance_start": 0.25, "guidance_end": 0.75},
    ]
    return [
        {
            "prompt": random_.choice(PROMPTS),
            "seed": seed,
            "steps": random_.randint(1, 8),
            "height": 16 * random_.randint(4, 12),
            "width": 16 * random_.randint(4, 12),
            **random_.choice(guidance),
        }
        for seed in range(POOL)
    ]


def asks_of(pool: list[dict[str, Any]], count: int, random_: random.Random) -> list[Ask]:
    """`count` requests drawn from the pool."""
    asks = []
    for _ in range(count):
        alone, streamed, fate = random_.randrange(len(pool)), random_.random() < 0.5, random_.random()
        left, wrong, options = None, None, pool[alone]
        if fate < LEFT:
            left = random_.random()
        elif fate < LEFT + MALFORMED:
            given, wrong = random_.choice(WRONG)
            options = options | given
        asks.append(Ask(options, alone, streamed, left, wrong))
    return asks


@dataclass
class Report:
    """What became of a load: seconds of each answered request, what went wrong, the server by quarters."""

    answered: list[float] = field(default_factory=list)
    left: int = 0
    malformed: int = 0
    refused: int = 0  # and asked again
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    def check_growth(self) -> None:
        """Over the second half."""
        half, end = self.usages[QUARTERS // 2 - 1], self.usages[-1]
        for what, before, after, more in (
            ("bytes of resident memory", half.total, end.total, MORE_RESIDENT),
            ("processes", half.processes, end.processes, 0),
            ("threads", half.threads, end.threads, MORE_THREADS),
            ("bytes of shared memory", half.shared, end.shared, MORE_SHARED),
        ):
            if after > before + more:
                self.violations.append(f"{what} grew from {before} to {after} over the second half")

    def __str__(self) -> str:
        """For a reader."""
        middle, slow = np.percentile(self.answered, [50, 95]) if self.answered else (0.0, 0.0)
        quarters = "\n".join(f"  after quarter {n}: {usage}" for n, usage in enumerate(self.usages, 1))
        return (
            f"{len(self.answered)} answered, {self.left} left by their clients, {self.malformed} malformed "
            f"and refused, {self.refused} times asked again because all places were taken\n"
            f"{self.seconds:.0f} s, {len(self.answered) / self.seconds:.1f} pictures a second, latency "
            f"p50 {middle:.2f} s, p95 {slow:.2f} s\n{quarters}\n"
            f"{len(self.violations)} violations" + "".join(f"\n  {each}" for each in self.violations)
        )


class Load:
    """Clients that ask one server."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._url = f"localhost:{server.ports.grpc}"
        self._random = random.Random(seed)
        self._pool = pool_of(self._random)
        self._lock = threading.Lock()
        self.report = Report()

    def run(self, count: int, clients: int) -> Report:
        """Ask `count` times; first each request of the pool alone."""
        asks = asks_of(self._pool, count, self._random)
        with Client(self._url) as client:
            with Progress("alone", total=len(self._pool), unit="pictures") as progress:
                self._alone = []
                for request in self._pool:
                    self._alone.append(client.generate(**request).image)
                    progress.update(len(self._alone))
            begin = time.monotonic()
            with Progress("under load", total=count, unit="requests") as progress:
                done = 0
                for quarter in range(QUARTERS):
                    part = asks[count * quarter // QUARTERS : count * (quarter + 1) // QUARTERS]
                    with ThreadPoolExecutor(clients) as threads:
                        for _ in threads.map(lambda ask: self._ask(client, ask), part):
                            done += 1
                            progress.update(done)
                    self._settle()
                    self.report.usages.append(usage_of(self._server))
            self.report.seconds = time.monotonic() - begin
        self.report.check_growth()
        if failure := self._server.failure():
            self.report.violations.append(failure)
        return self.report

    def _settle(self) -> None:
        """Until what was left has ended too."""
        deadline = time.monotonic() + 30
        while requests_in_the_loop(self._server):
            if time.monotonic() > deadline:
                self.report.violations.append("requests are left in the denoiser 30 s after the last one")
                return
            time.sleep(0.2)

    def _ask(self, client: Client, ask: Ask) -> None:
        begin = time.monotonic()
        for _ in range(TRIES):
            try:
                if ask.left is not None:
                    leave(client, self._url, ask)
                    with self._lock:
                        self.report.left += 1
                    return
                image = picture(client, ask).image
            except UnavailableError:
                with self._lock:
                    self.report.refused += 1
                time.sleep(PAUSE)
                continue
            except ServerError as error:
                self._failed(ask, str(error))
            else:
                self._answered(ask, image, time.monotonic() - begin)
            return
        self._violation(ask, f"refused {TRIES} times")

    def _answered(self, ask: Ask, image: Any, seconds: float) -> None:
        alone = self._alone[ask.alone]
        if ask.wrong is not None:
            return self._violation(ask, "was not refused")
        if image.shape != alone.shape:
            return self._violation(ask, f"has shape {image.shape}")
        near = np.mean(np.abs(image.astype(int) - alone) <= NEAR)
        if near < (TURNED if ask.alone == TURNS else SHARE):
            return self._violation(ask, f"only {near:.2%} of the values are those of the picture alone")
        with self._lock:
            self.report.answered.append(seconds)

    def _failed(self, ask: Ask, message: str) -> None:
        if ask.wrong is None or ask.wrong not in message:
            return self._violation(ask, message)
        with self._lock:
            self.report.malformed += 1

    def _violation(self, ask: Ask, what: str) -> None:
        with self._lock:
            self.report.violations.append(f"{what}: {ask}")


def picture(client: Client, ask: Ask) -> Picture:
    """The picture of a request, unary or at its stream's end."""
    if not ask.streamed:
        return client.generate(**ask.options)
    *_, last = client.stream(**ask.options, preview_every=3)
    assert isinstance(last, Picture)
    return last


def leave(client: Client, url: str, ask: Ask) -> None:
    """Ask, and go: out of a stream after some of its steps; unary by a time-out, or with the connection."""
    assert ask.left is not None
    if ask.streamed:
        stream = client.stream(**ask.options)
        for _ in range(int(ask.left * ask.options["steps"])):
            next(stream)
        stream.close()
        return
    soon = 0.02 + ask.left / 2  # seconds
    try:
        if ask.options["seed"] % 2:
            client.generate(**ask.options, timeout=soon)
        else:
            with Client(url) as another:
                threading.Timer(soon, another.close).start()
                another.generate(**ask.options)
    except (ServerError, ValueError):  # a channel that is closed says so with a ValueError
        pass


def main() -> None:
    """Start a server, ask, print."""
    parser = argparse.ArgumentParser(description="Mixed requests of many clients to one server.")
    parser.add_argument("--repository", type=Path, default=Path("build/miniature/repository/cpu-fp16"))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(arguments.repository, Ports.free(), Path(folder) / "server.log") as server,
    ):
        report = Load(server, arguments.seed).run(arguments.requests, arguments.clients)
        print(report)
    sys.exit(bool(report.violations))


if __name__ == "__main__":
    run_command(main)
