"""The denoise loop's arithmetic and a request's state in it, in plain numpy.

Flow matching with Euler steps, as diffusers' FlowMatchEulerDiscreteScheduler does it with a static
shift. Latents stay FP32 between steps.
"""

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .noise import noise_from_seed
from .sharing import rows_worth

Array = npt.NDArray[Any]
LARGEST_FP16 = 65504.0
GUIDED_ROWS = 2  # the negative prompt's and the prompt's
NEAR = 0.25  # of a timed size's tokens: others' times say nothing of calls that differ more
OLDEST_ARRIVAL = 600 * 10**9  # ns; who claims to have waited longer has not


class RequestError(ValueError):
    """A request that cannot be served as it is; the message goes to its client."""


@dataclass(frozen=True)
class Limits:
    """What a model can do and what a request gets by default. Sizes in pixels, (height, width)."""

    channels: int
    pixels_per_latent: int
    multiple: int
    ranges: tuple[tuple[tuple[int, int], tuple[int, int], int], ...]  # (min, max, rows of a call)
    sizes: tuple[tuple[int, int], ...]  # all that are served; none: every multiple in a range
    step_times: tuple[tuple[tuple[int, int], dict[int, float]], ...]  # size, rows of a call → milliseconds
    default_size: int
    default_steps: int
    default_guidance_scale: float
    max_steps: int
    shift: float
    train_timesteps: int
    scaling_factor: float
    shift_factor: float

    @classmethod
    def from_settings(cls, settings: dict[str, Any], max_steps: int) -> "Limits":
        """From the packaged `settings.json` (its family and shape set)."""
        family, shapes = settings["family"], settings["shapes"]
        return cls(
            channels=family["latent_channels"],
            pixels_per_latent=settings["pixels_per_latent"],
            multiple=shapes["multiple"],
            ranges=tuple((tuple(r["min"]), tuple(r["max"]), r["max_rows"]) for r in shapes["ranges"]),
            sizes=tuple((height, width) for height, width in shapes["sizes"]),
            step_times=tuple(
                (tuple(each["size"]), {int(rows): time for rows, time in each["milliseconds"].items()})
                for each in settings.get("step_times", [])
            ),
            default_size=family["default_size"],
            default_steps=family["steps"],
            default_guidance_scale=family["guidance_scale"],
            max_steps=max_steps,
            shift=family["shift"],
            train_timesteps=family["train_timesteps"],
            scaling_factor=family["vae_scaling_factor"],
            shift_factor=family["vae_shift_factor"],
        )

    def max_rows(self, height: int, width: int) -> int:
        """The most rows that a call shares at a size; raises RequestError for a size not served.

        The shape set's, or fewer where a size was timed whose tokens (its area) are within a quarter of it.
        """
        for name, pixels in (("height", height), ("width", width)):
            if pixels <= 0 or pixels % self.multiple:
                raise RequestError(f"{name} is {pixels}: expected a multiple of {self.multiple} pixels")
        rows = [
            rows
            for low, high, rows in self.ranges
            if low[0] <= height <= high[0] and low[1] <= width <= high[1]
        ]
        if not rows or (self.sizes and (height, width) not in self.sizes):
            served = [f"{size[0]}x{size[1]}" for size in self.sizes] or [
                f"{low[0]}x{low[1]} to {high[0]}x{high[1]}"
                for low, high, _ in self.ranges
                if not any(
                    (low, high) != (other[0], other[1])
                    and all(a <= b for a, b in zip(other[0] + high, low + other[1], strict=True))
                    for other in self.ranges
                )
            ]
            raise RequestError(
                f"size {height}x{width} (height x width) is not served: expected {', '.join(served)}"
            )

        def distance(timed: tuple[tuple[int, int], dict[int, float]]) -> float:
            return abs(height * width / (timed[0][0] * timed[0][1]) - 1)

        nearest = min(self.step_times, key=distance, default=None)
        if nearest is None or distance(nearest) > NEAR:
            return max(rows)
        return rows_worth(nearest[1], max(rows))


def rows_of(guidance_scale: float) -> int:
    """Rows of a request: the negative prompt's and the prompt's with guidance, else the prompt's alone."""
    return GUIDED_ROWS if guidance_scale > 1 else 1


