"""What many clients ask at once: requests of all kinds, some of them left, some malformed."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.inside.noise import noise_from_seed

LEFT, MALFORMED = 0.1, 0.05  # shares
NUDGE = 1e-4  # relative; company's is 1e-5 (test_a_rows_velocity_hardly_depends_on_its_company)
PROMPTS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue", "green")]

# What is wrong, and the name that the error has to tell.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps"),
    ({"steps": 100_000}, "steps"),
    ({"height": 120}, "height"),
    ({"width": 8192}, "size"),
    ({"seed": -1}, "seed"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_start": 0.9, "guidance_end": 0.1}, "guidance_start"),
    ({"negative_prompt": "x" * 9000, "guidance_scale": 4.5}, "negative_prompt"),
    ({"latents": np.full((16, 8, 8), np.inf, np.float32), "height": 64, "width": 64}, "latents"),
]


@dataclass(frozen=True)
class Ask:
    """One request of the load: `options` of the client's, and what becomes of it.

    `streamed`, or unary; `left`: the part of its steps, or of a second, after which its client leaves it;
    `wrong`: the name that its error has to tell.
    """

    options: dict[str, Any]
    alone: int  # the request of the pool that it is
    streamed: bool
    left: float | None = None
    wrong: str | None = None


def requests_of(random_: random.Random) -> Iterator[dict[str, Any]]:
    """Distinct requests: 64 to 192 pixels, 1 to 8 steps, guidance on, off and in a part of the steps."""
    guidance: list[dict[str, Any]] = [
        {"guidance_scale": 4.5, "negative_prompt": "blurry"},
        {"guidance_scale": 7.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.5, "guidance_start": 0.25, "guidance_end": 0.75},
    ]
    for seed in itertools.count():
        yield {
            "prompt": random_.choice(PROMPTS),
            "seed": seed,
            "steps": random_.randint(1, 8),
            "height": 16 * random_.randint(4, 12),
            "width": 16 * random_.randint(4, 12),
            **random_.choice(guidance),
        }


def nudged(request: dict[str, Any]) -> dict[str, Any]:
    """The request with its initial noise changed by ten times what company changes in a step."""
    seed, size = request["seed"], (request["height"] // 8, request["width"] // 8)
    noise = noise_from_seed(seed, (16, *size))
    nudge = 1 + NUDGE * np.random.default_rng(seed).standard_normal(noise.shape)
    rest = {name: value for name, value in request.items() if name != "seed"}
    return rest | {"latents": (noise * nudge).astype(np.float32)}


def asks_of(pool: list[dict[str, Any]], count: int, random_: random.Random) -> list[Ask]:
    """`count` requests drawn from the pool."""
    asks = []
    for _ in range(count):
        alone, streamed, fate = random_.randrange(len(pool)), random_.random() < 0.5, random_.random()
        left, wrong, options = None, None, pool[alone]
        if fate < LEFT:
            left = random_.random()
        elif fate < LEFT + MALFORMED:
            given, wrong = random_.choice(WRONG)
            options = options | given
        asks.append(Ask(options, alone, streamed, left, wrong))
    return asks
