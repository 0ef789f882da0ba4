"""Checkpoint and calibration → the MMDiT's FP8 ONNX file: native Q/DQ, weights stored as E4M3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import export.quiet  # noqa: F401  isort: skip
import numpy as np
import torch
from modelopt.torch.quantization import tensor_quant
from onnx import numpy_helper
from torch import Tensor, nn

from export.modules import Mmdit, load_module
from export.native_fp8 import native_fp8
from export.onnx_from_checkpoint import ONNX_FILE, check_finite
from export.policy import AttentionPrecision, Rule
from export.quantization import insert_quantizers, set_ranges
from export.remedies import Remedies, apply_remedies
from export.tracing import traced
from export.weights import E4M3_MAX, Graph, save
from mmdit.contract import Signature
from mmdit.errors import QuantizationError
from mmdit.progress import Progress


def quantized_module(
    checkpoint: Path,
    decisions: Mapping[str, Rule],
    attention: AttentionPrecision,
    remedies: Remedies,
    ranges: Mapping[str, float],
    dtype: torch.dtype = torch.float16,
) -> Mmdit:
    """The MMDiT with ModelOpt's fake quantization; the reference for the FP8 ONNX file."""
    module = load_module("mmdit", checkpoint, dtype)
    assert isinstance(module, Mmdit)
    check_finite("mmdit", module)
    apply_remedies("mmdit", module, remedies)
    insert_quantizers(module.model, decisions, attention)
    set_ranges(module.model, ranges)
    return module


def write_fp8_onnx(module: Mmdit, signature: Signature, folder: Path) -> dict[str, Any]:
    """Write a quantized module (FP16) as `model.onnx` into `folder`; the module is hollow afterwards.

    Returns findings: the weights' range. Raises QuantizationError when a quantizer of the module is not
    in the file.
    """
    with Progress("onnx-fp8 mmdit", total=2, unit="of trace, save") as progress:
        graph = quantized_graph(module, signature)
        progress.advance()
        return {"weights": save(graph, folder / ONNX_FILE, "onnx-fp8 mmdit")}


def quantized_graph(module: Mmdit, signature: Signature) -> Graph:
    """A quantized module's graph with native Q/DQ; the module is hollow afterwards.

    Raises QuantizationError when a quantizer of the module is not in it.
    """
    ranges = _ranges(module)
    scales = _weight_scales(module)
    # Hollow weights have nothing to round: doing it took 13.3 GB instead of 7.5 at SD3.5 Large's geometry.
    with mock.patch.object(tensor_quant, "quantize_op", lambda inputs, *_, **__: inputs.view_as(inputs)):
        graph = traced(module, signature)
    native_fp8(graph, scales)
    _check_every_quantizer(graph, ranges)
    return graph


def _ranges(module: nn.Module) -> dict[str, Tensor]:
    """Enabled quantizer → its range."""
    return {
        name: quantizer.amax.clone()
        for name, quantizer in module.named_modules()
        if name.endswith("_quantizer") and getattr(quantizer, "is_enabled", False)
    }


def _weight_scales(module: nn.Module) -> dict[str, Tensor]:
    """Weight → its scale; ModelOpt's exporter, which knows one scale a tensor, is given the largest."""
    scales = {}
    for name, layer in module.named_modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            amax = quantizer.amax
            scales[f"{name}.weight"] = amax.squeeze() / E4M3_MAX
            if amax.numel() > 1:
                quantizer.reset_amax()
                quantizer.amax = amax.max()
    return scales


def _check_every_quantizer(graph: Graph, expected: Mapping[str, Tensor]) -> None:
    """Raise QuantizationError unless the file quantizes what the module does, with the same ranges."""
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    found = {}
    for node in graph.model.graph.node:
        if node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] in constants
        ):
            # /model/transformer_blocks.0/attn/to_q/input_quantizer/… → model.transformer_blocks.0.…
            found[".".join(node.name.strip("/").split("/")[:-1])] = constants[node.input[1]]
    if found.keys() != expected.keys():
        differing = sorted(found.keys() ^ expected.keys())
        raise QuantizationError(
            f"the FP8 file and the policy differ at {differing[0]} ({len(differing)} places): "
            "this version of ModelOpt exports differently"
        )
    for name, amax in expected.items():
        scale, wanted = numpy_helper.to_array(found[name]), amax.squeeze().numpy() / E4M3_MAX
        if scale.shape != wanted.shape or not np.allclose(scale, wanted, rtol=1e-6, atol=0):
            raise QuantizationError(f"{name}: its scale in the file is {scale}, expected {wanted}")
