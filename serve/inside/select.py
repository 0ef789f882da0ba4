"""Which requests the next engine call takes.

Where sharing pays. A request's `max_rows` is the most rows of a call of its size that do: what the shape
set allows, or less where more rows take so much longer that waiting one's turn is better
(`inside/batching.py`). Of each size the first requests by priority and arrival that fill such a call are in
front. Sizes in front take turns, so none starves. A size gets a second call in flight only when its first one
is full: a request that came meanwhile joins at the next step, and loops do not fall apart into half-empty
calls. For the same reason a call waits a little for a stream's next part: a stream asks for one step after
the other, and is back within milliseconds.

Where no size has room for more than one request with guidance, turns would only delay. There the first
request runs to its end, as in a queue, and others ride along only in what rows it leaves. A second call, of
the same size and priority, is in flight only where so many wait that hiding the server's own work shortens
their mean wait (`CallTimes`).
"""

import math
from collections.abc import Collection, Mapping

from .call_times import CallTimes, Size
from .request import Request


def select(
    order: list[Request],
    in_flight: Collection[Request],
    returning: Collection[Request],
    turns: Mapping[Size, int],
    times: CallTimes,
) -> list[Request]:
    """The requests of the next call; none when there is nothing to call, or it is better to wait.

    `order`: those that wait, the first to go first. `in_flight`: those in calls now. `returning`: streams'
    parts that ended, whose next parts are on their way. `turns`: a size → the turn of its last call.
    """
    if not order:
        return []
    if not any(request.shares for request in (*order, *in_flight)):
        return _of_queue(order, in_flight, returning, times)
    rows_in_flight: dict[Size, int] = {}
    for request in in_flight:
        rows_in_flight[request.size] = rows_in_flight.get(request.size, 0) + request.rows
    fronts: dict[Size, Request] = {}
    for request in order:
        fronts.setdefault(request.size, request)
    free = [
        size
        for size, front in fronts.items()
        if size not in rows_in_flight or (front.shares and rows_in_flight[size] + front.rows > front.max_rows)
    ]
    for request in returning:
        rows = sum(each.rows for each in order if each.size == request.size)
        if request.size in free and rows + request.rows <= request.max_rows:
            free.remove(request.size)
    if not free:
        return []
    return _filled(order, min(free, key=lambda size: (fronts[size].ticket.priority, turns.get(size, -1))))


def _of_queue(
    order: list[Request], in_flight: Collection[Request], returning: Collection[Request], times: CallTimes
) -> list[Request]:
    first = order[0]
    if any(each.ticket.place < first.ticket.place for each in returning):
        return []
    if in_flight:
        alike = [each for each in (*in_flight, *order) if _kind(each) == _kind(first)]
        most = max(first.max_rows, first.rows)
        if any(_kind(each) != _kind(first) for each in in_flight):
            return []
        if sum(each.rows for each in in_flight) + first.rows <= most:  # it rides along in the next call
            return []
        if not times.overlap_pays(first.size, math.ceil(sum(each.rows for each in alike) / most)):
            return []
    return _filled(order, first.size)


def _kind(request: Request) -> tuple[Size, int]:
    """What two requests of a queue have in common when it does not matter which of them goes first."""
    return request.size, request.ticket.priority


def _filled(order: list[Request], size: Size) -> list[Request]:
    """The first request of a size, in `order`, and those after it that fit into one call with it."""
    call: list[Request] = []
    rows = 0
    for request in order:
        if request.size == size and (not call or rows + request.rows <= request.max_rows):
            call.append(request)
            rows += request.rows
    return call
