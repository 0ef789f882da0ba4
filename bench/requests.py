"""What the load generators ask for: the miniature's picture, each with a prompt that no cache has seen."""

from collections.abc import Sequence
from typing import Any

SIZE = 128
STEPS = 20


def prompt_of(number: int) -> str:
    """A prompt of its own."""
    return f"picture {number}: a large red circle on the left and a small blue cross on the right"


def requests(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """A request for each number: its own prompt and seed, with guidance."""
    fixed = {"negative_prompt": "", "height": SIZE, "width": SIZE, "steps": STEPS, "guidance_scale": 4.5}
    return [{"prompt": prompt_of(number), "seed": number} | fixed for number in numbers]
