"""Whether the simulation tells the truth: the same engine in a real Triton server, and in simulated time.

    python -m bench.real_scheduling [--out FOLDER]

The miniature's packaged repository with stand-in engines: `mmdit` sleeps 20 ms and 2 ms for each row, the
others answer at once. Eight clients, two rows each; the step scheduler and one picture at a time take turns.
"""

import statistics
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

from bench import pages
from bench.curves import ONE, STEPS, SUB_LINEAR
from bench.perf_analyzer import Load, LoadGenerator
from bench.repositories import one_at_a_time, with_stand_ins
from bench.requests import requests
from bench.simulation import closed_loop
from mmdit.artifact import Layout, shown
from mmdit.contract import Precision
from mmdit.errors import run_command
from serve.launcher import running
from serve.ports import Ports

CLIENTS = 8


def measure(rounds: int, pictures: int) -> dict[str, list[Load]]:
    """The runs of each way to serve."""
    packaged = Layout("miniature").repository("cpu", Precision.FP16)
    numbers = count()
    found: dict[str, list[Load]] = {STEPS: [], ONE: []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps = with_stand_ins(packaged, folder / "steps", base_ms=20, row_ms=2)
        servers = {}
        for way, repository in ((STEPS, steps), (ONE, one_at_a_time(steps, folder / "one"))):
            ports = Ports.free()
            stack.enter_context(running(repository, ports, folder / f"{way}.log"))
            servers[way] = LoadGenerator(f"localhost:{ports.grpc}")
        for number in range(rounds + 1):
            for way, generator in servers.items():
                run = generator.clients(CLIENTS, requests([next(numbers) for _ in range(pictures)]))
                if number:
                    found[way].append(run)
    return found


def page_part(found: dict[str, list[Load]]) -> str:
    """Pictures a second and mean latency, measured and simulated."""
    rows = []
    rates = {}
    for way in (ONE, STEPS):
        simulated = closed_loop(CLIENTS, partial(SUB_LINEAR.serving, way))
        rates[way] = (
            statistics.median(run.pictures_per_second for run in found[way]),
            simulated.pictures_per_second,
        )
        latency = statistics.median(float(run.latencies.mean()) for run in found[way])
        rows.append(
            (
                way,
                *(f"{rate:.2f}" for rate in rates[way]),
                f"{latency:.2f}",
                f"{statistics.mean(simulated.latencies) / 1000:.2f}",
            )
        )
    ratios = (f"{mine / one:.2f}" for mine, one in zip(rates[STEPS], rates[ONE], strict=True))
    rows.append(("step scheduler over one at a time", *ratios, "", ""))
    heads = ("pictures/s, measured", "simulated", "mean latency, s, measured", "simulated")
    return pages.table([f"{SUB_LINEAR.name}, {CLIENTS} clients", *heads], rows)


def main() -> None:
    """Measure, print, write the page's part."""
    given = pages.arguments("The simulation beside a real server.").parse_args()
    found = measure(*((1, 24) if given.quick else (3, 80)))
    print(shown(pages.fill(given.out, "scheduling.md", {"real": page_part(found)})))


if __name__ == "__main__":
    run_command(main)
