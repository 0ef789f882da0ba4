"""The step scheduler under load, simulated: the engine's curve decides whether sharing calls pays."""

import numpy as np
import pytest

from bench.simulation import Arrival, Curve, Served, poisson, serve
from engines.forecast.model_costs import published
from engines.forecast.roofline import FP8, step_times
from mmdit.gpus import CARDS
from serve.inside.batching import milliseconds_of, profitable_rows

SMALL, WIDE = (4, 4), (6, 4)


def sub_linear(rows: int) -> float:
    """A small model, or small pictures: 20 ms, and 2 ms for each row."""
    return 20 + 2 * rows


def linear(rows: int) -> float:
    """A large model at 1024²: the GPU is full with one request."""
    return 19.4 * rows


def large_at_1024(rows: int) -> float:
    """The roofline of SD3.5 Large on an H100, as a table of step times that a stand-in engine reads."""
    large = next(model for model in published() if model.family.variant == "large")
    times = step_times(large, CARDS[0], FP8, (1024, 1024))
    return milliseconds_of(times.milliseconds, rows)


def worth(curve: Curve, most: int = 16) -> int:
    return profitable_rows({rows: curve(rows) for rows in (1, 2, 4, 8, 16)}, most, gain=0.1)


def shared(curve: Curve):
    rows = worth(curve)
    return lambda size: rows


def alone(size):
    return 2


def clients(count: int, curve: Curve, rows, sizes=(SMALL,), calls: int = 2) -> Served:
    """Each client asks for ten pictures, one after the other."""
    left = 9 * count

    def again(now: float, ended: Arrival) -> Arrival | None:
        nonlocal left
        left -= 1
        return Arrival(at=now, size=ended.size) if left >= 0 else None

    first = [Arrival(at=0.01 * number, size=sizes[number % len(sizes)]) for number in range(count)]
    return serve(first, curve, rows, again=again, calls=calls)


def test_eight_clients_get_more_than_three_times_one_at_a_time():
    """Asked: 3.3 times, on the sub-linear curve."""
    together = clients(8, sub_linear, shared(sub_linear)).steps_per_second
    assert together >= 3.3 * clients(8, sub_linear, alone, calls=1).steps_per_second


def test_two_sizes_interleaved_keep_the_rows_of_their_calls():
    """Asked: 0.9 of the rows that each reaches alone."""
    mixed = clients(8, sub_linear, shared(sub_linear), sizes=(SMALL, WIDE))
    for size in (SMALL, WIDE):
        by_itself = clients(4, sub_linear, shared(sub_linear), sizes=(size,))
        assert mixed.rows_per_call(size) >= 0.9 * by_itself.rows_per_call(size)


def test_a_lone_client_is_not_slower():
    """It waits for nobody to join."""
    together = clients(1, sub_linear, shared(sub_linear)).latencies
    assert together == clients(1, sub_linear, alone, calls=1).latencies


def test_at_70_percent_load_the_slowest_twentieth_waits_less_than_half_as_long():
    """Load as a share of what one-at-a-time serving can do; requests come at random."""
    arrivals = poisson(0.7 * 1000 / (20 * sub_linear(2)), 400)
    together = serve(arrivals, sub_linear, shared(sub_linear)).latencies
    one = serve(arrivals, sub_linear, alone, calls=1).latencies
    assert np.percentile(together, 95) <= 0.5 * np.percentile(one, 95)


def test_large_at_1024_is_served_as_a_queue():
    """Its GPU is full with one request: another pair of rows saves less than a tenth."""
    assert worth(large_at_1024, most=8) == 1
    assert large_at_1024(2) == pytest.approx(39.6, abs=0.1)


@pytest.mark.parametrize("load", [0.5, 0.7, 0.9])
def test_where_rows_cost_their_full_price_requests_queue(load):
    """Asked: the mean latency of first come, first served, and 5 %. Sharing costs 24 to 60 %."""
    arrivals = poisson(load * 1000 / (20 * linear(2)), 400)
    queue = np.mean(serve(arrivals, linear, alone, calls=1).latencies)
    assert np.mean(serve(arrivals, linear, shared(linear)).latencies) <= 1.05 * queue
    assert np.mean(serve(arrivals, linear, lambda size: 16).latencies) >= 1.2 * queue


def short_steps(rows: int) -> float:
    """The roofline of SD3.5 Medium at 512² in FP8 on an H100: full with one request, 3 ms a step."""
    return 0.3 + 1.4 * rows


def test_where_steps_are_short_the_servers_own_work_hides_behind_the_engines():
    """At 16 clients and 2 ms of it at each step. In a strict queue the engine would rest in it."""

    def rate(**given):
        return serve([Arrival(at=0.0) for _ in range(16)], short_steps, alone, **given).pictures_per_second

    assert rate(host_ms=2.0) >= 0.97 * rate()
    assert rate(host_ms=2.0, calls=1) <= 0.65 * rate()


@pytest.mark.parametrize("load", [0.3, 0.5, 0.55])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("curve", [short_steps, linear])
def test_nobody_waits_longer_for_it_in_the_mean(curve, rows, load):
    """Beside a strict queue, which can do 0.6 of the load that the engine could on short steps."""
    arrivals = poisson(load * 1000 / (20 * curve(2)), 400, rows=rows)
    queue, hidden = (
        np.mean(serve(arrivals, curve, alone, host_ms=2.0, calls=calls).latencies) for calls in (1, 2)
    )
    assert hidden <= 1.02 * queue


@pytest.mark.parametrize(
    ("milliseconds", "most", "rows"),
    [
        ({2: 24.0, 4: 28.0, 8: 36.0, 16: 52.0}, 16, 16),
        ({2: 24.0, 4: 28.0, 8: 36.0, 16: 52.0}, 7, 7),
        ({2: 38.8, 4: 77.6, 8: 155.2}, 8, 1),
        ({1: 30.0, 2: 38.8, 4: 77.6}, 8, 2),  # two requests without guidance share what one with it fills
        ({2: 24.0, 4: 28.0, 8: 76.0}, 8, 4),  # full at four rows
        ({2: 24.0, 4: 28.0}, 8, 8),  # beyond the table as at its end
        ({1: 38.0, 2: 39.0, 4: 78.0}, 1, 1),
        ({2: 24.0}, 8, 8),  # one point tells nothing
    ],
)
def test_the_rows_that_are_worth_it_follow_from_the_table_of_times(milliseconds, most, rows):
    """Until another pair of rows saves less than a tenth of what it takes alone; within the shape set."""
    assert profitable_rows(milliseconds, most, gain=0.1) == rows
