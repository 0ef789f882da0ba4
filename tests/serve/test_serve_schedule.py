"""The step scheduler, with an engine whose velocity tells whose row it was."""

import threading
import time
from functools import partial

import numpy as np
import pytest
from stand_in_engine import Engine, request
from triton_requests import until
from working import working

from serve.inside.errors import Cancelled, Full
from serve.inside.schedule import StepScheduler


def test_requests_share_calls_up_to_the_sizes_rows():
    """Five requests of two rows and at most eight rows a call: the one that came last waits."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for _ in range(5):
        scheduler.submit(request(steps=2))
    while scheduler.step():
        pass
    assert [rows for rows, _ in engine.calls] == [8, 8, 2, 2]


def test_a_new_request_joins_at_the_next_step():
    """It does not wait until those in flight have finished."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(steps=3))
    scheduler.step()
    scheduler.submit(request(steps=3))
    while scheduler.step():
        pass
    assert [rows for rows, _ in engine.calls] == [2, 4, 4, 2]


def test_sizes_take_turns():
    """Two sizes alternate; neither starves, whichever has more requests."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for _ in range(3):
        scheduler.submit(request(size=(4, 4), steps=3))
    scheduler.submit(request(size=(6, 4), steps=3))
    while scheduler.step():
        pass
    assert [size for _, size in engine.calls] == [(4, 4), (6, 4)] * 3


def test_a_request_without_guidance_does_not_end_the_queue():
    """Where a call takes one request with guidance, the first runs to its end, whoever waits behind it."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(size=(4, 4), max_rows=2))
    scheduler.submit(request(size=(6, 4), max_rows=2, rows=1))
    scheduler.submit(request(size=(8, 4), max_rows=2))
    while scheduler.step():
        pass
    assert [size for _, size in engine.calls] == [(4, 4)] * 3 + [(6, 4)] * 3 + [(8, 4)] * 3


def test_two_requests_without_guidance_share_the_call_of_one_with_it():
    """Each has one row of the two."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for rows in (1, 2, 1):
        scheduler.submit(request(max_rows=2, rows=rows, mark=float(rows)))
    while scheduler.step():
        pass
    assert [context[:, 0, 0].tolist() for context in engine.contexts] == [[1, 1]] * 3 + [[2, 2]] * 3


def test_each_request_gets_its_own_rows():
    """With one row and with two, at different steps, velocities go to their requests."""
    ended = []
    scheduler = StepScheduler(Engine(), 64)
    for mark, rows, steps in ((1.0, 2, 2), (2.0, 1, 4), (3.0, 2, 3)):

        def on_end(done, error, mark=mark):
            ended.append((mark, float(done.state.latents[0, 0, 0]), error))

        scheduler.submit(request(mark=mark, rows=rows, steps=steps, on_end=on_end))
    while scheduler.step():
        pass
    # From sigma 1 to 0 along a constant velocity v the latents move by -v.
    assert sorted((mark, round(value, 5), error) for mark, value, error in ended) == [
        (1.0, -1.0, None),
        (2.0, -2.0, None),
        (3.0, -3.0, None),
    ]


def test_constant_tensors_are_joined_once():
    """While the same requests stay together, the engine gets the same context array."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for _ in range(2):
        scheduler.submit(request(steps=3))
    for _ in range(3):
        scheduler.step()
    assert engine.contexts[0] is engine.contexts[1] is engine.contexts[2]


def test_constants_of_another_company_are_dropped():
    """At SD3.5 Large's size they are megabytes of shared memory for each."""
    scheduler = StepScheduler(Engine(), 64)
    for _ in range(3):
        scheduler.submit(request(steps=9))
        scheduler.step()
    assert len(scheduler._constants) == 1


def test_a_cancelled_request_leaves_before_its_next_step():
    """Its place is free at the next call, and it ends with Cancelled."""
    engine, ended, cancelled = Engine(), [], threading.Event()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(is_cancelled=cancelled.is_set, on_end=lambda _, error: ended.append(error)))
    scheduler.step()
    cancelled.set()
    scheduler.poll_cancellations()
    assert isinstance(ended[0], Cancelled)
    assert scheduler.step() == 0
    assert len(engine.calls) == 1


def test_an_engines_failure_is_that_of_its_call():
    """Requests of another size go on; those in the call get the error."""
    ended = []

    def velocity(latent):
        if latent.shape[2:] == (4, 4):
            raise RuntimeError("out of memory")
        return latent

    scheduler = StepScheduler(Engine(velocity), 64)
    scheduler.submit(request(size=(4, 4), on_end=lambda _, error: ended.append(str(error))))
    scheduler.submit(request(size=(6, 4), on_end=lambda _, error: ended.append(error)))
    for _ in range(4):
        scheduler.step()
    assert ended == ["out of memory", None]


