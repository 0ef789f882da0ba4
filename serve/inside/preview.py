"""What a picture will be, from two consecutive latents of the denoise loop: no engine runs for it.

The latents of a step are mostly noise. But the step has told the velocity, and at that velocity the straight
way to sigma 0 ends in the picture that the model predicts now. A matrix that was fitted to the checkpoint's
VAE turns it into colours, a pixel for each latent pixel.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PROJECTION = "projection.json"
Latents = npt.NDArray[np.float32]


def predicted(before: Latents, after: Latents, sigma_before: float, sigma_after: float) -> Latents:
    """The clean latents that a step predicts, [C, h, w], from those before and after it.

    An Euler step goes along the velocity, which leads from the picture to the noise: x = x0 + sigma velocity.
    """
    velocity = (after - before) / np.float32(sigma_after - sigma_before)
    return after - np.float32(sigma_after) * velocity


def read_projection(folder: Path) -> npt.NDArray[np.float32]:
    """The matrix of `projection.json`, [C + 1, 3]."""
    return np.array(json.loads((folder / PROJECTION).read_text()), np.float32)


def projected(latents: Latents, projection: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The colours of latents [C, h, w] as the denoise loop holds them: UINT8 [h, w, 3].

    `projection` [C + 1, 3] leads from the channels and a 1 to RGB in [-1, 1].
    """
    colours = np.tensordot(latents, projection[:-1], (0, 0)) + projection[-1]  # [h, w, 3]
    return np.round(np.clip(colours / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
