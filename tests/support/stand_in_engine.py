"""Requests and an engine for the step scheduler's tests: the velocity of a row tells whose row it was."""

from collections.abc import Callable
from typing import Any

import numpy as np

from serve.inside.denoise import DenoiseState, sigmas_for
from serve.inside.request import Request
from serve.inside.ticket import Ticket


def request(
    size: tuple[int, int] = (4, 4),
    steps: int = 3,
    rows: int = 2,
    mark: float = 1.0,
    max_rows: int = 8,
    guidance_scale: float = 1.0,
    guided: tuple[int, int] | None = None,
    **ticket: Any,
) -> Request:
    """A request whose context marks its rows; what else is given goes into its ticket."""
    state = DenoiseState(
        latents=np.zeros((1, *size), np.float32),
        conditions={
            "context": np.full((rows, 1, 1), mark, np.float16),
            "pooled": np.zeros((rows, 1), np.float16),
        },
        sigmas=sigmas_for(steps, 3.0, 1000),
        guidance_scale=guidance_scale,
        train_timesteps=1000,
        step=0,
        end=steps,
        guided=(0, steps) if guided is None else guided,
    )
    return Request(state, max_rows, seed=0, ticket=Ticket(**ticket))


class Engine:
    """The velocity of a row is its context's mark, or what `velocity` makes of the latents; remembers each
    call's rows and size, and its context.
    """

    def __init__(self, velocity: Callable[[Any], Any] | None = None) -> None:
        self.velocity = velocity
        self.calls: list[tuple[int, tuple[int, int]]] = []
        self.contexts: list[Any] = []

    def constants(self, conditions: dict[str, Any]) -> Any:
        return conditions["context"]

    def __call__(self, latent: Any, timestep: Any, constants: Any) -> Any:
        self.calls.append((len(latent), latent.shape[2:]))
        self.contexts.append(constants)
        if self.velocity is not None:
            return self.velocity(latent)
        return np.broadcast_to(constants[:, :, :, None], latent.shape).astype(np.float16)
