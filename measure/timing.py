"""How long a call takes on a GPU: CUDA events around each of several runs, after a warm-up."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

WARM_UP = 3
FEWEST, MOST = 5, 30  # runs
_SECONDS = 5.0  # of runs, as far as FEWEST and MOST allow


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call over `runs` runs."""

    median: float
    min: float
    max: float
    runs: int


def summed_up(milliseconds: list[float]) -> Times:
    """Median, least and most of the runs, to the microsecond."""
    return Times(
        median=round(statistics.median(milliseconds), 3),
        min=round(min(milliseconds), 3),
        max=round(max(milliseconds), 3),
        runs=len(milliseconds),
    )


def runs_for(milliseconds: float) -> int:
    """How many runs to time of a call that takes so long."""
    return max(FEWEST, min(MOST, int(_SECONDS * 1000 / max(milliseconds, 1e-3))))


def timed(call: Callable[[], object], device: str) -> Times:
    """Run `call` to warm up, then as often as takes some seconds, and time each run.

    On a CUDA device the events lie in torch's current stream, and a run starts when the one before has ended:
    what the host needs to launch the kernels counts where it is longer than the kernels.
    """
    for _ in range(WARM_UP):
        call()
    first = _once(call, device)
    return summed_up([_once(call, device) for _ in range(runs_for(first))])


def _once(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1000
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed
