"""A loop of the served models at work, in a thread of its own."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol


class Loop(Protocol):
    """The step scheduler, or the text's queue."""

    def run(self) -> None:
        """Work until `close`."""

    def close(self) -> None:
        """Let `run` return."""


@contextlib.contextmanager
def working(loop: Loop) -> Iterator[None]:
    """It runs until the end of the block, and then ends."""
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield
    finally:
        loop.close()
        thread.join(10)
        assert not thread.is_alive()
