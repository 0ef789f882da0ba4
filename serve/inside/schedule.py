"""The step scheduler: rows of different requests, at different steps, share one engine call.

Where sharing pays. A request's `max_rows` is the most rows of a call of its size that do: what the shape
set allows, or less where more rows take so much longer that waiting one's turn is better
(`inside/sharing.py`). Of each size the first requests by arrival that fill such a call are in front. Sizes in
front take turns, so none starves. But where no size has room for more than one request with guidance, turns
would only delay: there the first request runs to its end, as in a queue, and others ride along only in what
rows it leaves.

Up to `calls` engine calls are in flight at once, so that the server's own work hides behind the engine's.
A size gets a second call only when its first one is full: a request that came meanwhile joins at the next
step, and loops do not fall apart into half-empty calls.
"""

import itertools
import threading
import time
import traceback
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .denoise import Denoising

Half = npt.NDArray[np.float16]
# (latent [r, C, h, w], timestep [r, 1], context [r, T, D], pooled [r, P]) → velocity [r, C, h, w]
Engine = Callable[[Half, npt.NDArray[np.float32], Half, Half], Half]


class Full(Exception):
    """The scheduler has as many requests as it may hold; the client may try again."""


class Cancelled(Exception):
    """The client no longer waits for this request."""


class StepScheduler:
    """Advances every admitted request step by step; `run` in one thread, `submit` from any."""

    def __init__(self, engine: Engine, max_requests: int, calls: int = 2) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._calls = calls
        self._turn = itertools.count()
        self._waiting: dict[Denoising, int] = {}  # admitted, in no call → its arrival
        self._flying: dict[Denoising, int] = {}  # in a call
        self._turns: dict[tuple[int, ...], int] = {}  # a size → the turn of its last call
        self._changed = threading.Condition()
        self._closed = False
        self._joined: dict[tuple[int, ...], tuple[Half, Half]] = {}  # requests of a call → its constants

    def submit(self, request: Denoising) -> None:
        """Admit a request; it joins at the next step. Raises Full."""
        with self._changed:
            held = len(self._waiting) + len(self._flying)
            if self._closed or held >= self._max_requests:
                raise Full(
                    "the server is stopping"
                    if self._closed
                    else f"{held} requests are being denoised already: try again later"
                )
            self._waiting[request] = request.arrival or time.monotonic_ns()
            self._changed.notify_all()

    def run(self) -> None:
        """Step until `close`; what is still unfinished then ends with Cancelled."""
        threads = [
            threading.Thread(target=self._work, name=f"steps {number}") for number in range(self._calls)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for request in list(self._waiting):
            self._end(request, Cancelled("the server is stopping"))

    def close(self) -> None:
        """Admit nothing more and let `run` return."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def step(self) -> int:
        """One engine call; returns the rows that it carried, 0 when there is none to make."""
        call = self.take()
        if not call:
            return 0
        try:
            latents, timesteps = zip(*(request.engine_inputs() for request in call), strict=True)
            velocity = self._engine(
                np.concatenate(latents), np.concatenate(timesteps), *self._constants(call)
            )
            self.advance(call, velocity)
        except Exception as error:  # the engine's failure is that of the requests in the call
            for request in call:
                self._end(request, error)
            return 0
        return len(velocity)

    def take(self) -> list[Denoising]:
        """Choose the requests of a call and mark them as in flight; none when it is better to wait."""
        self._drop_cancelled()
        with self._changed:
            call = self._chosen()
            for request in call:
                self._flying[request] = self._waiting.pop(request)
            if call:
                self._turns[call[0].size] = next(self._turn)
                self._changed.notify_all()  # a call that is full lets its size have another
        return call

    def advance(self, call: list[Denoising], velocity: Half) -> None:
        """Advance a call by its `velocity`, [rows of all its requests, C, h, w]; end the finished."""
        first = 0
        for request in call:
            request.advance(velocity[first : first + request.rows])
            first += request.rows
        with self._changed:
            for request in call:
                if not request.finished:
                    self._waiting[request] = self._flying.pop(request)
            self._changed.notify_all()
        for request in call:
            if request.finished:
                self._end(request, None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._chosen())
                if self._closed:
                    return
            self.step()

    def _drop_cancelled(self) -> None:
        with self._changed:
            waiting = list(self._waiting)
        for request in waiting:
            try:
                cancelled = request.is_cancelled()
            except Exception:  # whatever happens to one request, the loop goes on for the others
                cancelled = True
                traceback.print_exc()
            if not cancelled:
                continue
            with self._changed:  # the other thread may have taken it into a call, or ended it
                waits = self._waiting.pop(request, None) is not None
            if waits:
                self._end(request, Cancelled("cancelled by the client"))

    def _chosen(self) -> list[Denoising]:
        """The requests of the next call; none when there is nothing to call, or it is better to wait."""
        order = sorted(self._waiting, key=self._waiting.__getitem__)
        if not any(request.shares for request in (*order, *self._flying)):
            return _filled(order, order[0].size) if order and not self._flying else []  # a queue
        flying: dict[tuple[int, ...], int] = {}
        for request in self._flying:
            flying[request.size] = flying.get(request.size, 0) + request.rows
        fronts: dict[tuple[int, ...], Denoising] = {}
        for request in order:
            fronts.setdefault(request.size, request)
        free = [
            size
            for size, front in fronts.items()
            if size not in flying or (front.shares and flying[size] + front.rows > front.max_rows)
        ]
        if not free:
            return []
        return _filled(order, min(free, key=lambda size: self._turns.get(size, -1)))

    def _constants(self, call: list[Denoising]) -> tuple[Half, Half]:
        """The call's joined context and pooled, kept while the same requests stay together."""
        members = tuple(map(id, call))
        with self._changed:
            joined = self._joined.get(members)
        if joined is None:
            context = np.concatenate([request.context for request in call])
            pooled = np.concatenate([request.pooled for request in call])
            joined = context, pooled
            with self._changed:
                self._forget(call)
                self._joined[members] = joined
        return joined

    def _forget(self, requests: list[Denoising]) -> None:
        """Drop the constants of calls that one of the requests was in; an id may be used again."""
        gone = {id(request) for request in requests}
        self._joined = {key: value for key, value in self._joined.items() if not gone & set(key)}

    def _end(self, request: Denoising, error: Exception | None) -> None:
        with self._changed:
            self._waiting.pop(request, None)
            self._flying.pop(request, None)
            self._forget([request])
            self._changed.notify_all()
        try:
            request.on_end(request, error)
        except Exception:  # a client that is gone must not stop the loop for the others
            traceback.print_exc()


def _filled(order: list[Denoising], size: tuple[int, ...]) -> list[Denoising]:
    """The first requests of a size, in `order`, that fit into one call."""
    call: list[Denoising] = []
    rows = 0
    for request in order:
        if request.size == size and rows + request.rows <= request.max_rows:
            call.append(request)
            rows += request.rows
    return call
