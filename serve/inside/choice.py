"""Which requests the next engine call takes.

Where sharing pays. A request's `max_rows` is the most rows of a call of its size that do: what the shape
set allows, or less where more rows take so much longer that waiting one's turn is better
(`inside/sharing.py`). Of each size the first requests by priority and arrival that fill such a call are in
front. Sizes in front take turns, so none starves. A size gets a second call in flight only when its first one
is full: a request that came meanwhile joins at the next step, and loops do not fall apart into half-empty
calls. For the same reason a call waits a little for a stream's next part: a stream asks for one step after
the other, and is back within milliseconds.

Where no size has room for more than one request with guidance, turns would only delay. There the first
request runs to its end, as in a queue, and others ride along only in what rows it leaves; a second one is in
flight only where so many wait that hiding the server's own work shortens their mean wait (`Pace`).
"""

import math
from collections.abc import Collection, Mapping

from .denoise import Denoising

Size = tuple[int, ...]
Place = tuple[int, int]  # priority, arrival: the lowest goes first
SMOOTHING = 0.9  # of an average that each call moves a little


class Pace:
    """What calls take that have the engine for themselves, by size, in seconds: the engine's time, and the
    server's own work before and after it.
    """

    def __init__(self) -> None:
        self._times: dict[Size, tuple[float, float]] = {}

    def note(self, size: Size, engine: float, host: float) -> None:
        """Another call was made."""
        known = self._times.get(size, (engine, host))
        self._times[size] = (
            SMOOTHING * known[0] + (1 - SMOOTHING) * engine,
            SMOOTHING * known[1] + (1 - SMOOTHING) * host,
        )

    def hides(self, size: Size, requests: int) -> bool:
        """Whether `requests` end sooner in the mean when always two are in flight than one after the other.

        With e in the engine and h of own work, n requests end after e + h, 2 (e + h), … times their steps,
        (n + 1) (e + h) / 2 in the mean; two by two, the work hidden, after 2 e, 2 e, 4 e, …: (n + 2) e / 2.
        """
        engine, host = self._times.get(size, (math.inf, 0.0))
        return (requests + 1) * host > engine


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
    if flying and not pace.hides(first.size, len(order) + len(flying)):
        return []
    if any(place(each) < place(first) for each in returning):
        return []
    return _filled(order, first.size)


def _filled(order: list[Denoising], size: Size) -> list[Denoising]:
    """The first request of a size, in `order`, and those after it that fit into one call with it."""
    call: list[Denoising] = []
    rows = 0
    for request in order:
        if request.size == size and (not call or rows + request.rows <= request.max_rows):
            call.append(request)
            rows += request.rows
    return call
