"""What an operator sees of the text's queue, the denoise loop and streams, added up in plain Python.

Triton's own metrics pass them by: to Triton 2.51 a request of a model that answers later, as `text_encoder`,
`denoiser` and `text_to_image_stream` do, is done and a success as soon as `execute` returns. So they tell
neither of its latency nor of its failure, let alone of steps and rows.

Names begin with the Triton model that publishes them: `denoiser_`, since `mmdit_` would be another model's.
`inside/publisher.py` takes the readings to Triton.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import Cancelled, Expired, Full, RequestError
from .limits import Limits
from .request import Request

MOST_SIZES = 32  # that have a label of their own; a shape set of free sizes has thousands
OTHER_SIZES = "other"
_OUTCOMES: dict[type[Exception], str] = {
    Expired: "expired",
    Cancelled: "cancelled",
    Full: "refused",
    RequestError: "invalid",
}
TEXT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True)
class Family:
    """Metrics of one name. `kind`: COUNTER, GAUGE or HISTOGRAM; `buckets`: a histogram's upper bounds."""

    name: str
    kind: str
    description: str
    buckets: tuple[float, ...] = ()


Series = tuple[Family, tuple[tuple[str, str], ...]]  # a family, and one metric's labels


@dataclass
class Readings:
    """Counters' totals, gauges' values, and what histograms have to observe since the last reading."""

    totals: Mapping[Series, float]
    values: Mapping[Series, float] = field(default_factory=dict)
    observed: list[tuple[Series, float]] = field(default_factory=list)


STEPS = Family("denoiser_steps_total", "COUNTER", "Steps that requests have made")
PHASES = Family(
    "denoiser_phase_seconds_total",
    "COUNTER",
    "Seconds of engine calls, which overlap: queued (until the request that waited longest was taken), "
    "engine, host (the scheduler's own work)",
)
REQUESTS = Family(
    "denoiser_requests", "GAUGE", "Requests in the loop: waiting for their first step, active after it"
)
ENDED = Family(
    "denoiser_requests_ended_total",
    "COUNTER",
    "Requests that have ended; a stream's, which come step by step, finish with the picture's last step",
)
DURATION = Family(
    "denoiser_request_seconds",
    "HISTOGRAM",
    "Seconds of finished requests, from arrival to last step",
    SECONDS,
)
TEXTS = Family("text_encoder_requests", "GAUGE", "Requests in the text's queue, the one worked on among them")
TEXTS_ENDED = Family(
    "text_encoder_requests_ended_total", "COUNTER", "Requests whose text is encoded, or that got an error"
)
TEXT_DURATION = Family(
    "text_encoder_request_seconds", "HISTOGRAM", "Seconds of encoded requests, from arrival on", TEXT_SECONDS
)
STREAMS = Family("text_to_image_stream_ended_total", "COUNTER", "Streams that have ended")


def outcome_of(error: Exception | None) -> str:
    """How a request ended, in the words of the label `outcome`."""
    if error is None:
        return "finished"
    return next((outcome for kind, outcome in _OUTCOMES.items() if isinstance(error, kind)), "failed")


