"""The queue before the text encoder: its order, its bound, deadlines, and work that fails."""

import threading
import time

import numpy as np
import pytest
from triton_requests import connect, metric, tensors, until

from serve.inside.bounded_queue import BoundedQueue, Job
from serve.inside.schedule import Expired, Full


class Record:
    """What became of jobs, in order; each of them lets the next one run."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def job(self, name: str, priority: int = 2, deadline: int = 0, work=None) -> Job:
        def done() -> None:
            if work is not None:
                work()
            self.events.append((name, None))

        return Job(done, lambda error: self.events.append((name, type(error))), priority, deadline)


def run(queue: BoundedQueue) -> None:
    """Work until the queue is empty."""
    thread = threading.Thread(target=queue.run)
    thread.start()
    until(lambda: len(queue) == 0)
    queue.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_lower_priority_level_goes_first_then_who_came_first():
    record, queue = Record(), BoundedQueue("text_encoder", 8)
    for name, priority in (("a", 2), ("b", 3), ("c", 1), ("d", 2), ("e", 1)):
        queue.submit(record.job(name, priority))
    run(queue)
    assert record.events == [(name, None) for name in "ceadb"]


def test_one_more_than_it_holds_is_refused_and_the_running_one_counts():
    record, queue = Record(), BoundedQueue("text_encoder", 2)
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(10)

    queue.submit(record.job("running", work=wait))
    thread = threading.Thread(target=queue.run)
    thread.start()
    assert begun.wait(10)
    queue.submit(record.job("waiting"))
    with pytest.raises(Full, match="2 requests wait for text_encoder already: try again later"):
        queue.submit(record.job("refused"))
    assert len(queue) == 2
    queue.close()
    with pytest.raises(Full, match="stopping"):
        queue.submit(record.job("late"))
    go_on.set()
    thread.join(10)
    assert record.events == [("running", None), ("waiting", Full)]


def test_a_deadline_ends_the_wait():
    record, queue = Record(), BoundedQueue("text_encoder", 8)
    now = time.monotonic_ns()
    queue.submit(record.job("first", 1, now + 60 * 10**9))
    queue.submit(record.job("over", 1, now))
    run(queue)
    assert sorted(record.events, key=str) == [("first", None), ("over", Expired)]


def test_work_that_fails_is_its_requests_alone(capsys):
    """Even when its client cannot be told."""

    def broken() -> None:
        raise ArithmeticError("broken")

    def gone(error: Exception) -> None:
        raise ConnectionError("nobody there")

    record, queue = Record(), BoundedQueue("text_encoder", 8)
    queue.submit(record.job("broken", work=broken))
    queue.submit(Job(broken, gone, 2))
    queue.submit(record.job("next"))
    run(queue)
    assert record.events == [("broken", ArithmeticError), ("next", None)]
    assert "nobody there" in capsys.readouterr().err


def test_a_server_takes_requests_that_come_together_at_once(server):
    """Triton 2.51's dynamic batcher let the second of a pair wait for half a second, one time in three."""
    queued = 'nv_inference_queue_duration_us{model="text_encoder"'
    before = metric(server, queued)
    answers: list[object] = []
    there = threading.Semaphore(0)

    def ended(result, error) -> None:
        answers.append(error)
        there.release()

    with connect(server) as client:
        for pair in range(16):
            for _ in range(2):
                text = tensors(prompt="a circle", guidance_scale=np.ones(1, np.float32))
                client.async_infer("text_encoder", text, ended)
            for _ in range(2):
                assert there.acquire(timeout=30), f"pair {pair} hangs"
    assert answers == [None] * 32
    assert metric(server, queued) - before < 250_000  # microseconds, of all 32
