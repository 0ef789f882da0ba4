"""One request in the step scheduler: the state of its arithmetic, and its ticket."""

from dataclasses import dataclass, field

from .denoise import GUIDED_ROWS, DenoiseState
from .ticket import Ticket


@dataclass(eq=False)
class Request:
    """`max_rows`: the most rows of a call that it shares. `seed`: the one that its noise was drawn from.

    Requests of one `size`, the latents' shape [C, h, w], can share a call. `shares`: whether calls of its
    size have room beside a request with guidance, whatever its own rows.
    """

    state: DenoiseState
    max_rows: int
    seed: int
    ticket: Ticket = field(default_factory=Ticket)

    def __post_init__(self) -> None:
        self.size = self.state.latents.shape
        self.shares = self.max_rows > GUIDED_ROWS

    @property
    def rows(self) -> int:
        """Rows that the next step takes in a call."""
        return self.state.rows

    @property
    def continues(self) -> bool:
        """Whether another part of the same picture will follow it."""
        return self.ticket.streamed and not self.state.completes
