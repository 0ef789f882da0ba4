"""The MMDiT with ModelOpt's quantizers in the places that the precision policy names."""

import contextlib
import io
import math
from dataclasses import asdict, dataclass

import export.quiet  # noqa: F401  isort: skip
import modelopt.torch.quantization as mtq
import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from export.policy import LayerPrecision, rule_for
from mmdit.errors import QuantizationError
from mmdit.family import Family

E4M3_MAX = 448.0  # the largest number of E4M3
_E4M3 = {"num_bits": (4, 3), "axis": None}  # one scale for a whole tensor


@dataclass(frozen=True)
class Layer:
    """What was done to one linear layer, and why.

    `amax` is the largest magnitude of its input that E4M3 holds: calibration's, rounded up to an FP16
    scale; `flops` counts one row of a picture of the family's default size.
    """

    name: str
    precision: str
    reason: str
    in_block: bool
    flops: int
    weights: int
    weight_amax: float
    amax: float | None


def insert_quantizers(transformer: SD3Transformer2DModel) -> None:
    """Put quantizers into the transformer as the policy says; weights' ranges are measured at once.

    Inputs' ranges come from `calibrate` or `set_ranges`.
    """
    quantizers: list[dict[str, object]] = [{"quantizer_name": "*", "enable": False}]
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear):
            precision = rule_for(name).precision
            if precision is not LayerPrecision.FP16:
                quantizers.append(_enable(f"{name}.weight_quantizer"))
            if precision is LayerPrecision.FP8:
                quantizers.append(_enable(f"{name}.input_quantizer"))
    # ModelOpt would also replace the attention's two products; they stay as `modules.attention` has them.
    if Attention in mtq.nn.QuantModuleRegistry:
        mtq.unregister(Attention)
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(transformer, {"quant_cfg": quantizers, "algorithm": None})
        with torch.no_grad():
            for module in transformer.modules():
                quantizer = getattr(module, "weight_quantizer", None)
                if quantizer is not None and quantizer.is_enabled:
                    quantizer.amax = _range(float(module.weight.detach().abs().max()))


def set_ranges(transformer: SD3Transformer2DModel, ranges: dict[str, float]) -> None:
    """Give each input quantizer its calibrated range; layer → largest magnitude.

    Raises QuantizationError when the ranges are of other layers, or one cannot be a scale.
    """
    layers = input_quantizers(transformer)
    if layers.keys() != ranges.keys():
        differing = sorted(layers.keys() ^ ranges.keys())
        raise QuantizationError(
            f"the calibration does not fit the policy's layers ({differing[0]}, {len(differing)} in "
            "all): calibrate again"
        )
    for name, quantizer in layers.items():
        if not (math.isfinite(ranges[name]) and ranges[name] > 0):
            raise QuantizationError(
                f"{name}: its input's largest magnitude is {ranges[name]} in the calibration; expected "
                "a positive number (is the checkpoint whole?)"
            )
        quantizer.amax = _range(ranges[name])


def input_quantizers(transformer: SD3Transformer2DModel) -> dict[str, nn.Module]:
    """Layer → its enabled input quantizer."""
    return {
        name: module.input_quantizer
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and getattr(module, "input_quantizer", None) is not None
        and module.input_quantizer.is_enabled
    }


def audit(transformer: SD3Transformer2DModel, family: Family) -> list[Layer]:
    """What was done to each linear layer of a quantized transformer."""
    image_tokens = (family.default_size // family.size_multiple) ** 2
    inputs = input_quantizers(transformer)
    layers = []
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rule = rule_for(name)
        if ".norm1" in name or name.startswith(("time_text_embed", "norm_out")):
            tokens = 1
        elif "_context" in name or ".add_" in name or "_add_" in name or name == "context_embedder":
            tokens = family.context_tokens
        else:
            tokens = image_tokens
        layers.append(
            Layer(
                name=name,
                precision=rule.precision.value,
                reason=rule.reason,
                in_block=name.startswith("transformer_blocks."),
                flops=2 * tokens * module.in_features * module.out_features,
                weights=module.weight.numel(),
                weight_amax=float(module.weight.detach().abs().max()),
                amax=float(inputs[name].amax) if name in inputs else None,
            )
        )
    return layers


def totals(layers: list[Layer]) -> dict[str, float]:
    """The shares that the project promises: of the blocks' linear FLOPs, and of the weights' bytes."""
    block = [layer for layer in layers if layer.in_block]
    stored = [layer for layer in layers if layer.precision != LayerPrecision.FP16.value]
    on_fp8 = sum(layer.flops for layer in block if layer.precision != LayerPrecision.FP16.value)
    products = sum(layer.flops for layer in block if layer.precision == LayerPrecision.FP8.value)
    flops = sum(layer.flops for layer in block)
    weights = sum(layer.weights for layer in layers)
    fp8_weights = sum(layer.weights for layer in stored)
    return {
        "block_linear_flops_on_fp8_weights": on_fp8 / flops,
        "block_linear_flops_in_fp8": products / flops,
        "linear_weight_bytes_against_fp16": (2 * weights - fp8_weights) / (2 * weights),
        "fp8_layers": len([layer for layer in stored if layer.amax is not None]),
        "fp8_weight_layers": len([layer for layer in stored if layer.amax is None]),
        "fp16_layers": len(layers) - len(stored),
    }


def as_json(layers: list[Layer]) -> list[dict[str, object]]:
    """The audit as JSON can hold it."""
    return [asdict(layer) for layer in layers]


def _range(amax: float) -> torch.Tensor:
    """The least range that holds `amax` and whose scale, range / 448, is an FP16 number.

    The file's scales are FP16. With ranges that FP16 rounds, one value in a hundred would fall on the
    other side of an E4M3 rounding there than here: 1 % of a layer's output.
    """
    scale = np.float16(amax / E4M3_MAX)
    if float(scale) * E4M3_MAX < amax or scale == 0:
        scale = np.nextafter(scale, np.float16(np.inf))
    return torch.tensor(float(scale) * E4M3_MAX)


def _enable(quantizer: str) -> dict[str, object]:
    return {"quantizer_name": quantizer, "cfg": _E4M3, "enable": True}
