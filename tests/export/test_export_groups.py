"""The groups of layers that the sensitivity study quantizes, and their FLOPs."""

import pytest

import export.quiet  # noqa: F401  isort: skip
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from export.budget import combinable
from export.checkpoint import linears
from export.groups import attention_flops, layer_flops, layer_groups
from export.modules import explicit_attention, load_module
from export.policy import AttentionPrecision
from mmdit.family import family_from_checkpoint


@pytest.fixture(scope="module")
def family(miniature):
    return family_from_checkpoint(miniature)


def test_a_layers_flops_are_those_of_its_real_shapes(miniature, family):
    """Two for each multiplication of each token, counted by hooks at the default size."""
    model = load_module("mmdit", miniature, torch.float32).model
    side = family.default_size // 8
    inputs = {
        "hidden_states": torch.zeros(1, family.latent_channels, side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.zeros(1, family.context_tokens, family.context_dim),
        "pooled_projections": torch.zeros(1, family.pooled_dim),
    }
    counted = {}

    def count(name):
        def hook(layer, given, output):
            counted[name] = 2 * output.numel() * layer.in_features

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(count(name))
    with torch.no_grad(), explicit_attention(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert layer_flops(family, linears(miniature)) == counted
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert attention_flops(family, linears(miniature)) == products


@pytest.mark.parametrize("by", ["role", "block"])
def test_every_layer_is_in_a_group_and_those_of_a_policy_share_none(miniature, family, by):
    """AdaLN alone stands twice by role, for its two precisions."""
    shapes = linears(miniature)
    groups = layer_groups(family, shapes, shapes, by)
    assert groups[-1].attention
    together = combinable(groups, AttentionPrecision.FP8)
    layers = [layer for group in together for layer in group.layers]
    assert sorted(layers) == sorted(shapes)
    assert sum(group.flops for group in together if not group.attention) == sum(
        layer_flops(family, shapes).values()
    )


def test_only_groups_that_the_checkpoint_has_are_there(miniature, family):
    """SD3.5 Large has no second attention."""
    shapes = {name: shape for name, shape in linears(miniature).items() if ".attn2." not in name}
    names = [group.name for group in layer_groups(family, shapes, shapes)]
    assert "attention q, k, v" in names and "second attention" not in names