def check_guidance(guidance_scale: float) -> float:
    """The scale itself; raises RequestError unless it is a finite number from 0 to 100."""
    if not (math.isfinite(guidance_scale) and 0 <= guidance_scale <= 100):
        raise RequestError(f"guidance_scale is {guidance_scale}: expected a number from 0 to 100")
    return guidance_scale


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
class Denoising:
    """One request in the denoise loop; `step` is the next step, `end` the one to stop before.

    `latents` FP32 [C, h, w]; `context` FP16 [rows, T, D]; `pooled` FP16 [rows, P]. With two rows the
    negative prompt's comes first. `max_rows`: the most rows of a call that it shares. Requests go by
    `arrival` (ns of this machine's monotonic clock; 0: when they are submitted). `is_cancelled` is asked
    before each step; `on_end` is called once, with None or the error.
    """

    latents: npt.NDArray[np.float32]
    context: npt.NDArray[np.float16]
    pooled: npt.NDArray[np.float16]
    sigmas: npt.NDArray[np.float32]
    guidance_scale: float
    train_timesteps: int
    seed: int
    max_rows: int
    step: int
    end: int
    arrival: int = 0
    is_cancelled: Callable[[], bool] = field(default=lambda: False)
    on_end: Callable[["Denoising", Exception | None], None] = field(default=lambda _, __: None)

    @property
    def rows(self) -> int:
        """Rows that each step of this request takes in a call."""
        return len(self.context)

    @property
    def size(self) -> tuple[int, ...]:
        """The latents' shape: requests of one size can share a call."""
        return self.latents.shape

    @property
    def shares(self) -> bool:
        """Whether calls of its size have room beside a request with guidance, whatever its own rows."""
        return self.max_rows > GUIDED_ROWS

    @property
    def finished(self) -> bool:
        """Whether the last step asked for is done."""
        return self.step >= self.end

    def engine_inputs(self, dtype: type = np.float16) -> tuple[Array, npt.NDArray[np.float32]]:
        """This step's `latent` [rows, C, h, w], FP16 as engines take it, and `timestep` FP32 [rows, 1]."""
        latent: Array = np.repeat(self.latents[None].astype(dtype), self.rows, axis=0)
        timestep = self.sigmas[self.step] * np.float32(self.train_timesteps)
        return latent, np.full((self.rows, 1), timestep, np.float32)

    def advance(self, velocity: Array) -> None:
        """One Euler step with this request's rows of the `velocity`, [rows, C, h, w]."""
        wide = velocity.astype(np.float32)
        if self.rows == 2:
            negative, positive = wide
            guided = negative + np.float32(self.guidance_scale) * (positive - negative)
        else:
            guided = wide[0]
        self.latents = self.latents + (self.sigmas[self.step + 1] - self.sigmas[self.step]) * guided
        self.step += 1


def denoising_from(inputs: dict[str, Array], limits: Limits) -> Denoising:
    """A request's state from the `denoiser` model's inputs; what is not given gets its default.

    `arrival` is the stream's, which asks for one step after the other and keeps its place. Any client can
    send it: a stamp that lies in the future, or more than ten minutes back, counts as none.
    Raises RequestError naming the input, its value and what was expected.
    """
    context, pooled = inputs["context"], inputs["pooled"]
    latents = inputs.get("latents")
    height = _scalar(inputs, "height", None)
    width = _scalar(inputs, "width", None)
    if latents is not None:
        channels, *latent_size = latents.shape
        if channels != limits.channels:
            raise RequestError(f"latents have {channels} channels: expected {limits.channels}")
        of_latents = [size * limits.pixels_per_latent for size in latent_size]
        for name, asked, found in (("height", height, of_latents[0]), ("width", width, of_latents[1])):
            if asked is not None and asked != found:
                raise RequestError(f"{name} is {asked}, but the latents are for {found}: they must agree")
        height, width = of_latents
        if not (np.abs(latents) <= LARGEST_FP16).all():
            raise RequestError(f"latents hold values that FP16 does not: expected up to {LARGEST_FP16:g}")
    height = limits.default_size if height is None else int(height)
    width = limits.default_size if width is None else int(width)
    max_rows = limits.max_rows(height, width)

    steps = int(_scalar(inputs, "steps", limits.default_steps))
    if not 1 <= steps <= limits.max_steps:
        raise RequestError(f"steps is {steps}: expected 1 to {limits.max_steps}")
    guidance_scale = check_guidance(float(_scalar(inputs, "guidance_scale", limits.default_guidance_scale)))
    if len(context) != rows_of(guidance_scale) or len(pooled) != len(context):
        raise RequestError(
            f"context and pooled have {len(context)} and {len(pooled)} rows: expected "
            f"{rows_of(guidance_scale)} with guidance_scale {guidance_scale}"
        )
    begin = int(_scalar(inputs, "begin", 0))
    end = int(_scalar(inputs, "end", steps))
    if not 0 <= begin < end <= steps:
        raise RequestError(f"steps {begin} to {end} of {steps}: expected 0 <= begin < end <= steps")
    if begin > 0 and latents is None:
        raise RequestError(
            f"begin is {begin} without latents: give the latents that step {begin} starts from"
        )

    seed = _scalar(inputs, "seed", None)
    seed = secrets.randbits(63) if seed is None else int(seed)
    if seed < 0:
        raise RequestError(f"seed is {seed}: expected 0 or more")
    arrival = int(_scalar(inputs, "arrival", 0))
    if latents is None:
        size = (height // limits.pixels_per_latent, width // limits.pixels_per_latent)
        latents = noise_from_seed(seed, (limits.channels, *size))
    return Denoising(
        latents=latents.astype(np.float32),
        context=context,
        pooled=pooled,
        sigmas=sigmas_for(steps, limits.shift, limits.train_timesteps),
        guidance_scale=guidance_scale,
        train_timesteps=limits.train_timesteps,
        seed=seed,
        max_rows=max_rows,
        step=begin,
        end=end,
        arrival=arrival if 0 <= time.monotonic_ns() - arrival <= OLDEST_ARRIVAL else 0,
    )


def vae_latent(latents: npt.NDArray[np.float32], limits: Limits, dtype: type = np.float16) -> Array:
    """What the VAE decodes, [1, C, h, w], FP16 as its engine takes it: scaled and shifted in FP32."""
    unscaled = latents / np.float32(limits.scaling_factor) + np.float32(limits.shift_factor)
    return unscaled.astype(dtype)[None]


def _scalar(inputs: dict[str, Array], name: str, default: Any) -> Any:
    value = inputs.get(name)
    return default if value is None else value.reshape(-1)[0]
