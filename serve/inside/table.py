"""The scheduler's table: which requests wait, are in a call, or are between two parts of a picture."""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .call_times import CallTimes
from .errors import Cancelled, Expired
from .request import Request
from .select import select
from .ticket import Place

HOLD_SECONDS = 0.02  # a stream's place is held this long for its next part, which is on its way
KEEP_SECONDS = 1.0  # its conditions are kept this long for it
POLL_WAITING_SECONDS = 0.25  # between two questions whether a request in no call was cancelled


@dataclass(eq=False)
class Entry:
    """The scheduler's notes on a request. Times in seconds of time.perf_counter."""

    place: Place
    ready: float  # since when it waits for its next step, or for its picture's next part
    polled: float = 0.0  # when it was last asked whether it was cancelled
    cancelled: bool = False


class RequestTable:
    """Every admitted request is in one of three places. Whoever calls a method holds the scheduler's lock.

    `forget` is called with requests that have left and that no later part follows.
    """

    def __init__(self, forget: Callable[[Iterable[Request]], None]) -> None:
        self._forget = forget
        self.waiting: dict[Request, Entry] = {}  # in no call
        self.in_flight: dict[Request, Entry] = {}  # in a call
        self.between_parts: dict[int, tuple[Request, Entry]] = {}  # arrival → the part that ended
        self._turn = itertools.count()
        self._turns: dict[tuple[int, ...], int] = {}  # a size → the turn of its last call

    def resume(self, request: Request) -> bool:
        """Whether the request is the next part of a picture; if so, it takes over the conditions."""
        before = self.between_parts.pop(request.ticket.arrival, None)
        if before is not None:
            request.state.continue_from(before[0].state)
        return before is not None

    def admit(self, request: Request) -> None:
        """Let a request wait for its first step; one without an arrival arrives now."""
        request.ticket.arrival = request.ticket.arrival or time.monotonic_ns()
        self.waiting[request] = Entry(request.ticket.place, ready=time.perf_counter())

    def held(self) -> list[Request]:
        """Everyone who takes one of the scheduler's places."""
        return [*self.waiting, *self.in_flight, *self._returning()]

    def select(self, times: CallTimes) -> list[Request]:
        """The requests of the next call, if there is one to make now."""
        order = sorted(self.waiting, key=lambda request: self.waiting[request].place)
        return select(order, self.in_flight, self._returning(), self._turns, times)

    def take(self, call: list[Request]) -> None:
        """Mark the requests of a call, of one size, as in flight."""
        for request in call:
            self.in_flight[request] = self.waiting.pop(request)
        self._turns[call[0].size] = next(self._turn)

    def put_back(self, requests: list[Request]) -> None:
        """Let requests of a call wait for their next step."""
        for request in requests:
            entry = self.waiting[request] = self.in_flight.pop(request)
            entry.ready = time.perf_counter()

    def ready_since(self, call: list[Request]) -> float:
        """When the request of a call that waited longest was ready, in seconds of time.perf_counter."""
        return min(self.in_flight[request].ready for request in call)

    def remove(self, request: Request, error: Exception | None) -> None:
        """Take a request out; its place is kept if a later part of its picture follows."""
        self.waiting.pop(request, None)
        self.in_flight.pop(request, None)
        if request.continues and (error is None or isinstance(error, Expired)):
            ticket = request.ticket
            self.between_parts[ticket.arrival] = request, Entry(ticket.place, ready=time.perf_counter())
        else:
            self._forget([request])

    def pop_ended(self) -> dict[Request, Exception]:
        """Take out those that wait for nobody: their clients cancelled them or gave them no more time."""
        now = time.monotonic_ns()
        ended: dict[Request, Exception] = {}
        for request, entry in self.waiting.items():
            if entry.cancelled:
                ended[request] = Cancelled("cancelled by the client")
            elif request.ticket.has_expired(now):
                before = f"step {request.state.step + 1} of {request.state.end}"
                ended[request] = Expired(f"the time-out has passed before {before}")
        for request in ended:
            del self.waiting[request]
        return ended

    def to_poll(self, now: float) -> list[tuple[Request, Entry]]:
        """Those to ask whether they were cancelled: all in calls, of the others those not asked lately."""
        waiting = [each for each in self.waiting.items() if now - each[1].polled > POLL_WAITING_SECONDS]
        return [*self.in_flight.items(), *waiting]

    def holds(self, request: Request) -> bool:
        """Whether a request has not ended yet."""
        return request in self.waiting or request in self.in_flight

    def _returning(self) -> list[Request]:
        """Streams' parts that ended a moment ago, whose next parts have not come yet."""
        now = time.perf_counter()
        for request, entry in list(self.between_parts.values()):
            if now - entry.ready > KEEP_SECONDS:
                del self.between_parts[request.ticket.arrival]
                self._forget([request])
        return [part for part, entry in self.between_parts.values() if now - entry.ready <= HOLD_SECONDS]
