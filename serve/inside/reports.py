"""What a streamed request wants to be told on the way, and how long it may take."""

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from .admission import deadline_in, priority_of
from .errors import Expired, RequestError
from .fields import flag, whole

LOOK = 500_000  # microseconds


@dataclass(frozen=True)
class Reports:
    """A report after every `progress_every` steps, a preview after every `preview_every` (0: none).

    The last step is always reported. It has the picture in place of a preview. `with_vae`: previews are
    decoded by the VAE, at the picture's size.
    """

    progress_every: int = 1
    preview_every: int = 0
    with_vae: bool = False

    @classmethod
    def from_inputs(cls, inputs: dict[str, npt.NDArray[Any]]) -> "Reports":
        """From a request's tensors. Raises RequestError for a number that is too small."""
        reports = cls(
            whole(inputs, "progress_every", 1),
            whole(inputs, "preview_every", 0),
            flag(inputs, "preview_with_vae", False),
        )
        if reports.progress_every < 1:
            raise RequestError(f"progress_every is {reports.progress_every}: expected 1 or more")
        if reports.preview_every < 0:
            raise RequestError(f"preview_every is {reports.preview_every}: expected 1 or more, or 0 for none")
        return reports

    def has_preview(self, step: int, steps: int) -> bool:
        """Whether the report of `step`, from 1, has a preview."""
        return self.preview_every > 0 and step % self.preview_every == 0 and step < steps

    def due(self, step: int, steps: int) -> bool:
        """Whether `step`, from 1, is reported."""
        return step % self.progress_every == 0 or self.has_preview(step, steps) or step == steps


def passed_on(parameters: str) -> dict[str, int]:
    """What of a stream's parameters (JSON) goes to the models that it calls: its `priority_level`, if any.

    Raises RequestError for a level that is none.
    """
    given = "priority_level" in json.loads(parameters or "{}")
    return {"priority_level": priority_of(parameters, 0)} if given else {}


class TimeOut:
    """The time-out of a request, from now: `timeout` in microseconds, 0 for none."""

    def __init__(self, timeout: int) -> None:
        self._seconds = timeout / 1e6
        self._end = deadline_in(timeout)

    def turn(self, step: int, steps: int) -> int:
        """Microseconds to wait for `step`, which is next, before one looks whether the client is still there.

        Raises Expired naming the step when no time is left.
        """
        if not self._end:
            return LOOK
        left = (self._end - time.monotonic_ns()) // 1000
        if left <= 0:
            raise Expired(
                f"the time-out of {self._seconds:g} seconds has passed before step {step} of {steps}"
            )
        return min(left, LOOK)
