"""The MMDiT with ModelOpt's quantizers in the places that the precision policy names."""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import modelopt.torch.quantization as mtq
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn

from export.modules import explicit_attention
from export.policy import AttentionPrecision, LayerPrecision, Rule, attention_in_island
from export.weights import E4M3_MAX
from mmdit.errors import QuantizationError

_E4M3 = {"num_bits": (4, 3), "axis": None}  # one scale for a whole tensor
_SMALLEST_SCALE = 2.0**-14  # the smallest normal number of FP16
_PRODUCTS = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
_SOFTMAX = "softmax_quantizer"


class QuantizedAttention(QuantModule):
    """Attention whose two products take quantized operands: all of q, k, v and softmax, or none of them.

    ModelOpt mixes it into diffusers' Attention in place of its own, which quantizes the softmax alone
    when it exports, and casts to FP32 around both products.
    """

    def _setup(self) -> None:
        for name in (*_PRODUCTS, _SOFTMAX):
            setattr(self, name, TensorQuantizer())

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if not self.q_bmm_quantizer.is_enabled:
            return super().forward(*arguments, **named)
        quantizers = {name[0]: getattr(self, name) for name in (*_PRODUCTS, _SOFTMAX)}
        with explicit_attention(quantizers):
            return super().forward(*arguments, **named)


def insert_quantizers(
    transformer: SD3Transformer2DModel,
    decisions: Mapping[str, Rule],
    attention: AttentionPrecision = AttentionPrecision.FP16,
) -> None:
    """Put quantizers into the transformer as the policy decided; weights' ranges are measured at once.

    Inputs' ranges come from `calibrate` or `set_ranges`. Raises QuantizationError naming a layer whose
    weights have no range.
    """
    quantizers: list[dict[str, object]] = [{"quantizer_name": "*", "enable": False}]
    for name, rule in decisions.items():
        if rule.precision is LayerPrecision.FP8:
            quantizers += [_enable(f"{name}.weight_quantizer"), _enable(f"{name}.input_quantizer")]
        elif rule.precision is LayerPrecision.FP8_WEIGHTS:
            quantizers.append(_enable(f"{name}.weight_quantizer", axis=0))
    if attention is AttentionPrecision.FP8:
        for name, module in transformer.named_modules():
            if isinstance(module, Attention) and not attention_in_island(name, decisions):
                quantizers += [_enable(f"{name}.{product}") for product in (*_PRODUCTS, _SOFTMAX)]
    if Attention in mtq.nn.QuantModuleRegistry:
        mtq.unregister(Attention)
    mtq.register(original_cls=Attention, quantized_cls=QuantizedAttention)
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(transformer, {"quant_cfg": quantizers, "algorithm": None})
        for name, module in transformer.named_modules():
            quantizer = getattr(module, "weight_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                per_channel = decisions[name].precision is LayerPrecision.FP8_WEIGHTS
                magnitudes = module.weight.detach().abs().float()
                amax = magnitudes.amax(1, keepdim=True) if per_channel else magnitudes.amax()
                if not torch.isfinite(amax).all() or not amax.max() > 0:
                    raise QuantizationError(
                        f"{name}: its weights' largest magnitude is {float(amax.max())}; expected a positive "
                        "number (is the checkpoint whole?)"
                    )
                quantizer.amax = representable(amax)
        for quantizer in softmax_quantizers(transformer):
            quantizer.amax = representable(torch.tensor(1.0))  # what a softmax can reach


def set_ranges(transformer: SD3Transformer2DModel, ranges: Mapping[str, float]) -> None:
    """Give each input quantizer its calibrated range; quantizer → largest magnitude.

    Raises QuantizationError when the ranges are of other layers, or one cannot be a scale.
    """
    quantizers = input_quantizers(transformer)
    if missing := sorted(quantizers.keys() - ranges.keys()):
        raise QuantizationError(
            f"{missing[0]}: the calibration has no range for it ({len(missing)} missing in all): "
            "calibrate again"
        )
    if unknown := sorted(ranges.keys() - quantizers.keys()):
        raise QuantizationError(
            f"{unknown[0]}: the calibration has a range, but the policy does not quantize it ({len(unknown)} "
            "in all): calibrate again"
        )
    for name, quantizer in quantizers.items():
        if not (math.isfinite(ranges[name]) and ranges[name] > 0):
            raise QuantizationError(
                f"{name}: its largest magnitude is {ranges[name]} in the calibration; expected a positive "
                "number (is the checkpoint whole?)"
            )
        quantizer.amax = representable(torch.tensor(ranges[name]))


def input_quantizers(transformer: SD3Transformer2DModel) -> dict[str, nn.Module]:
    """Quantizer → the enabled module, for what calibration measures.

    A linear's input goes by the layer's name, attention's operands by `<attention>.q`, `.k` and `.v`.
    """
    found = {}
    for name, module in transformer.named_modules():
        for attribute, key in (("input_quantizer", name), *((p, f"{name}.{p[0]}") for p in _PRODUCTS)):
            quantizer = getattr(module, attribute, None)
            if quantizer is not None and quantizer.is_enabled:
                found[key] = quantizer
    return found


def softmax_quantizers(transformer: SD3Transformer2DModel) -> Iterator[nn.Module]:
    """Attention's enabled softmax quantizers."""
    for module in transformer.modules():
        quantizer = getattr(module, _SOFTMAX, None)
        if quantizer is not None and quantizer.is_enabled:
            yield quantizer


def representable(amax: Tensor) -> Tensor:
    """The least range that holds `amax` and whose scale, range / 448, is a normal FP16 number.

    The file's scales are FP16. With ranges that FP16 rounds, one value in a hundred would fall on the
    other side of an E4M3 rounding there than here: 1 % of a layer's output.
    """
    exact = amax.double().cpu() / E4M3_MAX
    scale = exact.half()
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.double() < exact, above, scale)
    return (scale.float().clamp(min=_SMALLEST_SCALE) * E4M3_MAX).to(amax.device)


def _enable(quantizer: str, axis: int | None = None) -> dict[str, object]:
    return {"quantizer_name": quantizer, "cfg": {**_E4M3, "axis": axis}, "enable": True}
