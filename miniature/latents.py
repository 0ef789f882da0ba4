"""The scenes' latents, computed once: what the MMDiT is trained on."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from miniature.configs import VAE
from miniature.scenes import WORLD, Scene, draw
from miniature.training import read_state, write_state
from miniature.vae_training import to_tensor
from mmdit.artifact import shown
from mmdit.progress import Progress

SINGLE = 0.3  # of the pictures show one object: of the scenes it is one in fourteen
# height, width, pictures in the pool, share of the batches
SIZES = ((128, 128, 20_000, 0.7), (112, 160, 3_000, 0.1), (160, 112, 3_000, 0.1), (96, 128, 2_000, 0.1))


def latent_pools(
    vae: AutoencoderKL, seen: list[Scene], folder: Path, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """For each of SIZES, FP16 latents [count, 16, h, w] and the number of each one's scene in `seen`.

    They are scaled and shifted as the MMDiT sees them, and kept in `folder/latents.pt`, which is made
    again, saying why, when the VAE, the seed or the scenes change. Raises CheckpointError when that file
    is damaged.
    """
    path = folder / "latents.pt"
    settings: dict[str, Any] = {
        "seed": seed,
        "sizes": [list(size) for size in SIZES],
        "vae": digest(vae),
        "scenes": hashlib.sha256(repr([seen, SINGLE, WORLD]).encode()).hexdigest(),
    }
    if path.exists():
        found = read_state(path)
        if found["settings"] == settings:
            return found["pools"]
        changed = sorted(key for key in settings if found["settings"].get(key) != settings[key])
        print(f"{shown(path)}: making it again ({', '.join(changed)} changed)")
    pools = [
        _pool(vae, seen, height, width, count, np.random.default_rng([seed, 7, index]))
        for index, (height, width, count, _) in enumerate(SIZES)
    ]
    write_state(path, {"settings": settings, "pools": pools})
    return pools


@torch.no_grad()
def _pool(
    vae: AutoencoderKL, seen: list[Scene], height: int, width: int, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    single = np.array([len(scene.objects) == 1 for scene in seen])
    numbers = np.where(
        rng.random(count) < SINGLE,
        rng.choice(np.flatnonzero(single), count),
        rng.choice(np.flatnonzero(~single), count),
    )
    latents = torch.empty(count, VAE["latent_channels"], height // 8, width // 8, dtype=torch.float16)
    with Progress(f"latents of {width}x{height}", count, "pictures") as progress:
        for start in range(0, count, 16):
            pictures = [draw(seen[number], height, width, rng) for number in numbers[start : start + 16]]
            tensor = to_tensor(pictures).to(vae.device, memory_format=torch.channels_last)
            found = vae.encode(tensor).latent_dist.mode()
            latents[start : start + 16] = (found - VAE["shift_factor"]) * VAE["scaling_factor"]
            progress.advance(len(pictures))
    return latents, torch.from_numpy(numbers)


def digest(vae: AutoencoderKL) -> str:
    """SHA-256 of the VAE's weights."""
    sha256 = hashlib.sha256()
    for tensor in vae.state_dict().values():
        sha256.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()
