"""TensorRT's progress as one bar, and Ctrl-C that stops it at its next step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from mmdit.progress import Progress


def monitor(trt: Any, progress: Progress, interrupted: threading.Event) -> Any:
    """A progress monitor for TensorRT's builder that drives `progress`, of 100 units."""

    class Monitor(trt.IProgressMonitor):
        """Turns TensorRT's tree of phases into one bar; stops the build after Ctrl-C.

        TensorRT calls it from several threads, and an exception here would end the process.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, done

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, max(num_steps, 1), 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    parent, steps, _ = self._phases[phase_name]
                    self._phases[phase_name] = (parent, steps, step + 1)
                roots = [name for name, phase in self._phases.items() if not phase[0]]
                progress.update(max([progress.done, *(int(99 * self._part(r)) for r in roots)]))
            return not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _part(self, name: str) -> float:
            _, steps, done = self._phases[name]
            inner = [self._part(child) for child in self._phases if self._phases[child][0] == name]
            return min(1.0, (done + sum(inner)) / steps)

    return Monitor()


@contextlib.contextmanager
def interrupted_gently() -> Iterator[threading.Event]:
    """Ctrl-C sets an event while TensorRT works: an exception in its callbacks ends the process.

    A handler in Python runs on the main thread, and not before that leaves the builder. So a thread waits
    for the byte that the interpreter writes as soon as the signal arrives, on whatever thread.
    """
    interrupted = threading.Event()
    arrived, arrives = os.pipe()
    os.set_blocking(arrives, False)

    def watch() -> None:
        if os.read(arrived, 1):
            interrupted.set()
        os.close(arrived)

    wakeup = signal.set_wakeup_fd(arrives)
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup)
        os.close(arrives)
        if interrupted.is_set():
            raise KeyboardInterrupt
