"""Where step batching pays: the real step scheduler and its peers over simulated engines.

    python -m bench.scheduling [--step-times FILE …] [--out FOLDER]

Simulated time: it takes minutes on any machine and gives the same figures on all. Without measured tables
SD3.5's are the roofline's lower bounds.
"""

import argparse
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from bench import pages
from bench.curves import (
    LINEAR,
    ONE,
    PAIR,
    STEPS,
    SUB_LINEAR,
    UNTOLD,
    WHOLE,
    EngineCurve,
    measured,
    priced,
    roofline,
)
from bench.simulation import Arrival, Served, closed_loop, poisson
from mmdit.artifact import shown
from mmdit.errors import run_command

POLICIES = (ONE, WHOLE, STEPS, UNTOLD)
LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9)
BEYOND = (1.0, 1.25, 1.5)  # of what one at a time can do
FAR_BEYOND = (2.0, 2.5, 3.0, 3.5, 4.0)
CLIENTS = (1, 2, 4, 8, 16)
PRICES = tuple(step / 20 for step in range(21))
OWN_WORK = (1.0, 2.0)  # ms of the server's at each step
KEEPS_UP = 0.95  # of the requests that come, in the same time


@dataclass(frozen=True)
class Point:
    """A policy under a load of requests at random: medians over seeds.

    `throughput` in what one-at-a-time serving can do, latencies in seconds.
    """

    curve: EngineCurve
    policy: str
    load: float
    throughput: float
    mean: float
    p95: float

    @property
    def keeps_up(self) -> bool:
        """Whether requests are served as fast as they come; else latencies only tell how long the run was."""
        return self.throughput >= KEEPS_UP * self.load


def at_load(curve: EngineCurve, load: float, count: int, seed: int) -> list[Arrival]:
    """`count` requests at random, spread so that this very sample has the load."""
    arrivals = poisson(load / curve.alone, count, seed, steps=curve.steps)
    stretch = 1000 * count * curve.alone / load / arrivals[-1].at
    return [replace(each, at=each.at * stretch) for each in arrivals]


def point(curve: EngineCurve, policy: str, load: float, seeds: int, count: int) -> Point:
    """Serve `count` requests that come at random at a `load`, for each of the seeds."""
    runs = []
    for seed in range(seeds):
        served = curve.serving(policy, at_load(curve, load, count, seed))
        latencies = np.array(served.latencies) / 1000
        runs.append(
            (served.pictures_per_second * curve.alone, latencies.mean(), np.percentile(latencies, 95))
        )
    return Point(
        curve, policy, load, *(statistics.median(map(float, each)) for each in zip(*runs, strict=True))
    )


def points(curves: Sequence[EngineCurve], loads: Sequence[float], seeds: int, count: int) -> list[Point]:
    """Every policy at every load, over all curves; each process takes some.

    Where all rows are worth sharing the step scheduler does the same without a table.
    """
    found: dict[tuple[EngineCurve, str, float], Point] = {}
    wanted = [
        (curve, policy, load, seeds, count)
        for curve in curves
        for policy in POLICIES
        if policy != UNTOLD or curve.worth < curve.most
        for load in loads
    ]
    with ProcessPoolExecutor() as processes:
        for each in processes.map(point, *zip(*wanted, strict=True)):
            found[each.curve, each.policy, each.load] = each
    for curve, load in product(curves, loads):
        found.setdefault((curve, UNTOLD, load), replace(found[curve, STEPS, load], policy=UNTOLD))
    return [found[each] for each in product(curves, POLICIES, loads)]


def most(curve: EngineCurve, policy: str, **given: float) -> float:
    """The most throughput, in what one-at-a-time serving can do: sixteen clients that never rest."""
    served = closed_loop(16, partial(curve.serving, policy, **given), steps=curve.steps)
    return served.pictures_per_second * curve.alone


def asked_and_found() -> list[tuple[str, str, str]]:
    """What the step scheduler should reach, and what it does: tests/serve/test_serve_load.py holds it."""
    curve = SUB_LINEAR

    def eight(policy: str, **given: object) -> Served:
        return closed_loop(8, partial(curve.serving, policy), **given)  # type: ignore[arg-type]

    gain = eight(STEPS).steps_per_second / eight(ONE).steps_per_second
    sizes = ((4, 4), (6, 4))
    mixed = eight(STEPS, sizes=sizes)
    rows = min(
        mixed.rows_per_call(size)
        / closed_loop(4, partial(curve.serving, STEPS), sizes=(size,)).rows_per_call(size)
        for size in sizes
    )
    lone = [
        statistics.mean(closed_loop(1, partial(curve.serving, policy)).latencies) for policy in (STEPS, ONE)
    ]

    def latencies(curve: EngineCurve, policy: str, load: float) -> list[float]:
        return curve.serving(policy, poisson(load / curve.alone, 400)).latencies

    p95 = [np.percentile(latencies(curve, policy, 0.7), 95) for policy in (STEPS, ONE)]
    means = [
        np.mean(latencies(LINEAR, STEPS, load)) / np.mean(latencies(LINEAR, ONE, load))
        for load in (0.5, 0.7, 0.9)
    ]
    return [
        (f"{curve.name}: 8 clients, throughput over one at a time", "≥ 3.3", f"{gain:.2f}"),
        (f"{curve.name}: two sizes in turns, rows a call over each alone", "≥ 0.9", f"{rows:.2f}"),
        (f"{curve.name}: a lone client's latency over one at a time", "≤ 1.00", f"{lone[0] / lone[1]:.2f}"),
        (f"{curve.name}: p95 at 70 % load over one at a time", "≤ 0.50", f"{p95[0] / p95[1]:.2f}"),
        (
            f"{LINEAR.name}: mean latency over one at a time, at 50, 70, 90 % load",
            "≤ 1.05",
            f"{max(means):.2f}",
        ),
    ]


