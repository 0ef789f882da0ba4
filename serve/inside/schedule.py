"""The step scheduler: rows of different requests, at different steps, share one engine call.

Up to `calls` engine calls are in flight at once, so that the server's own work hides behind the engine's.
`inside/choice.py` tells which requests a call takes.
"""

import itertools
import threading
import time
import traceback
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .choice import Pace, chosen, place
from .denoise import Denoising
from .errors import Cancelled, Expired, Full

Half = npt.NDArray[np.float16]
HOLD = 0.02  # seconds that a stream's place is kept for its next part, which is on its way
KEPT = 1.0  # seconds that its text is kept for it
LOOK, LOOK_AT_WAITING = 0.05, 0.25  # seconds after which a request is asked whether it was cancelled


class Engine(Protocol):
    """What makes an engine call; both methods may be called from two threads at once."""

    def constants(self, context: Half, pooled: Half) -> Any:
        """What the calls of the same requests share, made once: context [r, T, D] and pooled [r, P]."""

    def __call__(self, latent: Half, timestep: npt.NDArray[np.float32], constants: Any) -> Half:
        """Velocity [r, C, h, w] of latent [r, C, h, w] at timestep [r, 1]."""


class Observer(Protocol):
    """What is told of the scheduler's work, by the threads that do it and without its lock."""

    def called(self, call: list[Denoising], rows: int, queued: float, engine: float, host: float) -> None:
        """An engine call was made; seconds since its longest waiting request was ready, in the engine, and
        of the scheduler's own work."""

    def ended(self, request: Denoising, error: Exception | None) -> None:
        """A request has finished, or ended with the error; also one that was refused."""


