"""A stream in the step scheduler: parts of one picture, each a request, that keep their place meanwhile."""

from functools import partial

import pytest
from stand_in_engine import Engine, request

from serve.inside.errors import Cancelled, Full
from serve.inside.schedule import StepScheduler
from serve.inside.table import HOLD_SECONDS, KEEP_SECONDS


def part(step: int, steps: int = 4, arrival: int = 5, **given):
    """One step of a stream's picture."""
    asked = request(steps=steps, arrival=arrival, streamed=True, **given)
    asked.state.step = asked.state.begin = step
    asked.state.end = step + 1
    return asked


def later(scheduler: StepScheduler, seconds: float) -> None:
    """As if so much time had passed since the parts that ended."""
    for _, entry in scheduler._table.between_parts.values():
        entry.ready -= seconds


def test_a_call_waits_for_a_streams_next_part():
    """Else the others' call would leave without it, and its own without them, for ever after."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(part(0))
    scheduler.submit(request(steps=4))
    for step in range(1, 4):
        assert scheduler.step() == 4
        assert scheduler.step() == 0
        scheduler.submit(part(step))
    assert scheduler.step() == 4
    assert [rows for rows, _ in engine.calls] == [4] * 4


def test_it_does_not_wait_longer_than_a_moment():
    """The client may have left, or a preview takes its time."""
    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(part(0))
    scheduler.submit(request())
    scheduler.step()
    later(scheduler, HOLD_SECONDS)
    assert scheduler.step() == 2


def test_a_call_that_is_full_without_it_waits_for_no_stream():
    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(part(0, max_rows=4))
    for _ in range(3):
        scheduler.submit(request(max_rows=4))
    assert scheduler.step() == 4
    assert scheduler.step() == 4


def test_other_sizes_do_not_wait():
    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(part(0, size=(4, 4)))
    scheduler.step()
    scheduler.submit(request(size=(4, 4)))
    scheduler.submit(request(size=(6, 4)))
    assert [each.size for each in scheduler.schedule()] == [(1, 6, 4)]


def test_in_a_queue_a_stream_runs_to_its_end_before_who_came_later():
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(part(0, max_rows=2, mark=1.0))
    scheduler.submit(request(steps=2, max_rows=2, mark=2.0))
    for step in range(1, 4):
        assert scheduler.step() == 2
        assert scheduler.step() == 0
        scheduler.submit(part(step, max_rows=2, mark=1.0))
    while scheduler.step():
        pass
    assert [int(context[0, 0, 0]) for context in engine.contexts] == [1, 1, 1, 1, 2, 2]


def test_the_parts_of_a_picture_give_the_engine_its_constants_once():
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for step in range(4):
        scheduler.submit(part(step))
        scheduler.step()
    assert all(context is engine.contexts[0] for context in engine.contexts)
    assert not scheduler._constants


def test_a_picture_that_has_begun_is_not_refused():
    """Between its parts it keeps its place, and even one that took too long may go on."""
    scheduler = StepScheduler(Engine(), 1)
    scheduler.submit(part(0))
    scheduler.step()
    with pytest.raises(Full):
        scheduler.submit(request())
    assert scheduler.held() == {(4, 4): (0, 1)}
    later(scheduler, KEEP_SECONDS)
    scheduler.submit(request())
    scheduler.submit(part(1))


def test_a_stream_that_does_not_come_back_leaves_nothing_behind():
    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(part(0))
    scheduler.step()
    later(scheduler, KEEP_SECONDS)
    assert scheduler.held() == {}
    assert not scheduler._table.between_parts and not scheduler._constants


def test_a_request_that_waits_is_asked_now_and_then_whether_it_was_cancelled():
    """Each question is a round trip to the server: not one for each of sixty at every look."""
    asked = {"in_flight": 0, "waiting": 0}

    def ask(which):
        asked[which] += 1
        return False

    scheduler = StepScheduler(Engine(), 64)
    for which in asked:
        scheduler.submit(request(max_rows=2, is_cancelled=partial(ask, which)))
    scheduler.schedule()
    for _ in range(9):
        scheduler.poll_cancellations()
    assert asked == {"in_flight": 9, "waiting": 1}


def test_a_question_that_fails_ends_its_request_alone(capsys):
    ended = []

    def broken():
        raise RuntimeError("nobody to ask")

    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(request(is_cancelled=broken, on_end=lambda _, error: ended.append(type(error))))
    scheduler.submit(request(on_end=lambda _, error: ended.append(error)))
    scheduler.poll_cancellations()
    while scheduler.step():
        pass
    assert ended == [Cancelled, None]
    assert "nobody to ask" in capsys.readouterr().err
