"""The groups of layers that the sensitivity study quantizes one at a time, and what each would gain.

Counts come from the shapes in the checkpoint's headers. Loads no torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from export.policy import LayerPrecision
from mmdit.errors import QuantizationError
from mmdit.family import Family

BY = ("role", "block")

_Rules = tuple[tuple[str, LayerPrecision], ...]
_FP8, _WEIGHTS = LayerPrecision.FP8, LayerPrecision.FP8_WEIGHTS
_BLOCK = r"transformer_blocks\.\d+\."
_ADALN = _BLOCK + r"norm1(_context)?\.linear"
ADALN_WEIGHTS, ADALN_BOTH = "AdaLN, FP8 weights", "AdaLN, FP8 both"
ATTENTION_PRODUCTS = "attention's products"

# Name, pattern, precision: what the policy may decide by itself, cut by the role in the block.
_ROLES = (
    ("attention q, k, v", _BLOCK + r"attn\.to_[qkv]", _FP8),
    ("attention q, k, v, context", _BLOCK + r"attn\.add_[qkv]_proj", _FP8),
    ("attention out", _BLOCK + r"attn\.to_out\.0", _FP8),
    ("attention out, context", _BLOCK + r"attn\.to_add_out", _FP8),
    ("second attention", _BLOCK + r"attn2\.(to_[qkv]|to_out\.0)", _FP8),
    ("feed-forward in", _BLOCK + r"ff\.net\.0\.proj", _FP8),
    ("feed-forward out", _BLOCK + r"ff\.net\.2", _FP8),
    ("feed-forward, context", _BLOCK + r"ff_context\.net\.(0\.proj|2)", _FP8),
    (ADALN_WEIGHTS, _ADALN, _WEIGHTS),
    (ADALN_BOTH, _ADALN, _FP8),
    ("context embedder", "context_embedder", _FP8),
    ("timestep and text embedders", r"time_text_embed\..+", _FP8),
    ("final norm's modulation", r"norm_out\.linear", _FP8),
    ("final projection", "proj_out", _FP8),
)

_CONTEXT = re.compile(_BLOCK + r"(attn\.(add_[qkv]_proj|to_add_out)|ff_context\..+)|context_embedder")
_ONE_TOKEN = re.compile(_BLOCK + r"norm1(_context)?\.linear|time_text_embed\..+|norm_out\.linear")
_QUERY = re.compile(_BLOCK + r"attn(2?)\.to_q")


@dataclass(frozen=True)
class Group:
    """Layers that are quantized together.

    `rules`: (pattern, precision), the first that matches a layer decides; `layers` are those that the
    checkpoint has. `attention` stands for attention's two products instead. `flops` are of one row;
    `weight_bytes_saved` against FP16.
    """

    name: str
    rules: _Rules
    layers: Mapping[str, LayerPrecision]
    attention: bool
    flops: int
    weight_bytes_saved: int


def layer_groups(
    family: Family, linears: Mapping[str, tuple[int, int]], candidates: Iterable[str], by: str = "role"
) -> list[Group]:
    """The groups of `candidates`, by "role" or by "block"; attention's products come last.

    `linears`: layer of the checkpoint → (output, input) features. By role AdaLN stands twice, for either
    precision; by block it has FP8 weights. Raises QuantizationError for another `by`.
    """
    candidates = set(candidates)
    if by == "role":
        named: list[tuple[str, _Rules]] = [
            (name, ((pattern, precision),)) for name, pattern, precision in _ROLES
        ]
    elif by == "block":
        blocks = sorted(
            {int(name.split(".")[1]) for name in linears if name.startswith("transformer_blocks.")}
        )
        named = [
            (
                f"block {number}",
                (
                    (rf"transformer_blocks\.{number}\.norm1(_context)?\.linear", _WEIGHTS),
                    (rf"transformer_blocks\.{number}\..+", _FP8),
                ),
            )
            for number in blocks
        ]
        named.append(("outside the blocks", ((r"(?!transformer_blocks\.).+", _FP8),)))
    else:
        raise QuantizationError(f"layers are not grouped by {by!r}: expected {' or '.join(BY)}")
    flops = layer_flops(family, linears)
    groups = []
    for name, rules in named:
        layers = _matched(rules, candidates)
        if layers:
            saved = sum(linears[layer][0] * linears[layer][1] for layer in layers)
            groups.append(Group(name, rules, layers, False, sum(flops[layer] for layer in layers), saved))
    products = Group(ATTENTION_PRODUCTS, (), {}, True, attention_flops(family, linears), 0)
    return [*groups, products]


def layer_flops(family: Family, linears: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Layer → its FLOPs for one row at the family's default size, two for each multiplication.

    Image layers run over the patches, context layers over the context's tokens, AdaLN and the embedders
    of timestep and pooled text over one token.
    """
    return {name: 2 * outputs * inputs * _tokens(family, name) for name, (outputs, inputs) in linears.items()}


def attention_flops(family: Family, linears: Mapping[str, tuple[int, int]]) -> int:
    """The FLOPs of all of attention's products for one row: q·kᵀ and softmax·v, each 2·tokens²·width."""
    total = 0
    for name, (width, _) in linears.items():
        if found := _QUERY.fullmatch(name):
            second = bool(found[1])  # over the image alone
            tokens = image_tokens(family) + (0 if second else family.context_tokens)
            total += 2 * 2 * tokens**2 * width
    return total


def image_tokens(family: Family) -> int:
    """The patches of a picture of the default size."""
    return (family.default_size // family.size_multiple) ** 2


def quantized(groups: Iterable[Group]) -> tuple[dict[str, LayerPrecision], bool]:
    """What several groups quantize together: layer → precision, and whether attention's products too.

    Of a layer in two groups (AdaLN) the later one decides.
    """
    layers: dict[str, LayerPrecision] = {}
    attention = False
    for group in groups:
        layers.update(group.layers)
        attention |= group.attention
    return layers, attention


def fp8_shares(
    family: Family,
    linears: Mapping[str, tuple[int, int]],
    layers: Mapping[str, LayerPrecision],
    attention: bool,
) -> tuple[float, float]:
    """The share of the linear FLOPs, and of these with attention's products, that run as FP8 products.

    FP8 weights alone do not count: their product runs in FP16.
    """
    flops = layer_flops(family, linears)
    products = attention_flops(family, linears)
    linear = sum(flops[name] for name, precision in layers.items() if precision is _FP8)
    total = sum(flops.values())
    return linear / total, (linear + (products if attention else 0)) / (total + products)


def _tokens(family: Family, layer: str) -> int:
    if _ONE_TOKEN.fullmatch(layer):
        return 1
    return family.context_tokens if _CONTEXT.fullmatch(layer) else image_tokens(family)


def _matched(rules: _Rules, candidates: Iterable[str]) -> dict[str, LayerPrecision]:
    layers: dict[str, LayerPrecision] = {}
    for pattern, precision in rules:
        for name in candidates:
            if re.fullmatch(pattern, name):
                layers.setdefault(name, precision)
    return layers
