"""A bounded queue before one worker: a lower priority level goes first, then who came first.

Triton 2.51's own (`default_queue_policy`) comes with its dynamic batcher, which lets a request that comes
while the only instance is taken wait for half a second.
"""

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from .schedule import Expired, Full


@dataclass(eq=False)
class Job:
    """A request's work, and what is called with the error in its place, or when it fails.

    `deadline` ends the wait: ns of the monotonic clock, 0 for none.
    """

    work: Callable[[], None]
    on_error: Callable[[Exception], None]
    priority: int
    deadline: int = 0


class BoundedQueue:
    """Holds `most` jobs, the running one among them; `run` works on them in one thread, `submit` from any.

    `name` tells clients where their requests wait.
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
                raise Full(f"{held} requests wait for {self._name} already: try again later")
            self._waiting.append(job)
            self._changed.notify()

    def __len__(self) -> int:
        return len(self._waiting) + self._running

    def close(self) -> None:
        """Admit nothing more; `run` returns when what it works on is done, and the rest ends with Full."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Work until `close`."""
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                late = [job for job in self._waiting if 0 < job.deadline <= time.monotonic_ns()]
                self._waiting = [job for job in self._waiting if job not in late]
                job = None if self._closed else min(self._waiting, key=lambda job: job.priority, default=None)
                if job is not None:
                    self._waiting.remove(job)
                self._running = job is not None
            for each in late:
                self._end(each, Expired(f"the time-out has passed before {self._name} had its turn for it"))
            if job is not None:
                try:
                    job.work()
                except Exception as error:
                    self._end(job, error)
                self._running = False
        for job in self._waiting:
            self._end(job, Full("the server is stopping"))

    def _end(self, job: Job, error: Exception) -> None:
        try:
            job.on_error(error)
        except Exception:  # a client that is gone must not stop the others'
            traceback.print_exc()
