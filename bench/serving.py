"""Served throughput and latency of the miniature, by clients and under requests at random.

    python -m bench.serving [--out FOLDER]

Three ways take turns: the step scheduler; the same server making one picture after the other, as the
published Triton examples serve diffusion; diffusers' pipeline in a loop. The pipeline has no clients: its
pictures are timed, and requests queue for them, first come first.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import export.quiet  # noqa: F401  isort: skip
import numpy as np

from bench import pages
from bench.curves import ONE, STEPS
from bench.lone import diffusers_pipeline, taken_in_turns
from bench.perf_analyzer import Load, LoadGenerator
from bench.repositories import one_at_a_time
from bench.requests import requests
from mmdit.artifact import Layout, shown
from mmdit.contract import Precision
from mmdit.errors import run_command
from mmdit.progress import Progress
from serve.launcher import running
from serve.ports import Ports

LOOP = "diffusers in a loop"
CLIENTS = (1, 2, 4, 8, 16)
LOADS = (0.5, 0.7, 0.9)
PERCENTILES = (50, 95, 99)

Found = dict[tuple[str, float], list[Load]]  # way, and clients or load → a run for each round


def queued(durations: Sequence[float], arrivals: Sequence[float]) -> Load:
    """Requests that come at `arrivals` (s) to one server whose pictures take `durations`, in turns."""
    ends = []
    free = 0.0
    for number, arrival in enumerate(arrivals):
        free = max(free, arrival) + durations[number % len(durations)]
        ends.append(free)
    return Load(np.array(arrivals), np.array(ends))


def looped(durations: Sequence[float], clients: int, pictures: int) -> Load:
    """The same for clients that ask again once they have their picture."""
    begins = [0.0] * clients
    ends: list[float] = []
    while len(ends) < pictures:
        start = ends[-1] if ends else 0.0
        ends.append(start + durations[len(ends) % len(durations)])
        begins.append(ends[-1])
    return Load(np.array(begins[:pictures]), np.array(ends))


def round_of_clients(
    servers: Mapping[str, LoadGenerator],
    durations: Sequence[float],
    fresh: Callable[[int], list[int]],
    quick: bool,
    bar: Progress,
) -> dict[tuple[str, float], Load]:
    """Every way with every number of clients, in turns."""
    found: dict[tuple[str, float], Load] = {}
    for clients in CLIENTS:
        pictures = clients + (4 if quick else max(8, 2 * clients))
        for way, generator in servers.items():
            found[way, clients] = generator.clients(clients, requests(fresh(pictures)))
            bar.advance()
        found[LOOP, clients] = looped(durations, clients, pictures)
    return found


def round_of_arrivals(
    servers: Mapping[str, LoadGenerator],
    durations: Sequence[float],
    fresh: Callable[[int], list[int]],
    capacity: float,
    seed: int,
    quick: bool,
    bar: Progress,
) -> dict[tuple[str, float], Load]:
    """Every way under the same arrivals, at each share of `capacity` (pictures/s)."""
    found: dict[tuple[str, float], Load] = {}
    pictures = 8 if quick else 50
    for load in LOADS:
        gaps = np.random.default_rng(seed).exponential(1, pictures)
        gaps *= pictures / gaps.sum() / (load * capacity)  # this very sample has the load
        for way, generator in servers.items():
            found[way, load] = generator.arrivals(gaps.tolist(), requests(fresh(pictures)))
            bar.advance()
        found[LOOP, load] = queued(durations, np.cumsum(gaps).tolist())
    return found


def measure(rounds: int, quick: bool) -> tuple[Found, Found]:
    """By clients and by load; each cell holds a run for each round."""
    numbers = count()

    def fresh(many: int) -> list[int]:
        return [next(numbers) for _ in range(many)]

    layout = Layout("miniature")
    packaged = layout.repository("cpu", Precision.FP16)
    clients: Found = {}
    loads: Found = {}
    make = diffusers_pipeline()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for way, repository in ((STEPS, packaged), (ONE, one_at_a_time(packaged, folder / "one"))):
            ports = Ports.free()
            log = layout.root / "triton" / f"bench-{way.replace(' ', '-')}.log"
            stack.enter_context(running(repository, ports, log))
            servers[way] = LoadGenerator(f"localhost:{ports.grpc}")
            servers[way].clients(2, requests(fresh(4)))  # warm
        rounds = 1 if quick else rounds
        runs = rounds * len(servers) * (len(CLIENTS) + len(LOADS))
        bar = stack.enter_context(Progress("under load", runs, "runs"))
        for seed in range(rounds):
            (durations,) = taken_in_turns({LOOP: make}, 3 if quick else 12).values()
            for key, load in round_of_clients(servers, durations, fresh, quick, bar).items():
                clients.setdefault(key, []).append(load)
            capacity = max(rate(clients[ONE, each]) for each in CLIENTS)
            under = round_of_arrivals(servers, durations, fresh, capacity, seed, quick, bar)
            for key, load in under.items():
                loads.setdefault(key, []).append(load)
    return clients, loads


def rate(runs: Sequence[Load]) -> float:
    """Pictures a second, the median of runs."""
    return statistics.median(run.pictures_per_second for run in runs)


def latency(runs: Sequence[Load], share: float) -> float:
    """A percentile of latency in seconds, the median of runs."""
    return statistics.median(run.percentile(share) for run in runs)


def found_table(found: Found, head: str, label: Callable[[float], str], *, rates: bool) -> str:
    """Percentiles of latency, and pictures a second, of each way in each cell; ratios to one at a time."""
    rows = []
    for cell in sorted({each for _, each in found}):
        for way in (LOOP, ONE, STEPS):
            runs, peer = found[way, cell], found[ONE, cell]
            row = [label(cell), way]
            if rates:
                row += [f"{rate(runs):.2f}", f"{rate(runs) / rate(peer):.2f}"]
            row += [f"{latency(runs, share):.2f}" for share in PERCENTILES]
            row.append(f"{latency(runs, 95) / latency(peer, 95):.2f}")
            rows.append(row)
    heads = [head, "served by", *(["pictures/s", "of one at a time"] if rates else [])]
    return pages.table([*heads, *(f"p{share}, s" for share in PERCENTILES), "p95 of one at a time's"], rows)


def summary(clients: Found, loads: Found) -> str:
    """The step scheduler's figures over those of its peers."""

    def against(found: Found, cell: float, peer: str, figure: Callable[[Sequence[Load]], float]) -> str:
        return f"{figure(found[STEPS, cell]) / figure(found[peer, cell]):.2f}"

    rows = [
        (
            f"pictures/s at {each} client{'s' * (each > 1)}",
            *(against(clients, each, peer, rate) for peer in (ONE, LOOP)),
        )
        for each in CLIENTS
    ]
    rows += [
        (
            f"p95 latency at {load:.0%} load",
            *(against(loads, load, peer, lambda runs: latency(runs, 95)) for peer in (ONE, LOOP)),
        )
        for load in LOADS
    ]
    return pages.table(["the miniature through the step scheduler", f"over {ONE}", f"over {LOOP}"], rows)


def main() -> None:
    """Measure, print, write the page's parts and the chart."""
    from bench.serving_chart import draw_serving

    parser = pages.arguments("Served throughput and latency of the miniature.")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken (default: 3)")
    given = parser.parse_args()
    clients, loads = measure(given.rounds, given.quick)
    parts = {
        "serving": summary(clients, loads),
        "clients": found_table(clients, "clients", str, rates=True),
        "arrivals": found_table(loads, "load", lambda load: f"{load:.0%}", rates=False),
        "machine": pages.machine(),
    }
    page = pages.fill(given.out, "serving.md", parts)
    print(shown(page))
    print(shown(draw_serving(clients, loads, given.out / "serving.png")))


if __name__ == "__main__":
    run_command(main)
