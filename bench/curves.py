"""What a call takes by its rows: the curves that simulated engines follow.

Two invented ones, the roofline's lower bounds of SD3.5 on a GPU, and tables that `make gpu-check` measured.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.simulation import Served, Size, serve, serve_whole
from engines.forecast.model_costs import published
from engines.forecast.roofline import FP8, FP16, step
from mmdit.gpus import CARDS
from mmdit.shapes import shape_set
from mmdit.step_times import read
from serve.inside.batching import milliseconds_of, profitable_rows

ROWS = (1, 2, 4, 8, 16)
PAIR = 2  # rows of a request with guidance
# the policies, as tables and charts call them
ONE, WHOLE, STEPS, UNTOLD = (
    "one at a time",
    "whole requests in batches",
    "step scheduler",
    "step scheduler without a table",
)


@dataclass(frozen=True)
class EngineCurve:
    """An engine: `table` is rows → milliseconds, `most` the rows that a call may have, `steps` a picture."""

    name: str
    table: tuple[tuple[int, float], ...]
    most: int = 16
    steps: int = 20

    def __call__(self, rows: int) -> float:
        """Milliseconds of a call."""
        return milliseconds_of(dict(self.table), rows)

    @property
    def price(self) -> float:
        """What a second request costs in a call, as a share of what it costs alone."""
        return (self(2 * PAIR) - self(PAIR)) / self(PAIR)

    @property
    def worth(self) -> int:
        """The rows of a call that the step scheduler finds worth sharing, told this table."""
        return profitable_rows(dict(self.table), self.most)

    @property
    def alone(self) -> float:
        """Seconds of a picture that has the engine for itself."""
        return self.steps * self(PAIR) / 1000

    def serving(self, policy: str, arrivals: object, **given: object) -> Served:
        """Serve requests by one of the policies."""
        rows = {ONE: PAIR, WHOLE: self.most, STEPS: self.worth, UNTOLD: self.most}[policy]
        peer = policy in (ONE, WHOLE)
        return (serve_whole if peer else serve)(arrivals, self, partial(_same, rows), **given)  # type: ignore


def _same(rows: int, size: Size) -> int:
    """The same rows at every size."""
    return rows


SUB_LINEAR = EngineCurve("20 + 2r ms", tuple((rows, 20 + 2.0 * rows) for rows in ROWS))
LINEAR = EngineCurve("19.4r ms", tuple((rows, 19.4 * rows) for rows in ROWS))


def priced(price: float) -> EngineCurve:
    """An invented engine: a request costs 24 ms a step, and each further one in its call `price` of that."""
    times = ((rows, 24 * (1 + price * (rows / PAIR - 1))) for rows in ROWS)
    return EngineCurve(f"{price:.2f}", tuple(times))


def roofline() -> list[EngineCurve]:
    """SD3.5 Medium and Large at 512² and 1024², FP8 and FP16, on the first known GPU: lower bounds."""
    return [
        EngineCurve(
            f"{model.family.variant.capitalize()}, {side}², {variant.name.upper()}",
            tuple((rows, step(model, CARDS[0], variant, (side, side), rows)) for rows in ROWS),
            shape_set(model.family, f"square-{side}").rows_at(side, side),
            model.family.steps,
        )
        for model in published()
        for side in (512, 1024)
        for variant in (FP8, FP16)
    ]


def measured(path: Path) -> EngineCurve:
    """A table that was measured, as the engine that it tells of."""
    times = read(path)
    height, width = times.size
    return EngineCurve(
        f"{times.model}, {height}×{width}, {times.precision}, {times.gpu}",
        tuple(sorted(times.milliseconds.items())),
        max(PAIR, max(times.milliseconds)),
    )