class StepScheduler:
    """Advances every admitted request step by step; `run` in one thread, `submit` from any."""

    def __init__(
        self, engine: Engine, max_requests: int, calls: int = 2, observer: Observer | None = None
    ) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._calls = calls
        self._observer = observer
        self.pace = Pace()
        self._turn = itertools.count()
        self._waiting: dict[Denoising, tuple[int, int]] = {}  # admitted, in no call → priority, arrival
        self._flying: dict[Denoising, tuple[int, int]] = {}  # in a call
        self._parked: dict[int, Denoising] = {}  # arrival → a stream's part that ended, until the next comes
        self._turns: dict[tuple[int, ...], int] = {}  # a size → the turn of its last call
        self._changed = threading.Condition()
        self._asking = threading.Lock()  # held while a request is asked whether it was cancelled
        self._closing = threading.Event()
        self._constants: dict[tuple[tuple[int, int], ...], Any] = {}  # texts of a call → what the engine made

    def submit(self, request: Denoising) -> None:
        """Admit a request; it joins at the next step. Raises Full, but not for a picture that has begun."""
        refused = None
        with self._changed:
            before = self._parked.pop(request.arrival, None)
            if before is not None:  # its text is known, and so is what the engine made of it
                request.context, request.pooled = before.context, before.pooled
            held = len(self._waiting) + len(self._flying) + len(self._kept(HOLD))
            if self._closing.is_set():
                refused = Full("the server is stopping")
            elif held >= self._max_requests and before is None and request.begin == 0:
                refused = Full(f"{held} requests are being denoised already: try again later")
            else:
                request.ready = time.perf_counter()
                request.arrival = request.arrival or time.monotonic_ns()
                self._waiting[request] = place(request)
                self._changed.notify_all()
        if refused is not None:
            self._tell("ended", request, refused)
            raise refused

    def held(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """Latents' (height, width) → requests that wait for their first step, and that have begun."""
        counts: dict[tuple[int, ...], tuple[int, int]] = {}
        with self._changed:
            for request in (*self._waiting, *self._flying, *self._kept(HOLD)):
                begun = request in self._flying or request.step > 0
                waiting, active = counts.get(request.size[1:], (0, 0))
                counts[request.size[1:]] = (waiting + (not begun), active + begun)
        return counts

    def run(self) -> None:
        """Step until `close`; what is still unfinished then ends with Full, as what comes too late does."""
        threads = [
            threading.Thread(target=self._work, name=f"steps {number}") for number in range(self._calls)
        ]
        threads.append(threading.Thread(target=self._look, name="cancelled"))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for request in list(self._waiting):
            self._end(request, Full("the server is stopping"))

    def close(self) -> None:
        """Admit nothing more and let `run` return."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()

    def step(self) -> int:
        """One engine call; returns the rows that it carried, 0 when there is none to make."""
        begin = time.perf_counter()
        call = self.take()
        if not call:
            return 0
        alone = len(self._flying) == len(call)
        taken = time.perf_counter()
        queued = max(0.0, taken - min(request.ready for request in call))
        try:
            latent, timestep = _stacked(call)
            constants = self._constants_of(call)
            asked = time.perf_counter()
            velocity = self._engine(latent, timestep, constants)
            answered = time.perf_counter()
            alone = alone and len(self._flying) == len(call)
            self.advance(call, velocity)
        except Exception as error:  # the engine's failure is that of the requests in the call
            for request in call:
                self._end(request, error)
            return 0
        host = time.perf_counter() - answered + asked - begin
        with self._changed:
            self.pace.note(call[0].size, host, answered - asked if alone else None)
        self._tell("called", call, len(velocity), queued, answered - asked, host)
        return len(velocity)

    def take(self) -> list[Denoising]:
        """Choose the requests of a call and mark them as in flight; none when it is better to wait."""
        self._drop_ended()
        with self._changed:
            call = self._chosen()
            for request in call:
                self._flying[request] = self._waiting.pop(request)
            if call:
                self._turns[call[0].size] = next(self._turn)
                if self._waiting:  # there may be another for the other thread
                    self._changed.notify_all()
        return call

    def look(self) -> None:
        """Ask whether requests were cancelled, and end those that were.

        To ask is a round trip to the server: those in calls are asked each time, the others now and then.
        """
        now = time.perf_counter()
        with self._changed:
            waiting = [each for each in self._waiting if now - each.asked > LOOK_AT_WAITING]
            likely = [*self._flying, *waiting]
        for request in likely:
            with self._asking:
                if request in self._waiting or request in self._flying:
                    request.asked = now
                    request.cancelled = self._is_cancelled(request)
        self._drop_ended()

    def advance(self, call: list[Denoising], velocity: Half) -> None:
        """Advance a call by its `velocity`, [rows of all its requests, C, h, w]; end the finished."""
        first = 0
        for request in call:
            rows = request.rows  # of this step; the next may take another number
            request.advance(velocity[first : first + rows])
            first += rows
        going_on = [request for request in call if not request.finished]
        with self._changed:
            for request in going_on:
                request.ready = time.perf_counter()
                self._waiting[request] = self._flying.pop(request)
        for request in call:
            if request.finished:
                self._end(request, request.fault)

    def _work(self) -> None:
        closing = self._closing.is_set
        while not closing():
            with self._changed:
                self._changed.wait_for(lambda: closing() or self._chosen(), HOLD if self._parked else None)
            if not closing():
                self.step()

    def _look(self) -> None:
        while not self._closing.wait(LOOK):
            self.look()

    def _is_cancelled(self, request: Denoising) -> bool:
        try:
            return request.is_cancelled()
        except Exception:  # whatever happens to one request, the loop goes on for the others
            traceback.print_exc()
            return True

    def _drop_ended(self) -> None:
        """End those that wait for nobody: their clients have cancelled them or gave them no more time."""
        now = time.monotonic_ns()
        ended: dict[Denoising, Exception] = {}
        with self._changed:
            for request in self._waiting:
                if request.cancelled:
                    ended[request] = Cancelled("cancelled by the client")
                elif 0 < request.deadline <= now:
                    before = f"step {request.step + 1} of {request.end}"
                    ended[request] = Expired(f"the time-out has passed before {before}")
            for request in ended:  # no other thread may take it into a call now, or end it
                del self._waiting[request]
        for request, reason in ended.items():
            self._end(request, reason)

    def _chosen(self) -> list[Denoising]:
        """The requests of the next call, if there is one to make now."""
        return chosen(self._waiting, self._flying, self._kept(HOLD), self._turns, self.pace)

    def _kept(self, seconds: float) -> list[Denoising]:
        """Streams' parts that ended at most so long ago, whose next parts have not come yet."""
        now = time.perf_counter()
        for arrival in [key for key, each in self._parked.items() if now - each.ready > KEPT]:
            self._forget([self._parked.pop(arrival)])
        return [each for each in self._parked.values() if now - each.ready <= seconds]

    def _constants_of(self, call: list[Denoising]) -> Any:
        """The engine's constants of the call, kept while the same requests stay together."""
        members = tuple((id(request.context), request.rows) for request in call)
        with self._changed:
            constants = self._constants.get(members)
        if constants is None:
            contexts, pooleds = zip(*(request.text for request in call), strict=True)
            constants = self._engine.constants(_joined(contexts), _joined(pooleds))
            with self._changed:
                self._forget(call)
                self._constants[members] = constants
        return constants

    def _forget(self, requests: list[Denoising]) -> None:
        """Drop the constants of calls that one of the requests was in; an id may be used again."""
        gone = {id(request.context) for request in requests}
        self._constants = {
            members: constants
            for members, constants in self._constants.items()
            if gone.isdisjoint(member for member, _ in members)
        }

    def _end(self, request: Denoising, error: Exception | None) -> None:
        with self._changed:
            self._waiting.pop(request, None)
            self._flying.pop(request, None)
            if request.continues and (error is None or isinstance(error, Expired)):
                request.ready = time.perf_counter()
                self._parked[request.arrival] = request
            else:
                self._forget([request])
            self._changed.notify_all()
        with self._asking:  # who asks now has its answer before the request's own ends what it asks
            pass
        self._tell("ended", request, error)
        try:
            request.on_end(request, error)
        except Exception:  # a client that is gone must not stop the loop for the others
            traceback.print_exc()

    def _tell(self, event: str, *what: Any) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, event)(*what)
        except Exception:  # nor must who only looks on
            traceback.print_exc()


def _joined(parts: tuple[Half, ...]) -> Half:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _stacked(call: list[Denoising]) -> tuple[Half, npt.NDArray[np.float32]]:
    """The call's latents [r, C, h, w] and timesteps [r, 1]."""
    latents, timesteps = zip(*(request.engine_inputs() for request in call), strict=True)
    return _joined(latents), np.concatenate(timesteps)
