"""The matrix from latents to colours: how well it shows the pictures that it was not fitted to."""

import json
import shutil

import export.quiet  # noqa: F401  isort: skip
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from export.modules import load_module
from export.projection_from_vae import explained, random_picture, write_projection
from miniature.scenes import draw, scenes
from mmdit.artifact import read_manifest
from mmdit.errors import CheckpointError
from mmdit.family import family_from_checkpoint
from serve.inside.preview import PROJECTION, projected, read_projection

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def held_out(miniature):
    """Latents of 40 held-out scenes as the denoise loop holds them, [40, 16, 16, 16], and their colours.

    The colours [40, 3, 16, 16] are the means over the 8 × 8 pixels that the VAE's decoder makes of each.
    """
    family = family_from_checkpoint(miniature)
    vae = load_module("vae_decoder", miniature, torch.float32).model
    unseen = [scene for scene in scenes() if scene.held_out]
    rng = np.random.default_rng(1)
    drawn = np.stack([draw(unseen[index], 128, 128, rng) for index in rng.permutation(len(unseen))[:40]])
    with torch.no_grad():
        pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1
        latents = vae.encode(pictures).latent_dist.mode()
        colours = functional.avg_pool2d(vae.decode(latents).sample.clamp(-1, 1), 8)
    return (latents - family.vae_shift_factor) * family.vae_scaling_factor, colours


def test_the_projection_shows_scenes_that_it_was_not_fitted_to(build, held_out):
    """R² of held-out scenes above 0.85.

    Measured: 0.905; the best matrix for these very scenes reaches 0.917.
    """
    latents, colours = (tensor.permute(0, 2, 3, 1).flatten(0, 2).double() for tensor in held_out)
    latents = functional.pad(latents, (0, 1), value=1.0)
    matrix = torch.tensor(json.loads((build.preview / PROJECTION).read_text()), dtype=torch.float64)
    best = torch.linalg.lstsq(latents, colours).solution
    found = explained(matrix, latents, colours)
    print(f"R² {found:.3f}, the best {explained(best, latents, colours):.3f}")
    assert matrix.shape == (17, 3)
    assert found >= 0.85


def test_the_server_projects_as_the_export_fitted(build, held_out):
    """Its colours are those of the fit, to a rounding."""
    projection = read_projection(build.preview)
    latents = held_out[0][0]
    colours = torch.einsum("chw,cr->hwr", latents, torch.from_numpy(projection[:-1])) + projection[-1]
    expected = ((colours / 2 + 0.5).clamp(0, 1) * 255).numpy()
    assert np.abs(projected(latents.numpy(), projection) - expected).max() <= 0.51


def test_the_manifest_tells_how_good_the_fit_is(build):
    """In the fit, and on random pictures held out of it (measured: 0.83 and 0.83)."""
    found = read_manifest(build.preview).findings
    assert found["r2"] >= 0.8
    assert found["r2_held_out"] >= 0.75


def test_two_fits_give_the_same_bytes(build, miniature, tmp_path):
    """The random pictures have a seed."""
    write_projection(family_from_checkpoint(miniature), miniature, tmp_path)
    assert (tmp_path / PROJECTION).read_bytes() == (build.preview / PROJECTION).read_bytes()


def test_random_pictures_are_pictures():
    """In range, of several colours, each another."""
    generator = torch.Generator().manual_seed(0)
    pictures = [random_picture(generator, regions=2) for _ in range(8)]
    for picture in pictures:
        assert picture.shape == (3, 64, 64)
        assert picture.abs().max() <= 1
    assert torch.stack(pictures).flatten(1).unique(dim=0).shape[0] == 8
    assert min(len(picture.flatten(1).unique(dim=1).T) for picture in pictures) > 1


def test_a_checkpoint_without_its_vaes_encoder_is_refused(miniature, tmp_path):
    """Naming a weight that lacks: diffusers would draw it at random."""

    def without(tensors):
        return {name: values for name, values in tensors.items() if not name.startswith("encoder.")}

    with pytest.raises(CheckpointError, match=r"the weights lack encoder\.conv_in"):
        fit_changed(miniature, tmp_path, without)


def test_a_vae_with_values_that_are_not_finite_is_refused(miniature, tmp_path):
    """As a damaged file may have them."""

    def damaged(tensors):
        tensors["encoder.conv_in.bias"] = np.full_like(tensors["encoder.conv_in.bias"], np.nan)
        return tensors

    with pytest.raises(CheckpointError, match="not finite: download it again"):
        fit_changed(miniature, tmp_path, damaged)
    assert not (tmp_path / PROJECTION).exists()


def fit_changed(miniature, folder, change):
    """Fit to the miniature's VAE with other weights."""
    copy = folder / "checkpoint"
    shutil.copytree(miniature / "vae", copy / "vae")
    save_file(change(load_file(copy / WEIGHTS)), copy / WEIGHTS, metadata={"format": "pt"})
    write_projection(family_from_checkpoint(miniature), copy, folder)
