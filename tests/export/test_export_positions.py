"""The MMDiT's positions by row and column: the library's values, without its table."""

import pytest
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed

import export.quiet  # noqa: F401  isort: skip
import torch

from export.modules import load_module
from export.positions import separate_positions


def embedding() -> PatchEmbed:
    torch.manual_seed(0)
    return PatchEmbed(height=16, width=16, patch_size=2, in_channels=4, embed_dim=24, pos_embed_max_size=12)


@pytest.mark.parametrize("size", [(16, 16), (10, 14), (24, 2), (6, 22)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_values_are_the_librarys(size, dtype):
    """To the last bit, at even and odd numbers of tokens, up to the whole grid."""
    library, own = embedding().to(dtype), embedding().to(dtype)
    assert separate_positions(own)
    latent = torch.randn(2, 4, *size).to(dtype)
    assert torch.equal(own(latent), library(latent))
    assert own.pos_embed.numel() * 12 == library.pos_embed.numel()


def test_a_table_of_another_kind_stays():
    """A checkpoint may have learnt its positions."""
    own = embedding()
    own.pos_embed[0, 5, 3] += 0.5
    table = own.pos_embed
    assert not separate_positions(own)
    assert own.pos_embed is table
    assert own(torch.randn(1, 4, 8, 8)).shape == (1, 16, 24)


def test_the_miniatures_positions_are_separated(miniature):
    """And the transformer gives what the library's gives."""
    module = load_module("mmdit", miniature, torch.float32)
    assert tuple(module.model.pos_embed.pos_embed.shape) == (2, 32, 96)
    library = SD3Transformer2DModel.from_pretrained(miniature / "transformer", dtype=torch.float32).eval()
    torch.manual_seed(0)
    latent, context = torch.randn(1, 16, 10, 14), torch.randn(1, 333, 192)
    timestep, pooled = torch.tensor([[500.0]]), torch.randn(1, 160)
    with torch.no_grad():
        ours = module(latent, timestep, context, pooled)
        theirs = library(latent, context, pooled, timestep[:, 0], return_dict=False)[0]
    assert torch.equal(ours, theirs)
