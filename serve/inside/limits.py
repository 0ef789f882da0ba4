"""What a model can do, and what a request gets by default."""

from dataclasses import dataclass
from typing import Any

from .batching import profitable_rows
from .errors import RequestError

NEAR = 0.25  # of a timed size's tokens: others' times say nothing of calls that differ more


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
        return profitable_rows(nearest[1], max(rows))
