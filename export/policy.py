"""The precision policy: which linears of the MMDiT run in FP8, and why the others do not.

Decided by a layer's role in the block, never by a block's number. A later sensitivity study may refine
it; the reason of each rule says what it rests on.
"""

import re
from dataclasses import dataclass
from enum import Enum


class LayerPrecision(Enum):
    """How a linear layer is stored and run."""

    FP8 = "fp8"  # weights and activations E4M3: an FP8 matrix product
    FP8_WEIGHTS = "fp8-weights"  # weights stored as E4M3, an FP16 matrix product
    FP16 = "fp16"


@dataclass(frozen=True)
class Rule:
    """Layers whose names match `pattern` as a whole get `precision`, for `reason`."""

    pattern: str
    precision: LayerPrecision
    reason: str


_BLOCK = r"transformer_blocks\.\d+\."

# The first rule that matches decides.
RULES = (
    Rule(
        _BLOCK + r"attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
        LayerPrecision.FP8,
        "attention projection: large matrix product over tokens",
    ),
    Rule(
        _BLOCK + r"ff(_context)?\.net\.(0\.proj|2)",
        LayerPrecision.FP8,
        "feed-forward: most of the FLOPs",
    ),
    Rule(
        _BLOCK + r"norm1(_context)?\.linear",
        LayerPrecision.FP8_WEIGHTS,
        "AdaLN modulation: a third of the weights, next to no FLOPs, scales every activation",
    ),
    Rule(
        r".*",
        LayerPrecision.FP16,
        "outside the blocks: embedders, norms and the final projection are small and sensitive",
    ),
)


def rule_for(layer: str) -> Rule:
    """The rule that decides the precision of the transformer's linear called `layer`."""
    return next(rule for rule in RULES if re.fullmatch(rule.pattern, layer))
