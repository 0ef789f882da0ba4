"""Who goes first, who is ended, what is told of it: priorities, deadlines, guidance in part of the steps."""

import itertools
import threading
import time

import numpy as np
import pytest
from stand_in_engine import Engine, request

from serve.inside.admission import deadline_in, guided_steps, priority_of
from serve.inside.call_times import CallTimes
from serve.inside.errors import Cancelled, Expired, Full, RequestError
from serve.inside.schedule import StepScheduler


def run(scheduler: StepScheduler) -> None:
    while scheduler.step():
        pass


def test_a_higher_priority_goes_first_where_calls_are_full():
    """It came last, and has the next call."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(max_rows=2, mark=2.0, priority=2))
    scheduler.step()
    scheduler.submit(request(max_rows=2, mark=3.0, priority=3))
    scheduler.submit(request(max_rows=2, mark=1.0, priority=1))
    run(scheduler)
    assert [int(context[0, 0, 0]) for context in engine.contexts] == [2, 1, 1, 1, 2, 2, 3, 3, 3]


def in_flight_and_next(first: dict, second: dict, host: float) -> list[list[float]]:
    """The marks of two calls of a queue of three, 30 ms each in the engine."""
    scheduler = StepScheduler(Engine(), 64)
    for size in ((1, 4, 4), (1, 6, 4)):
        scheduler.call_times.note(size, host, engine=0.03)
    for mark, given in ((1.0, first), (2.0, second), (3.0, second)):
        scheduler.submit(request(max_rows=2, mark=mark, **given))
    return [[each.state.conditions["context"][0, 0, 0] for each in scheduler.schedule()] for _ in range(2)]


@pytest.mark.parametrize(("host", "second"), [(0.0, []), (0.007, []), (0.009, [2])])
def test_in_a_queue_a_second_call_is_in_flight_only_where_own_work_is_worth_hiding(host, second):
    """Three requests and 30 ms in the engine: from 30 / (3 + 1) = 7.5 ms on."""
    assert in_flight_and_next({}, {}, host) == [[1], second]


@pytest.mark.parametrize(
    ("first", "second"),
    [({"priority": 1}, {"priority": 2}), ({}, {"size": (6, 4)}), ({"size": (6, 4)}, {})],
)
def test_a_request_of_another_priority_or_size_waits_until_the_first_has_ended(first, second):
    assert in_flight_and_next(first, second, host=0.1) == [[1], []]


def test_a_request_that_has_room_in_the_next_call_of_a_queue_waits_for_it():
    scheduler = StepScheduler(Engine(), 64)
    scheduler.call_times.note((1, 4, 4), host=0.1, engine=0.03)
    scheduler.submit(request(max_rows=2, rows=1))
    assert len(scheduler.schedule()) == 1
    scheduler.submit(request(max_rows=2, rows=1))
    assert scheduler.schedule() == []


def test_what_a_call_takes_is_noted_when_it_has_the_engine_for_itself():
    scheduler = StepScheduler(Engine(lambda latent: time.sleep(0.05) or np.zeros_like(latent)), 64)
    scheduler.submit(request(max_rows=2))
    scheduler.submit(request(max_rows=2))
    assert not scheduler.call_times.overlap_pays((1, 4, 4), 1000)  # nothing is known yet
    scheduler.step()
    assert scheduler.call_times.overlap_pays((1, 4, 4), 100_000)
    assert not scheduler.call_times.overlap_pays((1, 4, 4), 1)


def test_what_shared_the_engine_with_another_call_is_not_noted():
    """Neither the call that another joined, nor the one that was joined and went on alone."""
    begun, go_on = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
    calls = itertools.count()

    def velocity(latent):
        call = next(calls)
        begun[call].set()
        assert go_on[call].wait(10)
        return np.zeros_like(latent)

    scheduler = StepScheduler(Engine(velocity), 64)
    threads = [threading.Thread(target=scheduler.step) for _ in range(2)]
    for _ in range(4):
        scheduler.submit(request(max_rows=4))
    for thread, there in zip(threads, begun, strict=True):
        thread.start()
        assert there.wait(10)
    for thread, event in zip(threads, go_on, strict=True):
        event.set()
        thread.join(10)
    assert not scheduler.call_times.overlap_pays((1, 4, 4), 10**6)


def test_one_call_that_was_interrupted_does_not_change_the_pace():
    times = CallTimes()
    for host in (0.001, 0.001, 0.1):
        times.note((1, 4, 4), host, engine=0.03)
    assert not times.overlap_pays((1, 4, 4), 3)


def test_a_size_with_a_higher_priority_in_front_goes_before_the_others_turn():
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(size=(4, 4), priority=2))
    scheduler.submit(request(size=(6, 4), priority=1))
    run(scheduler)
    assert [size for _, size in engine.calls] == [(6, 4)] * 3 + [(4, 4)] * 3


def test_a_request_whose_time_has_passed_ends_before_its_next_step():
    engine, ended = Engine(), []
    scheduler = StepScheduler(engine, 64)
    late = request(on_end=lambda _, error: ended.append(error))
    scheduler.submit(late)
    scheduler.step()
    late.ticket.deadline = time.monotonic_ns()
    assert scheduler.step() == 0
    assert isinstance(ended[0], Expired)
    assert "before step 2 of 3" in str(ended[0])
    assert len(engine.calls) == 1


def test_a_deadline_that_is_far_away_changes_nothing():
    ended = []
    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(request(deadline=deadline_in(60_000_000), on_end=lambda _, error: ended.append(error)))
    run(scheduler)
    assert ended == [None]


def test_no_time_out_is_no_deadline():
    assert deadline_in(0) == 0
    assert 0 < deadline_in(2_000_000) - time.monotonic_ns() <= 2 * 10**9


@pytest.mark.parametrize(
    ("start", "end", "steps", "guided"),
    [
        (0.0, 1.0, 20, (0, 20)),
        (0.1, 0.8, 20, (2, 16)),
        (np.float32(0.1), np.float32(0.7), 30, (3, 21)),  # a little more than three, a little less than 21
        (np.float32(0.1), np.float32(0.9), 200, (20, 180)),
        (0.11, 0.8, 20, (3, 16)),
        (0.5, 0.5, 20, (10, 10)),
        (0.0, 1.0, 1, (0, 1)),
    ],
)
def test_the_guided_steps_are_those_whose_share_lies_in_the_interval(start, end, steps, guided):
    """Step i when start <= i / steps < end."""
    assert guided_steps(float(start), float(end), steps) == guided


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (-0.1, 1.0, "guidance_start is -0.1: expected a fraction"),
        (0.0, 1.5, "guidance_end is 1.5: expected a fraction"),
        (float("nan"), 1.0, "guidance_start is nan"),
        (0.8, 0.2, "guidance_start is 0.8, after guidance_end, 0.2"),
    ],
)
def test_an_interval_that_is_none_is_refused(start, end, message):
    with pytest.raises(RequestError, match=message):
        guided_steps(start, end, 20)


def test_without_guidance_a_step_takes_the_prompts_row_alone():
    """Steps 1 and 2 of four are guided: rows 1, 2, 2, 1, and the prompt's context is the second."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    guided = request(steps=4, guided=(1, 3))
    guided.state.conditions["context"] = np.array([[[7.0]], [[5.0]]], np.float16)
    scheduler.submit(guided)
    run(scheduler)
    assert [context[:, 0, 0].tolist() for context in engine.contexts] == [[5], [7, 5], [7, 5], [5]]