def test_a_velocity_of_the_wrong_shape_is_an_error_of_its_call():
    """The loop lives on."""
    ended = []
    scheduler = StepScheduler(Engine(lambda latent: latent[:, :, :1, :3]), 64)
    scheduler.submit(request(on_end=lambda _, error: ended.append(error)))
    assert scheduler.step() == 0
    assert isinstance(ended[0], ValueError)


def test_an_answer_that_cannot_be_sent_does_not_stop_the_loop(capsys):
    """The client is gone; the others get their pictures, and the log tells."""
    ended = []

    def gone(*_):
        raise BrokenPipeError("the client is gone")

    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(request(steps=1, on_end=gone))
    scheduler.submit(request(steps=1, on_end=lambda _, error: ended.append(error)))
    while scheduler.step():
        pass
    assert ended == [None]
    assert "the client is gone" in capsys.readouterr().err


def test_a_full_scheduler_refuses_at_once():
    """One request more than it holds raises Full; when one has ended there is room again."""
    scheduler = StepScheduler(Engine(), 2)
    for _ in range(2):
        scheduler.submit(request(steps=1))
    with pytest.raises(Full, match="try again"):
        scheduler.submit(request())
    scheduler.step()
    scheduler.submit(request())


def test_closing_ends_what_is_unfinished():
    """`run` returns after `close`, and nobody waits for ever."""
    ended = []
    started, go_on = threading.Event(), threading.Event()

    def velocity(latent):
        started.set()
        go_on.wait(10)
        return latent

    scheduler = StepScheduler(Engine(velocity), 64)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    scheduler.submit(request(steps=50, on_end=lambda _, error: ended.append(error)))
    assert started.wait(10)
    scheduler.close()
    go_on.set()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(ended[0], Full)
    with pytest.raises(Full, match="stopping"):
        scheduler.submit(request())


def test_the_second_thread_is_woken_once_a_second_call_pays():
    """It found nothing to do when the loop began, since nothing was known of the pace."""
    in_flight, ended, most = [], [], []

    def velocity(latent):
        in_flight.append(latent)
        if not ended:
            most.append(len(in_flight))
        time.sleep(0.005)
        in_flight.pop()
        return latent

    engine = Engine(velocity)
    scheduler = StepScheduler(engine, 64)
    scheduler.call_times.overlap_pays = lambda size, calls: len(engine.calls) > 2
    for _ in range(3):
        scheduler.submit(request(steps=9, max_rows=2, on_end=lambda _, error: ended.append(error)))
    with working(scheduler):
        until(lambda: len(ended) == 3)
    assert max(most) == 2 and most[:2] == [1, 1]


def test_a_request_that_is_cancelled_while_its_call_is_in_flight_ends_once_and_spoils_nothing():
    """Two threads look at it: one has it in a call, the other asks whether it is cancelled."""
    ended, cancelled = [], threading.Event()
    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(request(steps=2, on_end=lambda _, error: ended.append(("company", error))))
    scheduler.submit(
        request(
            steps=2, is_cancelled=cancelled.is_set, on_end=lambda _, error: ended.append(("leaving", error))
        )
    )
    call = scheduler.schedule()
    cancelled.set()
    scheduler.poll_cancellations()
    assert len(call) == 2 and not ended
    scheduler.advance(call, np.zeros((4, 1, 4, 4), np.float16))
    while scheduler.step():
        pass
    assert [name for name, _ in ended] == ["leaving", "company"]
    assert isinstance(ended[0][1], Cancelled) and ended[1][1] is None


def test_who_was_answered_is_not_asked_whether_it_was_cancelled(monkeypatch):
    """Not by a thread that began to ask before the other one's answer either: it would end the server.

    (Triton 2.51 frees what the question reads: a signal 11 in TRITONBACKEND_ResponseFactoryIsCancelled.)
    """
    answered, asked_late = set(), []

    def asked(one):
        asked_late.append(one in answered)
        time.sleep(0.0002)
        asked_late.append(one in answered)
        return False

    def slow(latent):
        """Takes until the requests in the call were asked, however busy the machine is."""
        before = len(asked_late)
        until(lambda: len(asked_late) >= before + 4)
        return latent

    scheduler = StepScheduler(Engine(slow), 64)
    monkeypatch.setattr("serve.inside.schedule.POLL_SECONDS", 0.0005)
    monkeypatch.setattr("serve.inside.table.POLL_WAITING_SECONDS", 0.0)
    for _ in range(40):
        one = request(steps=4, max_rows=8)
        one.ticket.is_cancelled = partial(asked, one)
        one.ticket.on_end = lambda ended, _: answered.add(ended)
        scheduler.submit(one)
    with working(scheduler):
        until(lambda: len(answered) == 40)
    assert len(asked_late) > 80 and not any(asked_late)
