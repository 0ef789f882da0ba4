"""The MMDiT with a quantizer at every place that can have one, switched on and off by layer.

The quantizers are put in once: to measure another choice, no weight is read again.
"""

from collections.abc import Mapping
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import SD3Transformer2DModel
from modelopt.torch.quantization.nn import TensorQuantizer

from export.policy import AttentionPrecision, LayerPrecision, Rule
from export.quantization import (
    input_quantizers,
    insert_quantizers,
    representable,
    set_ranges,
    softmax_quantizers,
)
from mmdit.errors import QuantizationError


class Switches:
    """All quantizers of one transformer; none is on at first.

    `candidates`: the layers that can be quantized, each with a rule for FP8; `ranges`: quantizer → the
    largest magnitude of its input, of a calibration with every candidate and attention in FP8.
    """

    def __init__(
        self, transformer: SD3Transformer2DModel, candidates: Mapping[str, Rule], ranges: Mapping[str, float]
    ) -> None:
        insert_quantizers(transformer, candidates, AttentionPrecision.FP8)
        set_ranges(transformer, ranges)
        self.transformer = transformer
        inputs = input_quantizers(transformer)
        self._products = [quantizer for name, quantizer in inputs.items() if name not in candidates]
        self._products += softmax_quantizers(transformer)
        self._layers: dict[str, Any] = {name: transformer.get_submodule(name) for name in candidates}
        self.set({}, attention=False)

    def set(self, layers: Mapping[str, LayerPrecision], *, attention: bool) -> None:
        """Quantize these layers, and attention's products or not; nothing else.

        Raises QuantizationError for a layer that is no candidate.
        """
        if unknown := sorted(layers.keys() - self._layers.keys()):
            raise QuantizationError(
                f"{unknown[0]} has no quantizers: expected a linear layer outside FP32 islands"
            )
        for name, layer in self._layers.items():
            precision = layers.get(name, LayerPrecision.FP16)
            _switch(layer.input_quantizer, precision is LayerPrecision.FP8)
            stored = precision in (LayerPrecision.FP8, LayerPrecision.FP8_WEIGHTS)
            _switch(layer.weight_quantizer, stored)
            if stored:
                _scale(layer, per_channel=precision is LayerPrecision.FP8_WEIGHTS)
        for quantizer in self._products:
            _switch(quantizer, attention)

    def enabled(self) -> list[str]:
        """The names of the quantizers that are on, sorted."""
        return sorted(
            name
            for name, module in self.transformer.named_modules()
            if isinstance(module, TensorQuantizer) and module.is_enabled
        )


def _switch(quantizer: Any, on: bool) -> None:
    if on:
        quantizer.enable()
    else:
        quantizer.disable()


def _scale(layer: Any, *, per_channel: bool) -> None:
    """Give a layer's weights one scale, or one for each output channel, as `insert_quantizers` does."""
    quantizer = layer.weight_quantizer
    if (quantizer.axis == 0) == per_channel:
        return
    magnitudes = layer.weight.detach().abs().float()
    amax = magnitudes.amax(1, keepdim=True) if per_channel else magnitudes.amax()
    quantizer.reset_amax()
    quantizer.axis = 0 if per_channel else None
    with torch.no_grad():
        # on the CPU: not every device finds the next FP16 number
        quantizer.amax = representable(amax.cpu()).to(layer.weight.device)
