"""A request's tensors and parameters to a request of the denoise loop, or to an error with its reason."""

import json
import math
import secrets
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from .denoise import DenoiseState, rows_of, sigmas_for
from .errors import RequestError
from .fields import finite, floats, number, whole
from .limits import Limits
from .noise import noise_from_seed
from .request import Request
from .ticket import Ticket

Array = npt.NDArray[Any]
LARGEST_FP16 = 65504.0
PRIORITY_LEVELS = (1, 2, 3)  # the first goes first, as in Triton's own priority levels
OLDEST_ARRIVAL = 600 * 10**9  # ns; who claims to have waited longer has not


def check_guidance(guidance_scale: float) -> float:
    """The scale itself; raises RequestError unless it is a finite number from 0 to 100."""
    if not (math.isfinite(guidance_scale) and 0 <= guidance_scale <= 100):
        raise RequestError(f"guidance_scale is {guidance_scale}: expected a number from 0 to 100")
    return guidance_scale


def guided_steps(start: float, end: float, steps: int) -> tuple[int, int]:
    """The first step with guidance, and the first without it again, from fractions of all steps.

    Step i is guided when start <= i / steps < end. Guidance in a part of the schedule only is Kynkäänniemi
    et al., "Applying Guidance in a Limited Interval" (2024), there by noise level.
    Raises RequestError unless 0 <= start <= end <= 1.
    """
    for name, value in (("guidance_start", start), ("guidance_end", end)):
        if not 0 <= value <= 1:
            raise RequestError(f"{name} is {value:g}: expected a fraction of the steps, from 0 to 1")
    if start > end:
        raise RequestError(f"guidance_start is {start:g}, after guidance_end, {end:g}: expected start <= end")
    # rounded, because an FP32 tenth of 30 steps is a little more than three
    first, last = (math.ceil(round(fraction * steps, 4)) for fraction in (start, end))
    return first, last


def priority_of(parameters: str, default: int) -> int:
    """The `priority_level` among a request's parameters (JSON, as Triton hands them over), else the default.

    Raises RequestError for a level that is none of 1, 2 and 3.
    """
    level = json.loads(parameters or "{}").get("priority_level", default)
    if level not in PRIORITY_LEVELS or isinstance(level, bool):
        raise RequestError(f"priority_level is {level!r}: expected 1 (first), 2 or 3")
    return int(level)


def deadline_in(timeout: int) -> int:
    """When a request's time-out (microseconds; 0: none) passes, in ns of the monotonic clock."""
    return min(time.monotonic_ns() + timeout * 1000, 2**63 - 1) if timeout > 0 else 0  # an INT64


def request_from(inputs: dict[str, Array], limits: Limits) -> Request:
    """A request from the `denoiser` model's inputs; what is not given gets its default.

    `arrival` is the stream's, which asks for one step after the other and keeps its place. Any client can
    send it: a stamp that lies in the future, or more than ten minutes back, counts as none. `deadline` is
    `text_encoder`'s: ns of the monotonic clock, 0 for none.
    Raises RequestError naming the input, its value and what was expected.
    """
    context, pooled = floats(inputs, "context", 3), floats(inputs, "pooled", 2)
    latents = floats(inputs, "latents", 3) if "latents" in inputs else None
    height = whole(inputs, "height", None)
    width = whole(inputs, "width", None)
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
    height = limits.default_size if height is None else height
    width = limits.default_size if width is None else width
    max_rows = limits.max_rows(height, width)

    steps = whole(inputs, "steps", limits.default_steps)
    if not 1 <= steps <= limits.max_steps:
        raise RequestError(f"steps is {steps}: expected 1 to {limits.max_steps}")
    guidance_scale = check_guidance(number(inputs, "guidance_scale", limits.default_guidance_scale))
    if len(context) != rows_of(guidance_scale) or len(pooled) != len(context):
        raise RequestError(
            f"context and pooled have {len(context)} and {len(pooled)} rows: expected "
            f"{rows_of(guidance_scale)} with guidance_scale {guidance_scale}"
        )
    guided = guided_steps(number(inputs, "guidance_start", 0.0), number(inputs, "guidance_end", 1.0), steps)
    begin = whole(inputs, "begin", 0)
    end = whole(inputs, "end", steps)
    if not 0 <= begin < end <= steps:
        raise RequestError(f"steps {begin} to {end} of {steps}: expected 0 <= begin < end <= steps")
    if begin > 0 and latents is None:
        raise RequestError(
            f"begin is {begin} without latents: give the latents that step {begin} starts from"
        )

    if begin == 0:  # a stream's later steps bring the same text
        for name, values in (("context", context), ("pooled", pooled)):
            if not finite(values):
                raise RequestError(f"{name} holds values that are not finite: expected FP16 numbers")

    seed = whole(inputs, "seed", None)
    seed = secrets.randbits(63) if seed is None else seed
    if seed < 0:
        raise RequestError(f"seed is {seed}: expected 0 or more")
    arrival = whole(inputs, "arrival", 0)
    deadline = whole(inputs, "deadline", 0)
    if deadline < 0:
        raise RequestError(f"deadline is {deadline}: expected 0 or more")
    if latents is None:
        size = (height // limits.pixels_per_latent, width // limits.pixels_per_latent)
        latents = noise_from_seed(seed, (limits.channels, *size))
    streamed = 0 < arrival <= time.monotonic_ns() <= arrival + OLDEST_ARRIVAL
    state = DenoiseState(
        latents=latents.astype(np.float32),
        conditions={"context": context, "pooled": pooled},
        sigmas=sigmas_for(steps, limits.shift, limits.train_timesteps),
        guidance_scale=guidance_scale,
        train_timesteps=limits.train_timesteps,
        step=begin,
        end=end,
        guided=guided,
    )
    ticket = Ticket(arrival=arrival if streamed else 0, deadline=deadline, streamed=streamed)
    return Request(state, max_rows, seed, ticket)
