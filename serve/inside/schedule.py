"""The step scheduler: rows of different requests, at different steps, share one engine call.

At each turn it takes the size whose oldest request has waited longest, fills one call with that size's
requests in the order in which they waited, and advances each by one step. So a new request joins at the
next step, no size starves another, and a request's result does not depend on its company (but for the
engine's own rounding).
"""

import itertools
import threading
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

    def __init__(self, engine: Engine, max_requests: int) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._turn = itertools.count()
        self._waiting: dict[Denoising, int] = {}  # request → the turn since which it waits
        self._changed = threading.Condition()
        self._closed = False
        self._joined: tuple[tuple[int, ...], Half, Half] | None = None

    def submit(self, request: Denoising) -> None:
        """Admit a request; it joins at the next step. Raises Full."""
        with self._changed:
            if self._closed or len(self._waiting) >= self._max_requests:
                raise Full(
                    "the server is stopping"
                    if self._closed
                    else f"{len(self._waiting)} requests are being denoised already: try again later"
                )
            self._waiting[request] = next(self._turn)
            self._changed.notify()

    def run(self) -> None:
        """Step until `close`; what is still unfinished then ends with Cancelled."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    break
            self.step()
        for request in list(self._waiting):
            self._end(request, Cancelled("the server is stopping"))

    def close(self) -> None:
        """Admit nothing more and let `run` return."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def step(self) -> int:
        """One engine call; returns the rows that it carried, 0 when nobody waits."""
        with self._changed:
            requests = sorted(self._waiting, key=self._waiting.__getitem__)
        for request in requests:
            try:
                cancelled = request.is_cancelled()
            except Exception:  # whatever happens to one request, the loop goes on for the others
                cancelled = True
                traceback.print_exc()
            if cancelled:
                self._end(request, Cancelled("cancelled by the client"))
        call = self._next_call([request for request in requests if request in self._waiting])
        if not call:
            return 0
        rows = 0
        try:
            latents, timesteps = zip(*(request.engine_inputs() for request in call), strict=True)
            velocity = self._engine(
                np.concatenate(latents), np.concatenate(timesteps), *self._constants(call)
            )
            for request in call:
                request.advance(velocity[rows : rows + request.rows])
                rows += request.rows
        except Exception as error:  # the engine's failure is that of the requests in the call
            for request in call:
                self._end(request, error)
            return 0
        for request in call:
            if request.finished:
                self._end(request, None)
            else:
                with self._changed:
                    self._waiting[request] = next(self._turn)
        return rows

    def _next_call(self, requests: list[Denoising]) -> list[Denoising]:
        """Requests of one size, the longest waiting first, as many as their size's rows allow."""
        call: list[Denoising] = []
        rows = 0
        for request in requests:
            if call and request.latents.shape != call[0].latents.shape:
                continue
            if rows + request.rows <= request.max_rows:
                call.append(request)
                rows += request.rows
        return call

    def _constants(self, call: list[Denoising]) -> tuple[Half, Half]:
        """The call's joined context and pooled, kept while the same requests stay together."""
        members = tuple(id(request) for request in call)
        if self._joined is None or self._joined[0] != members:
            context = np.concatenate([request.context for request in call])
            pooled = np.concatenate([request.pooled for request in call])
            self._joined = (members, context, pooled)
        return self._joined[1:]

    def _end(self, request: Denoising, error: Exception | None) -> None:
        with self._changed:
            self._waiting.pop(request, None)
        if self._joined is not None and id(request) in self._joined[0]:
            self._joined = None  # an id may be used again
        try:
            request.on_end(request, error)
        except Exception:  # a client that is gone must not stop the loop for the others
            traceback.print_exc()
