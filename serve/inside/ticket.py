"""What the scheduler knows of a request's client: when it goes, how long it may take, whom to tell."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .request import Request

Place = tuple[int, int]  # priority, arrival: the lowest goes first


@dataclass(eq=False)
class Ticket:
    """A request's place in the queue, its deadline, and its client.

    Requests go by `priority` (lower first) and `arrival`. Times are ns of this machine's monotonic clock;
    an `arrival` of 0 is set at submission, a `deadline` of 0 is none. `streamed`: the request is one part of
    a picture whose other parts come with the same arrival. `is_cancelled` is asked now and then; `on_end` is
    called once, with the request and None or the error.
    """

    priority: int = 0
    arrival: int = 0
    deadline: int = 0
    streamed: bool = False
    is_cancelled: Callable[[], bool] = field(default=lambda: False)
    on_end: Callable[["Request", Exception | None], None] = field(default=lambda _, __: None)

    @property
    def place(self) -> Place:
        """The request's place among those that wait."""
        return self.priority, self.arrival

    def has_expired(self, now: int) -> bool:
        """Whether the deadline has passed; `now` in ns of the monotonic clock."""
        return 0 < self.deadline <= now