def test_guidance_in_a_part_of_the_steps_is_that_of_the_whole_there():
    """From sigma 1 to 0 the latents move by each step's share of the velocity that it had."""
    scheduler = StepScheduler(Engine(), 64)
    ended = []
    part = request(steps=4, guided=(1, 3), guidance_scale=3.0, on_end=lambda done, _: ended.append(done))
    part.state.conditions["context"] = np.array([[[1.0]], [[2.0]]], np.float16)
    scheduler.submit(part)
    run(scheduler)
    sizes = part.state.sigmas[1:] - part.state.sigmas[:-1]
    expected = sizes @ np.array([2.0, 4.0, 4.0, 2.0])  # guided: 1 + 3 (2 - 1)
    assert ended[0].state.latents[0, 0, 0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("parameters", "level"), [("", 2), ("{}", 2), ('{"priority_level": 1}', 1)])
def test_a_requests_priority_is_its_parameter(parameters, level):
    assert priority_of(parameters, default=2) == level


@pytest.mark.parametrize("level", ["0", "4", '"high"', "true", "1.5", "null", "[1]"])
def test_a_priority_level_that_is_none_is_refused(level):
    with pytest.raises(RequestError, match="priority_level is .* expected 1"):
        priority_of(f'{{"priority_level": {level}}}', default=2)


def test_latents_that_overflowed_are_an_error_of_their_request_alone():
    ended = []

    def velocity(latent):
        broken = np.array(latent)
        broken[:2] = np.inf
        return broken

    scheduler = StepScheduler(Engine(velocity), 64)
    for _ in range(2):
        scheduler.submit(request(steps=1, on_end=lambda _, error: ended.append(error)))
    run(scheduler)
    assert "not finite at step 1" in str(ended[0])
    assert ended[1] is None


class Witness:
    """An observer that remembers."""

    def __init__(self):
        self.calls = []
        self.ends = []

    def called(self, call, rows, queued, engine, host):
        self.calls.append((len(call), rows))
        assert queued >= 0 and engine >= 0 and host >= 0

    def ended(self, request, error):
        self.ends.append(type(error))


def test_an_observer_is_told_of_every_call_and_every_end():
    witness = Witness()
    scheduler = StepScheduler(Engine(), 3, observer=witness)
    scheduler.submit(request(steps=1))
    scheduler.submit(request(steps=2, rows=1))
    scheduler.submit(request(steps=2, is_cancelled=lambda: True))
    with pytest.raises(Full):
        scheduler.submit(request())
    scheduler.poll_cancellations()
    run(scheduler)
    assert witness.calls == [(2, 3), (1, 1)]
    assert witness.ends == [Full, Cancelled, type(None), type(None)]


def test_an_observer_that_fails_stops_nothing(capsys):
    class Blind:
        def called(self, *_):
            raise RuntimeError("cannot count")

        ended = called

    ended = []
    scheduler = StepScheduler(Engine(), 64, observer=Blind())
    scheduler.submit(request(on_end=lambda _, error: ended.append(error)))
    run(scheduler)
    assert ended == [None]
    assert "cannot count" in capsys.readouterr().err


def test_held_requests_are_counted_by_size_and_by_whether_they_have_begun():
    scheduler = StepScheduler(Engine(), 64)
    for size in ((4, 4), (4, 4), (6, 4)):
        scheduler.submit(request(size=size, max_rows=2))
    assert scheduler.held() == {(4, 4): (2, 0), (6, 4): (1, 0)}
    scheduler.step()
    assert scheduler.held() == {(4, 4): (1, 1), (6, 4): (1, 0)}
    run(scheduler)
    assert scheduler.held() == {}
