"""A bounded queue before one worker: a lower priority level goes first, then who came first.

Triton 2.51's own (`default_queue_policy`) comes with its dynamic batcher, in which a request that comes while
the only instance is taken may wait for half a second.
"""

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import Expired, Full

LONGEST = 3600.0  # seconds that a thread waits at a time


@dataclass(eq=False)
class Job:
    """A request's work, and what is told once, with the work's result or the error in its place.

    At `deadline` (ns of the monotonic clock; 0: none) its wait ends.
    """

    work: Callable[[], Any]
    answer: Callable[[Any], None]
    priority: int
    deadline: int = 0

    def seconds_left(self) -> float:
        """Until its deadline."""
        return (self.deadline - time.monotonic_ns()) / 1e9 if self.deadline else LONGEST


class BoundedQueue:
    """Holds `most` jobs, the running one among them; `run` works on one after the other, `submit` from any
    thread. `name` tells clients where their requests wait.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._waiting: list[Job] = []
        self._running = False
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, job: Job) -> None:
        """Admit a job. Raises Full."""
        with self._changed:
            held = len(self)
            if self._closed:
                raise Full("the server is stopping")
            if held >= self._most:
                raise Full(f"{self._name} has {held} requests already: try again later")
            self._waiting.append(job)
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting) + self._running

    def close(self) -> None:
        """Admit nothing more; `run` returns when what it works on is done, and the rest ends with Full."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """Work until `close`."""
        watch = threading.Thread(target=self._repeat, args=(self._end_late,), name="late")
        watch.start()
        self._repeat(self._work)
        watch.join()
        for job in self._waiting:
            _tell(job, Full("the server is stopping"))
        self._waiting = []

    def _repeat(self, turn: Callable[[], None]) -> None:
        while not self._closed:
            turn()

    def _work(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return
            job = min(self._waiting, key=lambda job: job.priority)
            self._waiting.remove(job)
            self._running = True
        try:
            result = job.work()
        except Exception as error:
            result = error
        _tell(job, result)
        self._running = False

    def _end_late(self) -> None:
        with self._changed:
            left = min((job.seconds_left() for job in self._waiting), default=LONGEST)
            if left > 0 and not self._closed:
                self._changed.wait(min(left, LONGEST))
            late = [job for job in self._waiting if job.seconds_left() <= 0]
            self._waiting = [job for job in self._waiting if job not in late]
        for job in late:
            _tell(job, Expired(f"the time-out has passed before {self._name} had its turn for it"))


def _tell(job: Job, result: Any) -> None:
    try:
        job.answer(result)
    except Exception:  # a client that is gone must not stop the others'
        traceback.print_exc()
