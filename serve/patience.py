"""How long a client waits for an answer, how often it asks again, and what its errors mean."""

import math
import random
import time

import grpc

from mmdit.errors import DeadlineError, ServerError, UnavailableError

# What a server that is drained says of its models, with the code NOT_FOUND, or in a stream with none.
STOPPING = "has no available versions"
# Seconds that the client waits beyond its time-out, so that the server's own message can arrive.
GRACE = 1.0
# The kinds of the served models' errors (serve/inside/triton.py).
_KINDS: dict[str, type[ServerError]] = {
    "[Full]": UnavailableError,
    "[Expired]": DeadlineError,
    "[Cancelled]": ServerError,
    "[RequestError]": ServerError,
}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 16.0  # seconds


class Patience:
    """One call's time-out, in seconds from now, and how often it may still be tried again.

    `url` is for messages. Raises ServerError for a time-out or a number of retries that means nothing.
    """

    def __init__(self, url: str, timeout: float | None = None, retries: int = 0) -> None:
        if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
            raise ServerError(f"timeout is {timeout}: expected seconds above 0, or None to wait without end")
        if retries < 0:
            raise ServerError(f"retries is {retries}: expected 0 or more")
        self._url = url
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._retries = retries
        self._pause = _FIRST_PAUSE

    @property
    def seconds(self) -> float | None:
        """What is left of the time-out, None without one; raises DeadlineError when nothing is."""
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError(self._overdue())
        return left

    @property
    def wait(self) -> float | None:
        """The seconds that a gRPC call may take: a little more than what the server is told."""
        left = self.seconds
        return None if left is None else left + GRACE

    def pause(self, error: ServerError) -> float:
        """Seconds to wait before the next try; raises the error when there is none, or trying cannot help.

        Twice as long each time, less up to a half by chance: clients that were refused together should
        not come back together.
        """
        pause = self._pause * random.uniform(0.5, 1)
        over = self._deadline is not None and time.monotonic() + pause >= self._deadline
        if over or not self._retries or not isinstance(error, UnavailableError):
            raise error from None
        self._retries -= 1
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return pause

    def error(self, error: grpc.RpcError) -> ServerError:
        """What a failed call means to its caller."""
        now, code, details = time.monotonic(), error.code(), error.details() or ""
        if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
            return UnavailableError(f"no server answers at {self._url}: start one with `make serve`")
        if code is grpc.StatusCode.UNAVAILABLE or STOPPING in details:
            return UnavailableError(details)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(self._overdue())
        if code is grpc.StatusCode.CANCELLED and self._deadline is not None and self._deadline <= now:
            return DeadlineError(details)
        return ServerError(details)

    def stream_error(self, message: str) -> ServerError:
        """What the message of a stream's error means, which ends with the error's kind where it has one."""
        told, _, kind = message.rpartition(" ")
        if kind in _KINDS:
            return _KINDS[kind](told)
        return (UnavailableError if STOPPING in message else ServerError)(message)

    def _overdue(self) -> str:
        return f"{self._url} has not answered within {self._timeout:g} seconds: give a longer timeout"
