"""What goes into an engine call: the rows of several requests, joined."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .request import Request

Array = npt.NDArray[Any]


class Engine(Protocol):
    """What makes an engine call; both methods may be called from two threads at once."""

    def constants(self, conditions: dict[str, Array]) -> Any:
        """What the calls of the same requests share, made once of their conditions, [r, ...] by name."""

    def __call__(self, latent: Array, timestep: npt.NDArray[np.float32], constants: Any) -> Array:
        """Velocity [r, C, h, w] of latent [r, C, h, w] at timestep [r, 1]."""


class Constants:
    """The engine's constants, kept while the same requests stay together."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._kept: dict[tuple[tuple[int, int], ...], Any] = {}  # conditions of a call → its constants

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, call: list[Request]) -> Any:
        """The constants of a call; made if these requests were not together in the last one."""
        members = tuple((id(request.state.conditions), request.rows) for request in call)
        with self._lock:
            constants = self._kept.get(members)
        if constants is None:
            conditions = [request.state.step_conditions for request in call]
            constants = self._engine.constants(
                {name: _joined([each[name] for each in conditions]) for name in conditions[0]}
            )
            with self._lock:
                self._drop(call)
                self._kept[members] = constants
        return constants

    def forget(self, requests: Iterable[Request]) -> None:
        """Drop the constants of calls that one of the requests was in; an id may be used again."""
        with self._lock:
            self._drop(requests)

    def _drop(self, requests: Iterable[Request]) -> None:
        gone = {id(request.state.conditions) for request in requests}
        self._kept = {
            members: constants
            for members, constants in self._kept.items()
            if gone.isdisjoint(member for member, _ in members)
        }


def engine_inputs(call: list[Request]) -> tuple[Array, npt.NDArray[np.float32]]:
    """The call's latents [r, C, h, w] and timesteps [r, 1]."""
    latents, timesteps = zip(*(request.state.engine_inputs() for request in call), strict=True)
    return _joined(latents), np.concatenate(timesteps)


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