def clients_table(curve: EngineCurve) -> str:
    """Throughput and mean latency by the number of clients that ask one picture after the other."""

    def cells(policy: str, sizes: Sequence[tuple[int, int]] = ((4, 4),)) -> list[str]:
        runs = [
            closed_loop(count, partial(curve.serving, policy), sizes, curve.steps)
            for count in CLIENTS
            if count >= len(sizes)
        ]
        found = [
            f"{run.pictures_per_second * curve.alone:.2f}× {statistics.mean(run.latencies) / 1000:.2f} s"
            for run in runs
        ]
        return ["—"] * (len(CLIENTS) - len(found)) + found

    rows = [(policy, *cells(policy)) for policy in (ONE, WHOLE, STEPS)]
    rows += [(f"{policy}, two sizes", *cells(policy, ((4, 4), (6, 4)))) for policy in (WHOLE, STEPS)]
    return pages.table([f"{curve.name}: clients", *map(str, CLIENTS)], rows)


def load_table(found: Sequence[Point], curve: EngineCurve, loads: Sequence[float]) -> str:
    """Mean and p95 latency in seconds at some loads; a dash where a policy does not keep up."""
    table = {(each.policy, each.load): each for each in found if each.curve == curve}
    rows = []
    for policy in POLICIES:
        if policy == UNTOLD and curve.worth == curve.most:
            continue  # nothing to tell
        cells = []
        for load in loads:
            each = table[policy, load]
            cells.append(f"{each.mean:.2f} / {each.p95:.2f}" if each.keeps_up else "—")
        rows.append((policy, *cells))
    return pages.table([f"{curve.name}: load", *(f"{load:.0%}" for load in loads)], rows)


def engines_table(curves: Sequence[EngineCurve], found: Sequence[Point], load: float = 0.7) -> str:
    """For each engine what a second request costs, what sharing gains, and what it does to latencies."""
    table = {(each.curve.name, each.policy, each.load): each for each in found}
    rows = []
    for curve in curves:
        one, whole, steps, untold = (table[curve.name, policy, load] for policy in POLICIES)
        rows.append(
            (
                curve.name,
                f"{curve(PAIR):.1f} ms",
                f"{curve.price:.0%}",
                curve.worth,
                f"{most(curve, STEPS):.2f}",
                f"{most(curve, WHOLE):.2f}",
                f"{steps.mean / one.mean:.2f} / {steps.p95 / one.p95:.2f}",
                f"{whole.mean / one.mean:.2f} / {whole.p95 / one.p95:.2f}",
                f"{untold.mean / one.mean:.2f} / {untold.p95 / one.p95:.2f}",
            )
        )
    heads = (
        *("engine", "a step alone", "a second request costs", "rows shared", "throughput", "of batches"),
        *("mean / p95 at 70 %", "of batches", "without a table"),
    )
    return pages.table(heads, rows)


def own_work_table(curves: Sequence[EngineCurve]) -> str:
    """What throughput is left when the server's own work takes milliseconds at each step, at 16 clients."""
    rows = [
        (curve.name, f"{curve(PAIR):.1f} ms", *(f"{most(curve, STEPS, host_ms=own):.2f}" for own in OWN_WORK))
        for curve in curves
    ]
    return pages.table(["engine", "a step alone", *(f"{own:.0f} ms a step" for own in OWN_WORK)], rows)


def options() -> argparse.Namespace:
    """The command line."""
    parser = pages.arguments("Where step batching pays, simulated.")
    parser.add_argument(
        "--step-times",
        type=Path,
        action="append",
        default=[],
        help="a table that `make gpu-check` measured, in place of the roofline's; several may be given",
    )
    return parser.parse_args()


def main() -> None:
    """Simulate, print the tables, write the page and its charts."""
    from bench.scheduling_charts import draw_engines, draw_loads, draw_prices, drawn

    given = options()
    seeds, count = (1, 60) if given.quick else (5, 400)
    engines = [measured(path) for path in given.step_times] or roofline()
    stand_ins = [SUB_LINEAR, LINEAR]
    found = points([SUB_LINEAR], (*LOADS, *BEYOND, *FAR_BEYOND), seeds, count)
    found += points([LINEAR], (*LOADS, *BEYOND), seeds, count)
    for curve in engines:
        found += points([curve], LOADS if drawn(curve) else (0.7,), seeds, count)
    prices = [priced(price) for price in PRICES]
    priced_points = points(prices, (0.7,), seeds, count)
    asked = pages.table(["figure", "target", "measured"], asked_and_found())
    every = [*stand_ins, *engines]
    parts = {
        "asked": asked,
        "sub-linear": load_table(found, SUB_LINEAR, (0.2, 0.4, 0.7, 0.9, 1.5, 2.0, 3.0)),
        "linear": load_table(found, LINEAR, (0.2, 0.4, 0.6, 0.7, 0.8, 0.9)),
        "clients": clients_table(SUB_LINEAR),
        "engines": engines_table(every, found),
        "own work": own_work_table(every),
    }
    page = pages.fill(given.out, "scheduling.md", parts)
    bound = not given.step_times
    charts = [
        draw_prices(prices, priced_points, every, given.out / "scheduling-price.png", bound=bound),
        draw_loads(stand_ins, found, given.out / "scheduling-load.png"),
        draw_engines(engines, found, given.out / "scheduling-engines.png", bound=bound),
    ]
    for path in (page, *charts):
        print(shown(path))


if __name__ == "__main__":
    run_command(main)
