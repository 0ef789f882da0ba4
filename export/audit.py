"""The audit: what the FP8 file does to each layer, read from the file itself, and what it costs.

Reads the graph, not the weights. A layer that is not in the file what the policy decided, operands of
which only some are quantized, or a Q/DQ pair that TensorRT could not fuse is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from export.groups import attention_flops, image_tokens, layer_flops
from export.onnx_from_checkpoint import ONNX_FILE
from export.policy import AttentionPrecision, LayerPrecision, Rule, attention_in_island
from export.remedies import Remedies
from export.weights import E4M3_MAX
from mmdit.errors import QuantizationError
from mmdit.family import Family
from mmdit.placement import RULES, FileGraph
from pages import render

_SHOWN = 10  # broken places in an error's message
AUDIT_FILE, AUDIT_PAGE = "audit.json", "audit.html"
_BYTES = {TensorProto.FLOAT8E4M3FN: 1, TensorProto.FLOAT16: 2, TensorProto.FLOAT: 4}


@dataclass(frozen=True)
class Layer:
    """A linear layer. FLOPs count one row of a picture of the family's default size.

    `amax` is the largest magnitude of its input that E4M3 holds, `weight_amax` that of its weights (the
    largest channel's), each 448 scales; None where nothing is quantized. A weight with a scale for each
    channel has [smallest, largest].
    """

    name: str
    group: str
    precision: str
    reason: str
    flops: int
    weights: int
    bytes_fp16: int
    bytes: int
    weight_amax: float | None = None
    weight_scale: float | list[float] | None = None
    amax: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Products:
    """Attention's two matrix products of one module; `scales` of q, k, s (softmax) and v when in FP8."""

    name: str
    precision: str
    flops: int
    scales: dict[str, float] = field(default_factory=dict)


def write_audit(
    folder: Path,
    family: Family,
    decisions: Mapping[str, Rule],
    attention: AttentionPrecision,
    remedies: Mapping[str, Remedies],
) -> dict[str, float]:
    """Write `audit.json` and `audit.html` about the FP8 file in `folder` beside it; returns the totals.

    Raises QuantizationError when the file is not what the policy decided, or breaks a placement rule.
    """
    graph = FileGraph.read(folder / ONNX_FILE)
    layers = _layers(graph, family, decisions)
    products = _products(graph, family, decisions, attention)
    rules = [{"rule": str(rule.__doc__), **asdict(rule(graph))} for rule in RULES]
    totals = _totals(graph, family, layers, products)
    content = {
        "layers": [asdict(layer) for layer in layers],
        "attention": [asdict(product) for product in products],
        "totals": totals,
        "remedies": [
            {"component": component, **remedy}
            for component, found in remedies.items()
            for remedy in found.listed()
        ],
        "rules": rules,
    }
    (folder / AUDIT_FILE).write_text(json.dumps(content, indent=1) + "\n")
    (folder / AUDIT_PAGE).write_text(render("audit.html.j2", name=family.name, **content), encoding="utf-8")
    broken = [(rule["rule"], place) for rule in rules for place in rule["broken"]]
    if broken:
        raise QuantizationError(
            f"the FP8 file breaks placement rules in {len(broken)} places: "
            + "; ".join(f"{place}: {rule}" for rule, place in broken[:_SHOWN])
        )
    return totals


def _layers(graph: FileGraph, family: Family, decisions: Mapping[str, Rule]) -> list[Layer]:
    products = graph.linears()
    missing = sorted(decisions.keys() ^ products.keys())
    if missing:
        raise QuantizationError(
            f"{missing[0]}: not in both the checkpoint and the FP8 file ({len(missing)} layers)"
        )
    shapes = {name: (linear.outputs, int(linear.weight.dims[0])) for name, linear in products.items()}
    flops = layer_flops(family, shapes)
    layers = []
    for name, rule in decisions.items():
        linear = products[name]
        if linear.precision != rule.precision.value:
            raise QuantizationError(
                f"{name} is {linear.precision} in the FP8 file, but {rule.precision.value} by the policy: "
                "half-quantized layers are not written"
            )
        weights = int(np.prod(linear.weight.dims))
        scales = (
            None if linear.weight_scale is None else numpy_helper.to_array(linear.weight_scale).astype(float)
        )
        scale = None if linear.input_scale is None else float(numpy_helper.to_array(linear.input_scale))
        layers.append(
            Layer(
                name=name,
                group=rule.group,
                precision=rule.precision.value,
                reason=rule.reason,
                flops=flops[name],
                weights=weights,
                bytes_fp16=2 * weights,
                bytes=weights * _BYTES[linear.weight.data_type] + (0 if scales is None else 2 * scales.size),
                weight_amax=None if scales is None else float(scales.max() * E4M3_MAX),
                weight_scale=_spread(scales),
                amax=None if scale is None else scale * E4M3_MAX,
                scale=scale,
            )
        )
    return layers


def _spread(scales: Any) -> float | list[float] | None:
    if scales is None:
        return None
    return float(scales) if scales.ndim == 0 else [float(scales.min()), float(scales.max())]


def _products(
    graph: FileGraph, family: Family, decisions: Mapping[str, Rule], decided: AttentionPrecision
) -> list[Products]:
    found = []
    linears = graph.linears()
    for name, scales in graph.attentions().items():
        held = [operand for operand, scale in scales.items() if scale is not None]
        inside = attention_in_island(name, decisions)
        whole = decided is AttentionPrecision.FP8 and not inside
        if len(held) != (4 if whole else 0):
            raise QuantizationError(
                f"{name}: attention's operands {', '.join(held) or 'none'} are quantized, expected "
                f"{'all of q, k, s, v' if whole else 'none'}"
            )
        shapes = {f"{name}.to_q": (linears[f"{name}.to_q"].outputs, 0)}
        found.append(
            Products(
                name=name,
                precision=LayerPrecision.FP32.value if inside else decided.value,
                flops=attention_flops(family, shapes),
                scales={
                    operand: float(numpy_helper.to_array(scale))
                    for operand, scale in scales.items()
                    if scale is not None
                },
            )
        )
    return found


def _totals(
    graph: FileGraph, family: Family, layers: list[Layer], products: list[Products]
) -> dict[str, float]:
    """What the project promises: shares of the FLOPs in FP8, and the bytes of the weights."""
    fp8, weights_only = LayerPrecision.FP8.value, LayerPrecision.FP8_WEIGHTS.value
    linear = sum(layer.flops for layer in layers)
    in_fp8 = sum(layer.flops for layer in layers if layer.precision == fp8)
    on_fp8 = in_fp8 + sum(layer.flops for layer in layers if layer.precision == weights_only)
    attention = sum(product.flops for product in products)
    attention_fp8 = sum(product.flops for product in products if product.precision == fp8)
    patches = 2 * image_tokens(family) * graph.patch_weights()
    stored = sum(layer.bytes for layer in layers)
    return {
        "linear_flops_in_fp8": in_fp8 / linear,
        "linear_flops_on_fp8_weights": on_fp8 / linear,
        "all_flops_in_fp8": (in_fp8 + attention_fp8) / (linear + attention + patches),
        "flops": linear + attention + patches,
        "linear_weight_bytes_fp16": sum(layer.bytes_fp16 for layer in layers),
        "linear_weight_bytes": stored,
        "weight_bytes_fp16": sum(layer.bytes_fp16 for layer in layers) + graph.other_bytes(),
        "weight_bytes": stored + graph.other_bytes(),
        "fp8_layers": sum(layer.precision == fp8 for layer in layers),
        "fp8_weight_layers": sum(layer.precision == weights_only for layer in layers),
        "fp16_layers": sum(layer.precision == LayerPrecision.FP16.value for layer in layers),
        "fp32_layers": sum(layer.precision == LayerPrecision.FP32.value for layer in layers),
    }
