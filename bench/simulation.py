"""Serving simulated: the real step scheduler over an engine that takes simulated time, and its peers.

One engine that makes one call after the other, as a Triton instance does; before and after each call the
server's own work takes `host_ms`. Requests come from clients that wait for their picture, or at random.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.inside.denoise import DenoiseState, sigmas_for
from serve.inside.request import Request
from serve.inside.schedule import StepScheduler
from serve.inside.ticket import Ticket

Curve = Callable[[int], float]  # rows of a call → milliseconds
Size = tuple[int, int]


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes (ms), its latents' height and width, rows and steps."""

    at: float
    size: tuple[int, int] = (4, 4)
    rows: int = 2
    steps: int = 20


@dataclass
class Served:
    """What was seen: latencies in ms in the order of ending, rows of each call by size, the end (ms)."""

    latencies: list[float] = field(default_factory=list)
    calls: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    steps: int = 0
    end: float = 0.0

    @property
    def steps_per_second(self) -> float:
        """Steps of requests."""
        return 1000 * self.steps / self.end

    @property
    def pictures_per_second(self) -> float:
        """From the first moment to the end of the last picture."""
        return 1000 * len(self.latencies) / self.end

    def rows_per_call(self, size: tuple[int, int]) -> float:
        """The mean over calls of a size."""
        return float(np.mean([rows for found, rows in self.calls if found == size]))


def poisson(rate: float, count: int, seed: int = 0, **given: object) -> list[Arrival]:
    """`count` requests at `rate` a second."""
    gaps = np.random.default_rng(seed).exponential(1000 / rate, count)
    return [Arrival(at=float(at), **given) for at in np.cumsum(gaps)]  # type: ignore[arg-type]


Again = Callable[[float, Arrival], Arrival | None]  # now (ms), what has ended → the client's next request


def _no_more(now: float, ended: Arrival) -> None:
    """Clients that ask for one picture."""


def closed_loop(
    count: int, serving: Callable[..., Served], sizes: Sequence[Size] = ((4, 4),), steps: int = 20
) -> Served:
    """Each of `count` clients asks for ten pictures, one after the other, of one of the `sizes`.

    `serving` takes arrivals and `again`: what `serve` and `serve_whole` are once they have their engine.
    """
    left = 9 * count

    def again(now: float, ended: Arrival) -> Arrival | None:
        nonlocal left
        left -= 1
        return Arrival(at=now, size=ended.size, steps=steps) if left >= 0 else None

    return serving(
        [Arrival(0.01 * number, sizes[number % len(sizes)], steps=steps) for number in range(count)],
        again=again,
    )


def serve(
    arrivals: Iterable[Arrival],
    curve: Curve,
    worth: Callable[[Size], int],
    *,
    again: Again = _no_more,
    calls: int = 2,
    host_ms: float = 0.0,
) -> Served:
    """Serve requests to the end. `worth`: size → rows of a call; `again`: what a client asks next."""
    seen = Served()
    scheduler = StepScheduler(None, 1 << 30, calls)  # type: ignore[arg-type]
    tie: Iterator[int] = itertools.count()
    events: list[tuple[float, int, Callable[[], None]]] = []
    engine_free = 0.0
    in_flight = 0
    now = 0.0

    def after(at: float, what: Callable[[], None]) -> None:
        heapq.heappush(events, (at, next(tie), what))

    def come(arrival: Arrival) -> None:
        def ended(request: Request, error: Exception | None) -> None:
            assert error is None, error
            seen.latencies.append(now - arrival.at)
            following = again(now, arrival)
            if following is not None:
                after(following.at, lambda: come(following))

        state = DenoiseState(
            latents=np.zeros((1, *arrival.size), np.float32),
            conditions={"context": np.zeros((arrival.rows, 1, 1), np.float16)},
            sigmas=sigmas_for(arrival.steps, 3.0, 1000),
            guidance_scale=4.5,
            train_timesteps=1000,
            step=0,
            end=arrival.steps,
            guided=(0, arrival.steps),
        )
        scheduler.submit(Request(state, worth(arrival.size), seed=0, ticket=Ticket(on_end=ended)))
        start()

    def start() -> None:
        nonlocal in_flight, engine_free
        while in_flight < calls and (call := scheduler.schedule()):
            rows = sum(request.rows for request in call)
            seen.calls.append((call[0].size[1:], rows))
            in_flight += 1
            begin = max(now + host_ms / 2, engine_free)
            engine_free = begin + curve(rows)
            after(engine_free + host_ms / 2, lambda call=call, rows=rows: finish(call, rows))  # type: ignore[misc]

    def finish(call: list[Request], rows: int) -> None:
        nonlocal in_flight
        in_flight -= 1
        seen.steps += len(call)
        scheduler.call_times.note(call[0].size, host_ms, curve(rows))
        scheduler.advance(call, np.zeros((rows, *call[0].size), np.float16))
        start()

    for arrival in arrivals:
        after(arrival.at, lambda arrival=arrival: come(arrival))  # type: ignore[misc]
    while events:
        now, _, what = heapq.heappop(events)
        what()
    seen.end = now
    return seen


def serve_whole(
    arrivals: Iterable[Arrival],
    curve: Curve,
    most: Callable[[Size], int],
    *,
    again: Again = _no_more,
) -> Served:
    """The peer: a dynamic batcher before an engine that makes whole pictures, first come first.

    Whenever the engine is free it takes the oldest request and those of its size and steps that wait too, up
    to `most` rows, and makes all of their steps; who comes meanwhile waits. With the rows of one request it
    is one picture at a time.
    """
    seen = Served()
    tie: Iterator[int] = itertools.count()
    coming: list[tuple[float, int, Arrival]] = [(each.at, next(tie), each) for each in arrivals]
    heapq.heapify(coming)
    waiting: list[Arrival] = []
    while coming or waiting:
        if not waiting:
            seen.end = max(seen.end, coming[0][0])
        while coming and coming[0][0] <= seen.end:
            waiting.append(heapq.heappop(coming)[2])
        batch: list[Arrival] = []
        rows = 0
        for each in waiting:
            if (each.size, each.steps) == (waiting[0].size, waiting[0].steps):
                if batch and rows + each.rows > most(each.size):
                    break
                batch.append(each)
                rows += each.rows
        taken = set(map(id, batch))
        waiting = [each for each in waiting if id(each) not in taken]
        seen.end += batch[0].steps * curve(rows)
        seen.calls += [(batch[0].size, rows)] * batch[0].steps
        for each in batch:
            seen.steps += each.steps
            seen.latencies.append(seen.end - each.at)
            following = again(seen.end, each)
            if following is not None:
                heapq.heappush(coming, (following.at, next(tie), following))
    return seen
