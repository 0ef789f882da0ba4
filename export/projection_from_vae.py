"""Checkpoint → a matrix from the VAE's latents to colours: previews that cost nothing.

A line for each latent channel is not the decoder, but it shows what a picture will be at an eighth of its
height and width. It is fitted to what the checkpoint's own decoder makes, on random pictures: no data set.
"""

import json
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import torch
from torch import Tensor
from torch.nn import functional

from export.modules import load_module
from mmdit.errors import CheckpointError
from mmdit.family import VAE_SCALE, Family
from mmdit.progress import Progress
from serve.inside.preview import PROJECTION

PICTURES = 80
HELD_OUT = 16
SIDE = 64  # pixels: many small pictures show more colours than few large ones
REGIONS = 3  # of a picture, at most, beside its background
PATCHES = (16, 32, 64)  # pixels: how large regions are, about
SOFTNESS = (1.0, 4.0)  # pixels: how wide an edge is
CHROMA = 200 / 127.5  # at most: colours lie about the greys, some far from them


@torch.no_grad()
def write_projection(family: Family, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write `projection.json`, [C + 1][3]: latents of the denoise loop, then 1, to RGB in [-1, 1].

    Least squares between the latents that the VAE's encoder gives to random pictures and the mean colour of
    the 8 × 8 pixels that its decoder makes of each. Returns R², in the fit and on pictures held out of it.
    SD3.5's VAE takes 5.4 TFLOP for it. Raises CheckpointError when the VAE's weights do not fit, or when it
    gives values that are not finite.
    """
    vae = load_module("vae_decoder", checkpoint, torch.float32).model
    generator = torch.Generator().manual_seed(0)
    rows, colours = [], []
    with Progress("fitting previews", PICTURES + HELD_OUT, "pictures") as progress:
        for number in range(PICTURES + HELD_OUT):
            latents = vae.encode(random_picture(generator, 1 + number % REGIONS)[None]).latent_dist.mode()
            decoded = vae.decode(latents).sample.clamp(-1, 1)
            scaled = (latents - family.vae_shift_factor) * family.vae_scaling_factor
            rows.append(_pixels(scaled))
            colours.append(_pixels(functional.avg_pool2d(decoded, VAE_SCALE)))
            progress.advance()
    latent, colour = torch.stack(rows), torch.stack(colours)  # [pictures, h × w, C + 1 and 3]
    if not (latent.isfinite().all() and colour.isfinite().all()):
        raise CheckpointError(
            f"{checkpoint / 'vae'}: the VAE gives values that are not finite: download it again"
        )
    latent = functional.pad(latent, (0, 1), value=1.0)
    matrix = torch.linalg.lstsq(latent[:PICTURES].flatten(0, 1), colour[:PICTURES].flatten(0, 1)).solution
    (folder / PROJECTION).write_text(json.dumps(matrix.round(decimals=6).tolist(), indent=1) + "\n")
    return {
        "r2": explained(matrix, latent[:PICTURES], colour[:PICTURES]),
        "r2_held_out": explained(matrix, latent[PICTURES:], colour[PICTURES:]),
    }


def random_picture(generator: torch.Generator, regions: int) -> Tensor:
    """Plain regions with winding edges before a plain background, FP32 [3, SIDE, SIDE] in [-1, 1]."""
    chroma = CHROMA * float(torch.rand((), generator=generator))

    def colour() -> Tensor:
        grey = 2 * torch.rand((), generator=generator) - 1
        return (grey + chroma * torch.randn(3, generator=generator)).clamp(-1, 1)[:, None, None]

    def one_of(choices: tuple[Any, ...]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    picture = colour().expand(3, SIDE, SIDE)
    for _ in range(regions):
        knots = SIDE // one_of(PATCHES) + 1
        coarse = torch.randn(1, 1, knots, knots, generator=generator)
        field = functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0]
        down, across = torch.gradient(field)
        steepness = torch.hypot(down, across).mean()
        level = torch.rand((), generator=generator)
        covered = (0.5 + (field - level) / (steepness * one_of(SOFTNESS))).clamp(0, 1)  # [SIDE, SIDE]
        picture = picture + covered * (colour() - picture)
    return picture


def explained(matrix: Tensor, latents: Tensor, colours: Tensor) -> float:
    """R²: the share of the colours' variance that the matrix explains; rows in the last dimension but one."""
    error = (colours - latents @ matrix).square().sum()
    return float(1 - error / (colours - colours.flatten(0, -2).mean(0)).square().sum())


def _pixels(image: Tensor) -> Tensor:
    """[1, C, h, w] to [h × w, C], in double precision."""
    return image[0].flatten(1).T.double()