def row_buckets(max_rows: Iterable[int]) -> tuple[float, ...]:
    """Upper bounds for rows of a call: powers of two and half-way between, and each size's most rows."""
    most = set(max_rows)
    bounds = {1 << power for power in range(max(most).bit_length())}
    bounds |= {3 * bound // 2 for bound in bounds if bound > 1}
    return tuple(float(bound) for bound in sorted(bounds | most) if bound <= max(most))


class LoopMetrics:
    """The step scheduler's observer. Its threads call it, so it only adds numbers up."""

    def __init__(self, limits: Limits) -> None:
        self._pixels = limits.pixels_per_latent
        buckets = row_buckets(rows for _, _, rows in limits.ranges)
        self._rows = Family("denoiser_call_rows", "HISTOGRAM", "Rows of engine calls", buckets)
        self._lock = threading.Lock()
        self._sizes: set[str] = set()
        # Zeros too: to Prometheus, what a counter holds when it first appears did not happen.
        self._totals = _zeros(PHASES, "phase", ("queued", "engine", "host")) | _ended(ENDED)
        self._observed: list[tuple[Series, float]] = []
        for height, width in limits.sizes:
            self._totals[STEPS, self._size((height // self._pixels, width // self._pixels))] = 0

    def called(self, call: list[Request], rows: int, queued: float, engine: float, host: float) -> None:
        """An engine call of `rows` made a step of each request."""
        with self._lock:
            size = self._size(call[0].size[1:])
            self._add((STEPS, size), len(call))
            self._observed.append(((self._rows, size), rows))
            for phase, seconds in (("queued", queued), ("engine", engine), ("host", host)):
                self._add((PHASES, (("phase", phase),)), seconds)

    def ended(self, request: Request, error: Exception | None) -> None:
        """A request has left the loop; one that a later request continues has not ended for an operator."""
        if isinstance(error, Expired) and request.ticket.streamed:
            return  # the stream's to tell: it looks after its client, and asks again
        if error is not None:
            self.rejected(error)
        elif request.state.completes:
            seconds = (time.monotonic_ns() - request.ticket.arrival) / 1e9
            with self._lock:
                self._add((ENDED, (("outcome", outcome_of(None)),)), 1)
                self._observed.append(((DURATION, self._size(request.size[1:])), seconds))

    def rejected(self, error: Exception) -> None:
        """A request got an error instead of latents, though it were before it came to the loop."""
        with self._lock:
            self._add((ENDED, (("outcome", outcome_of(error)),)), 1)

    def read(self, held: Mapping[tuple[int, ...], tuple[int, int]]) -> Readings:
        """Everything up to now. `held`: latents' (height, width) → requests waiting, and active."""
        with self._lock:
            values: dict[Series, float] = {
                (REQUESTS, (("size", size), ("state", state))): 0.0
                for size in sorted(self._sizes)
                for state in ("waiting", "active")
            }
            for latents, counts in held.items():
                for state, count in zip(("waiting", "active"), counts, strict=True):
                    series = (REQUESTS, (*self._size(latents), ("state", state)))
                    values[series] = values.get(series, 0.0) + count
            observed, self._observed = self._observed, []
            return Readings(dict(self._totals), values, observed)

    def _add(self, series: Series, amount: float) -> None:
        self._totals[series] = self._totals.get(series, 0) + amount

    def _size(self, latents: tuple[int, ...]) -> tuple[tuple[str, str]]:
        """The label of latents' (height, width), in pixels. Sizes that come late share one."""
        size = "x".join(str(self._pixels * each) for each in latents)
        if size not in self._sizes and len(self._sizes) >= MOST_SIZES:
            size = OTHER_SIZES
        self._sizes.add(size)
        return (("size", size),)


class StreamMetrics:
    """How streams ended; between two steps the denoiser does not hold them, so it cannot tell."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = _ended(STREAMS)

    def ended(self, error: Exception | None) -> None:
        """A stream has ended."""
        with self._lock:
            self._totals[STREAMS, (("outcome", outcome_of(error)),)] += 1

    def read(self) -> Readings:
        """Everything up to now."""
        with self._lock:
            return Readings(dict(self._totals))


class TextMetrics:
    """How requests for text ended, and after how long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = _ended(TEXTS_ENDED)
        self._observed: list[tuple[Series, float]] = []

    def ended(self, error: Exception | None, seconds: float) -> None:
        """A request is answered, so many seconds after it came."""
        with self._lock:
            self._totals[TEXTS_ENDED, (("outcome", outcome_of(error)),)] += 1
            if error is None:
                self._observed.append(((TEXT_DURATION, ()), seconds))

    def read(self, held: int) -> Readings:
        """Everything up to now; `held` requests are in the queue."""
        with self._lock:
            observed, self._observed = self._observed, []
            return Readings(dict(self._totals), {(TEXTS, ()): held}, observed)


def _zeros(family: Family, label: str, values: Iterable[str]) -> dict[Series, float]:
    return {(family, ((label, value),)): 0 for value in values}


def _ended(family: Family) -> dict[Series, float]:
    return _zeros(family, "outcome", ("finished", *_OUTCOMES.values(), "failed"))
