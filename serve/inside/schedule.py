"""The step scheduler: rows of different requests, at different steps, share one engine call.

Up to `calls` engine calls are in flight at once, so that the server's own work hides behind the engine's.
`table.py` holds the requests, and `select.py` decides which of them a call takes.
"""

import threading
import time
import traceback
from typing import Any, NamedTuple, Protocol

from .call_times import CallTimes
from .engine_call import Array, Constants, Engine, engine_inputs
from .errors import Full
from .request import Request
from .table import HOLD_SECONDS, RequestTable

POLL_SECONDS = 0.05  # between two questions whether a request in a call was cancelled


class Observer(Protocol):
    """What is told of the scheduler's work, by the threads that do it and without its lock."""

    def called(self, call: list[Request], rows: int, queued: float, engine: float, host: float) -> None:
        """An engine call was made; seconds since its longest waiting request was ready, in the engine, and
        of the scheduler's own work."""

    def ended(self, request: Request, error: Exception | None) -> None:
        """A request has finished, or ended with the error; also one that was refused."""


class EngineTime(NamedTuple):
    """Seconds that a call's requests waited and that the engine took; `alone`: no other call was in it."""

    queued: float
    engine: float
    alone: bool


class StepScheduler:
    """Advances every admitted request step by step; `run` in one thread, `submit` from any."""

    def __init__(
        self, engine: Engine, max_requests: int, calls: int = 2, observer: Observer | None = None
    ) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._calls = calls
        self._observer = observer
        self.call_times = CallTimes()
        self._constants = Constants(engine)
        self._table = RequestTable(self._constants.forget)
        self._changed = threading.Condition()  # the table's lock
        self._polling = threading.Lock()  # held while a request is asked whether it was cancelled
        self._closing = threading.Event()

    def submit(self, request: Request) -> None:
        """Admit a request; it joins at the next step. Raises Full, but not for a picture that has begun."""
        refused = None
        with self._changed:
            begun = self._table.resume(request) or request.state.begin > 0
            held = len(self._table.held())
            if self._closing.is_set():
                refused = Full("the server is stopping")
            elif held >= self._max_requests and not begun:
                refused = Full(f"{held} requests are being denoised already: try again later")
            else:
                self._table.admit(request)
                self._changed.notify_all()
        if refused is not None:
            self._tell("ended", request, refused)
            raise refused

    def held(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """Latents' (height, width) → requests that wait for their first step, and that have begun."""
        counts: dict[tuple[int, ...], tuple[int, int]] = {}
        with self._changed:
            for request in self._table.held():
                begun = request in self._table.in_flight or request.state.step > 0
                waiting, active = counts.get(request.size[1:], (0, 0))
                counts[request.size[1:]] = (waiting + (not begun), active + begun)
        return counts

    def step(self) -> int:
        """Make one engine call; returns the rows that it carried, 0 when there is none to make."""
        begin = time.perf_counter()
        call = self.schedule()
        if not call:
            return 0
        try:
            velocity, times = self._run_engine(call)
            self.advance(call, velocity)
        except Exception as error:  # the engine's failure is that of the requests in the call
            for request in call:
                self._end(request, error)
            return 0
        self._record(call, len(velocity), times, time.perf_counter() - begin)
        return len(velocity)

    def schedule(self) -> list[Request]:
        """Choose the requests of a call and mark them as in flight; none when it is better to wait."""
        self._end_dropped()
        with self._changed:
            call = self._table.select(self.call_times)
            if call:
                self._table.take(call)
                if self._table.waiting:  # there may be another for the other thread
                    self._changed.notify_all()
        return call

    def advance(self, call: list[Request], velocity: Array) -> None:
        """Advance a call by its `velocity`, [rows of all its requests, C, h, w]; end the finished."""
        first = 0
        for request in call:
            rows = request.rows  # of this step; the next may take another number
            request.state.advance(velocity[first : first + rows])
            first += rows
        with self._changed:
            self._table.put_back([request for request in call if not request.state.finished])
        for request in call:
            if request.state.finished:
                self._end(request, request.state.fault)

    def poll_cancellations(self) -> None:
        """Ask whether requests were cancelled, and end those that were.

        To ask is a round trip to the server: those in calls are asked each time, the others now and then.
        """
        now = time.perf_counter()
        with self._changed:
            requests = self._table.to_poll(now)
        for request, entry in requests:
            with self._polling:
                if self._table.holds(request):
                    entry.polled = now
                    entry.cancelled = _is_cancelled(request)
        self._end_dropped()

    def run(self) -> None:
        """Step until `close`; what is still unfinished then ends with Full, as what comes too late does."""
        threads = [
            threading.Thread(target=self._keep_stepping, name=f"steps {number}")
            for number in range(self._calls)
        ]
        threads.append(threading.Thread(target=self._keep_polling, name="cancelled"))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for request in list(self._table.waiting):
            self._end(request, Full("the server is stopping"))

    def close(self) -> None:
        """Admit nothing more and let `run` return."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()

    def _keep_stepping(self) -> None:
        closing, table = self._closing.is_set, self._table
        while not closing():
            with self._changed:
                self._changed.wait_for(
                    lambda: closing() or table.select(self.call_times),
                    HOLD_SECONDS if table.between_parts else None,
                )
            if not closing():
                self.step()

    def _keep_polling(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            self.poll_cancellations()

    def _run_engine(self, call: list[Request]) -> tuple[Array, EngineTime]:
        """The engine's velocity of a call, [rows, C, h, w], and the time it took."""
        in_flight = self._table.in_flight
        alone = len(in_flight) == len(call)
        queued = max(0.0, time.perf_counter() - self._table.ready_since(call))
        latent, timestep = engine_inputs(call)
        constants = self._constants.of(call)
        asked = time.perf_counter()
        velocity = self._engine(latent, timestep, constants)
        engine = time.perf_counter() - asked
        return velocity, EngineTime(queued, engine, alone and len(in_flight) == len(call))

    def _record(self, call: list[Request], rows: int, times: EngineTime, seconds: float) -> None:
        """Note a step that took so many seconds, the engine's among them."""
        host = seconds - times.engine
        with self._changed:
            self.call_times.note(call[0].size, host, times.engine if times.alone else None)
        self._tell("called", call, rows, times.queued, times.engine, host)

    def _end_dropped(self) -> None:
        """End those that wait for nobody: their clients have cancelled them or gave them no more time."""
        with self._changed:
            ended = self._table.pop_ended()  # no other thread may take them into a call now, or end them
        for request, reason in ended.items():
            self._end(request, reason)

    def _end(self, request: Request, error: Exception | None) -> None:
        with self._changed:
            self._table.remove(request, error)
            self._changed.notify_all()
        with self._polling:  # who asks now has its answer before the request's own ends what it asks
            pass
        self._tell("ended", request, error)
        try:
            request.ticket.on_end(request, error)
        except Exception:  # a client that is gone must not stop the loop for the others
            traceback.print_exc()

    def _tell(self, event: str, *what: Any) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, event)(*what)
        except Exception:  # nor must who only looks on
            traceback.print_exc()


def _is_cancelled(request: Request) -> bool:
    try:
        return request.ticket.is_cancelled()
    except Exception:  # whatever happens to one request, the loop goes on for the others
        traceback.print_exc()
        return True
