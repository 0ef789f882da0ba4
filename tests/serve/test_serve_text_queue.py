"""The queue before the text encoder: its order, its bound, deadlines, and work that fails."""

import contextlib
import threading
import time
import weakref
from queue import SimpleQueue

import numpy as np
import pytest
from triton_requests import connect, tensors, until
from working import working

from serve.inside.bounded_queue import BoundedQueue, Job
from serve.inside.errors import Expired, Full


class Record:
    """What became of jobs, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def job(self, name: str, priority: int = 2, deadline: int = 0, work=lambda: "done") -> Job:
        def answer(result: object) -> None:
            self.events.append((name, type(result) if isinstance(result, Exception) else result))

        return Job(work, answer, priority, deadline)


class Busy:
    """Work that lasts until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.end.wait(10)
        return "done"


@contextlib.contextmanager
def occupied(most: int):
    """A queue at work on a job named "running", until that is told to end; and what becomes of jobs."""
    record, queue, busy = Record(), BoundedQueue("text_encoder", most), Busy()
    queue.submit(record.job("running", work=busy))
    with working(queue):
        assert busy.begun.wait(10)
        yield record, queue, busy


def test_a_lower_priority_level_goes_first_then_who_came_first():
    record, queue = Record(), BoundedQueue("text_encoder", 8)
    for name, priority in (("a", 2), ("b", 3), ("c", 1), ("d", 2), ("e", 1)):
        queue.submit(record.job(name, priority))
    with working(queue):
        until(lambda: len(queue) == 0)
    assert record.events == [(name, "done") for name in "ceadb"]


def test_one_more_than_it_holds_is_refused_and_the_running_one_counts():
    with occupied(2) as (record, queue, busy):
        queue.submit(record.job("waiting"))
        with pytest.raises(Full, match="text_encoder has 2 requests already: try again later"):
            queue.submit(record.job("refused"))
        assert len(queue) == 2
        busy.end.set()
        until(lambda: len(queue) == 0)
        queue.submit(record.job("later"))
        until(lambda: len(queue) == 0)
    assert record.events == [("running", "done"), ("waiting", "done"), ("later", "done")]


def test_what_waits_at_the_end_is_refused():
    with occupied(2) as (record, queue, busy):
        queue.submit(record.job("waiting"))
        queue.close()
        with pytest.raises(Full, match="stopping"):
            queue.submit(record.job("late"))
        busy.end.set()
    assert record.events == [("running", "done"), ("waiting", Full)]
    assert len(queue) == 0


def test_a_deadline_ends_the_wait_while_another_job_runs():
    """Its place is free then."""
    with occupied(3) as (record, queue, busy):
        queue.submit(record.job("late", deadline=time.monotonic_ns() + 20_000_000))
        queue.submit(record.job("in time", deadline=time.monotonic_ns() + 60 * 10**9))
        until(lambda: len(queue) == 2)
        until(lambda: record.events)
        assert record.events == [("late", Expired)]
        busy.end.set()
        until(lambda: len(queue) == 0)
    assert record.events[1:] == [("running", "done"), ("in time", "done")]


def test_work_that_fails_is_its_requests_alone(capsys):
    """Even when its client cannot be told."""

    def broken() -> None:
        raise ArithmeticError("broken")

    def gone(result: object) -> None:
        raise ConnectionError("nobody there")

    record, queue = Record(), BoundedQueue("text_encoder", 8)
    queue.submit(record.job("broken", work=broken))
    queue.submit(Job(broken, gone, 2))
    queue.submit(record.job("next"))
    with working(queue):
        until(lambda: len(queue) == 0)
    assert record.events == [("broken", ArithmeticError), ("next", "done")]
    assert "nobody there" in capsys.readouterr().err


def test_nothing_of_what_was_answered_is_kept():
    """A request that is held keeps its inputs in shared memory."""
    record, queue = Record(), BoundedQueue("text_encoder", 8)
    jobs = [record.job("done"), record.job("late", deadline=time.monotonic_ns())]
    gone = [weakref.ref(job) for job in jobs]
    with working(queue):
        while jobs:
            queue.submit(jobs.pop())
        until(lambda: len(record.events) == 2 and len(queue) == 0)
        until(lambda: [each() for each in gone] == [None, None])


def test_a_server_takes_requests_that_come_together_at_once(server):
    """Triton 2.51's dynamic batcher let the second of a pair wait for half a second, one time in three."""
    answers: SimpleQueue = SimpleQueue()
    text = tensors(prompt="a circle", guidance_scale=np.ones(1, np.float32))
    slow = 0
    with connect(server) as client:
        client.infer("text_encoder", text)  # now it is known
        for _ in range(16):
            begin = time.monotonic()
            for _ in range(2):
                client.async_infer("text_encoder", text, lambda result, error: answers.put(error))
            assert [answers.get(timeout=30) for _ in range(2)] == [None, None]
            slow += time.monotonic() - begin > 0.4  # a few milliseconds, on a machine that may pause
    assert slow <= 1
