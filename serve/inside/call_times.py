"""What recent engine calls took, and whether two of them should overlap."""

from collections import deque
from statistics import median

Size = tuple[int, ...]
RECENT_CALLS = 9


class CallTimes:
    """What recent calls took, by size, in seconds: the engine's time when a call had it for itself, and the
    server's own work before and after it. Medians, since some calls are interrupted.
    """

    def __init__(self) -> None:
        self._engine: dict[Size, deque[float]] = {}
        self._host: dict[Size, deque[float]] = {}

    def note(self, size: Size, host: float, engine: float | None) -> None:
        """Add a call; `engine` is None when it shared the engine with another call."""
        for times, seconds in ((self._host, host), (self._engine, engine)):
            if seconds is not None:
                times.setdefault(size, deque(maxlen=RECENT_CALLS)).append(seconds)

    def overlap_pays(self, size: Size, calls: int) -> bool:
        """Whether requests that fill so many calls end sooner in the mean when always two are in flight than
        one after the other.

        With e in the engine and h of own work, n of them end after e + h, 2 (e + h), … times their steps,
        (n + 1) (e + h) / 2 in the mean; two by two, h hidden behind e, after 2 e, 2 e, 4 e, …:
        (n + 2) e / 2 when n is even, a little less when it is odd.
        """
        if size not in self._engine or size not in self._host:
            return False
        return (calls + 1) * median(self._host[size]) > median(self._engine[size])
