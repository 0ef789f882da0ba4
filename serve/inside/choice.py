"""Which requests the next engine call takes.

Where sharing pays. A request's `max_rows` is the most rows of a call of its size that do: what the shape
set allows, or less where more rows take so much longer that waiting one's turn is better
(`inside/sharing.py`). Of each size the first requests by priority and arrival that fill such a call are in
front. Sizes in front take turns, so none starves. A size gets a second call in flight only when its first one
is full: a request that came meanwhile joins at the next step, and loops do not fall apart into half-empty
calls. For the same reason a call waits a little for a stream's next part: a stream asks for one step after
the other, and is back within milliseconds.

Where no size has room for more than one request with guidance, turns would only delay. There the first
request runs to its end, as in a queue, and others ride along only in what rows it leaves. A second call, of
the same size and priority, is in flight only where so many wait that hiding the server's own work shortens
their mean wait (`Pace`).
"""

import math
from collections import deque
from collections.abc import Collection, Mapping
from statistics import median

from .denoise import Denoising

Size = tuple[int, ...]
Place = tuple[int, int]  # priority, arrival: the lowest goes first
LATELY = 9  # calls


class Pace:
    """What calls take lately, by size, in seconds: the engine's time when a call has it for itself, and the
    server's own work before and after it. Medians, since some calls are interrupted.
    """

    def __init__(self) -> None:
        self._engine: dict[Size, deque[float]] = {}
        self._host: dict[Size, deque[float]] = {}

    def note(self, size: Size, host: float, engine: float | None) -> None:
        """Another call was made; `engine` is None when it shared the engine with another call."""
        for times, seconds in ((self._host, host), (self._engine, engine)):
            if seconds is not None:
                times.setdefault(size, deque(maxlen=LATELY)).append(seconds)

    def hides(self, size: Size, calls: int) -> bool:
        """Whether requests that fill so many calls end sooner in the mean when always two are in flight than
        one after the other.

        With e in the engine and h of own work, n of them end after e + h, 2 (e + h), … times their steps,
        (n + 1) (e + h) / 2 in the mean; two by two, h hidden behind e, after 2 e, 2 e, 4 e, …:
        (n + 2) e / 2 when n is even, a little less when it is odd.
        """
        if size not in self._engine or size not in self._host:
            return False
        return (calls + 1) * median(self._host[size]) > median(self._engine[size])


def place(request: Denoising) -> Place:
    """Where a request stands among those that wait."""
    return request.priority, request.arrival


def chosen(
    waiting: Mapping[Denoising, Place],
    flying: Collection[Denoising],
    returning: Collection[Denoising],
    turns: Mapping[Size, int],
    pace: Pace,
) -> list[Denoising]:
    """The requests of the next call; none when there is nothing to call, or it is better to wait.

    `flying` are in calls now; `returning` are streams' parts that ended, whose next parts are on their way;
    `turns` tells of each size when it last had a call.
    """
    order = sorted(waiting, key=waiting.__getitem__)
    if not order:
        return []
    if not any(request.shares for request in (*order, *flying)):
        return _of_queue(order, flying, returning, pace)
    rows_flying: dict[Size, int] = {}
    for request in flying:
        rows_flying[request.size] = rows_flying.get(request.size, 0) + request.rows
    fronts: dict[Size, Denoising] = {}
    for request in order:
        fronts.setdefault(request.size, request)
    free = [
        size
        for size, front in fronts.items()
        if size not in rows_flying or (front.shares and rows_flying[size] + front.rows > front.max_rows)
    ]
    for request in returning:
        rows = sum(each.rows for each in order if each.size == request.size)
        if request.size in free and rows + request.rows <= request.max_rows:
            free.remove(request.size)
    if not free:
        return []
    return _filled(order, min(free, key=lambda size: (fronts[size].priority, turns.get(size, -1))))


def _of_queue(
    order: list[Denoising], flying: Collection[Denoising], returning: Collection[Denoising], pace: Pace
) -> list[Denoising]:
    first = order[0]
    if any(place(each) < place(first) for each in returning):
        return []
    if flying:
        alike = [each for each in (*flying, *order) if _kind(each) == _kind(first)]
        most = max(first.max_rows, first.rows)
        if any(_kind(each) != _kind(first) for each in flying):
            return []
        if sum(each.rows for each in flying) + first.rows <= most:  # it rides along in the next call
            return []
        if not pace.hides(first.size, math.ceil(sum(each.rows for each in alike) / most)):
            return []
    return _filled(order, first.size)


def _kind(request: Denoising) -> tuple[Size, int]:
    """What two requests of a queue have in common when it does not matter which of them goes first."""
    return request.size, request.priority


def _filled(order: list[Denoising], size: Size) -> list[Denoising]:
    """The first request of a size, in `order`, and those after it that fit into one call with it."""
    call: list[Denoising] = []
    rows = 0
    for request in order:
        if request.size == size and (not call or rows + request.rows <= request.max_rows):
            call.append(request)
            rows += request.rows
    return call
