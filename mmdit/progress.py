"""Progress of long work on stderr: a bar on a terminal, a line every ten seconds in a log."""

import sys
import time
from types import TracebackType


class Progress:
    """A labelled bar over `total` units; says at the end how long the work took.

    Use it as a context manager; `update(done)` sets, `advance()` adds. Of units that are worked on
    `together` all end at nearly the same time: what the first one took says nothing of the time left.
    """

    def __init__(self, label: str, total: int, unit: str = "", *, together: bool = False) -> None:
        self.label = label
        self.total = max(total, 1)
        self.unit = unit
        self.together = together
        self.done = 0
        self.note = ""
        self._first = 0
        self._stopped = False
        self._start = time.monotonic()
        self._printed = self._start
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self._print(end=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            if not self._stopped:
                self.done = self.total
            self._print(end=True)
        elif self._terminal:
            print(file=sys.stderr)

    def start_at(self, done: int) -> None:
        """Say how many units an earlier run had finished: they count, but took no time now."""
        self.done = self._first = done

    def stop(self) -> None:
        """Say that the work ends here, before its last unit."""
        self._stopped = True

    def advance(self, units: int = 1) -> None:
        """Add `units` of finished work."""
        self.update(self.done + units)

    def update(self, done: int) -> None:
        """Set the finished work to `done` units."""
        self.done = done
        now = time.monotonic()
        if now - self._printed >= (0.1 if self._terminal else 10):
            self._printed = now
            self._print(end=False)

    def _print(self, *, end: bool) -> None:
        seconds = time.monotonic() - self._start
        counted = f"{self.done}/{self.total} {self.unit}".strip()
        if end:
            text = f"{self.label}: {counted}, {seconds:.1f} s"
        elif self._first < self.done < self.total and not self.together:
            left = seconds / (self.done - self._first) * (self.total - self.done)
            text = f"{self.label}: {counted}, {left:.0f} s left"
        else:
            text = f"{self.label}: {counted}"
        if self.note:
            text += f", {self.note}"
        if not self._terminal:
            if self.done:
                print(text, file=sys.stderr, flush=True)
            return
        filled = 24 * self.done // self.total
        bar = "█" * filled + "·" * (24 - filled)
        print(f"\r\x1b[K{bar} {text}", end="\n" if end else "", file=sys.stderr, flush=True)
