"""The arithmetic of the denoise loop, in plain numpy: one request's latents, noise levels and guidance.

Flow matching with Euler steps, as diffusers' FlowMatchEulerDiscreteScheduler does it with a static
shift. Latents stay FP32 between steps.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .fp16 import plus_weighted, write
from .limits import Limits

Array = npt.NDArray[Any]
GUIDED_ROWS = 2  # the negative prompt's and the prompt's


def rows_of(guidance_scale: float) -> int:
    """Rows of a request's text: the negative prompt's and the prompt's with guidance, else the prompt's."""
    return GUIDED_ROWS if guidance_scale > 1 else 1


def sigmas_for(steps: int, shift: float, train_timesteps: int) -> npt.NDArray[np.float32]:
    """The noise levels of a schedule, FP32 [steps + 1]: from 1 down to 0.

    diffusers shifts twice: the training schedule's ends, between which the steps are spaced evenly,
    are shifted ones, and the steps are shifted again (FlowMatchEulerDiscreteScheduler.set_timesteps).
    """
    smallest = np.float32(1) / np.float32(train_timesteps)
    ends = np.array([1, smallest], np.float32)
    ends = np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends)
    first, last = (float(end) * train_timesteps for end in ends)
    spaced = np.linspace(first, last, steps) / train_timesteps
    shifted = shift * spaced / (1 + (shift - 1) * spaced)
    return np.append(shifted, 0).astype(np.float32)


@dataclass(eq=False)
class DenoiseState:
    """What one request's arithmetic needs: `step` is the next step, `end` the one to stop before.

    `latents` FP32 [C, h, w]. `conditions`: the step's other inputs by tensor name (`context` FP16 [r, T, D],
    `pooled` FP16 [r, P]), r the rows of the request's text: with two the negative prompt's comes first.
    Steps from `guided`[0] to before `guided`[1] take both rows, others the prompt's alone.
    """

    latents: npt.NDArray[np.float32]
    conditions: dict[str, Array]
    sigmas: npt.NDArray[np.float32]
    guidance_scale: float
    train_timesteps: int
    step: int
    end: int
    guided: tuple[int, int]

    def __post_init__(self) -> None:
        self.begin = self.step
        self.text_rows = len(next(iter(self.conditions.values())))

    def continue_from(self, before: "DenoiseState") -> None:
        """Take over the conditions of the picture's part before this one."""
        self.conditions, self.text_rows = before.conditions, before.text_rows

    @property
    def rows(self) -> int:
        """Rows that the next step takes in a call."""
        return self.text_rows if self.guided[0] <= self.step < self.guided[1] else 1

    @property
    def step_conditions(self) -> dict[str, Array]:
        """The next step's rows of the conditions, by tensor name."""
        rows = self.rows
        return {name: values[-rows:] for name, values in self.conditions.items()}

    @property
    def finished(self) -> bool:
        """Whether the last step asked for is done."""
        return self.step >= self.end

    @property
    def completes(self) -> bool:
        """Whether `end` is the end of the whole schedule: no later part follows."""
        return self.end == len(self.sigmas) - 1

    @property
    def fault(self) -> Exception | None:
        """Why the latents are no picture, or None."""
        if np.isfinite(self.latents).all():
            return None
        return ArithmeticError(f"the latents are not finite at step {self.step}: an engine overflowed")

    def engine_inputs(self, dtype: type = np.float16) -> tuple[Array, npt.NDArray[np.float32]]:
        """The step's `latent` [rows, C, h, w], FP16 as engines take it, and `timestep` FP32 [rows, 1]."""
        latent: Array = np.empty((self.rows, *self.latents.shape), dtype)
        write(self.latents, latent)
        timestep = self.sigmas[self.step] * np.float32(self.train_timesteps)
        return latent, np.full((self.rows, 1), timestep, np.float32)

    def advance(self, velocity: Array) -> None:
        """One Euler step with this request's rows of the `velocity`, [rows, C, h, w]."""
        step = float(self.sigmas[self.step + 1] - self.sigmas[self.step])
        scale = self.guidance_scale
        weights = [step * (1 - scale), step * scale] if self.rows == GUIDED_ROWS else [step]
        with np.errstate(invalid="ignore", over="ignore"):  # see `fault`
            self.latents = plus_weighted(self.latents, velocity, weights)
        self.step += 1


def vae_latent(latents: npt.NDArray[np.float32], limits: Limits, dtype: type = np.float16) -> Array:
    """What the VAE decodes, [1, C, h, w], FP16 as its engine takes it: scaled and shifted in FP32."""
    unscaled = latents / np.float32(limits.scaling_factor) + np.float32(limits.shift_factor)
    return unscaled.astype(dtype)[None]
