"""Checkpoint and calibration → the MMDiT's FP8 ONNX file: native Q/DQ, weights stored as E4M3."""

import contextlib
import io
import json
import logging
from pathlib import Path

import numpy as np
import onnx
import torch
from modelopt.onnx.export import FP8QuantExporter
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.modules import Mmdit, load_module
from export.onnx_from_checkpoint import ONNX_FILE, check_finite, save_onnx, trace
from export.quantization import E4M3_MAX, as_json, audit, insert_quantizers, set_ranges, totals
from mmdit.contract import Signature
from mmdit.errors import QuantizationError
from mmdit.family import Family

logging.getLogger("modelopt.onnx").setLevel(logging.WARNING)  # its import sets INFO

LAYERS_FILE = "layers.json"


def quantized_module(checkpoint: Path, ranges: dict[str, float], dtype: torch.dtype = torch.float16) -> Mmdit:
    """The MMDiT with ModelOpt's fake quantization; the reference for the FP8 ONNX file."""
    module = load_module("mmdit", checkpoint, dtype)
    check_finite("mmdit", module)
    assert isinstance(module, Mmdit)
    insert_quantizers(module.model)
    set_ranges(module.model, ranges)
    # Weights that are E4M3 already: ModelOpt's export divides in FP16 before it rounds to E4M3, and such
    # double rounding would move one weight in 250 by a step.
    with torch.no_grad():
        for layer in module.modules():
            if getattr(layer, "weight_quantizer", None) and layer.weight_quantizer.is_enabled:
                layer.weight.copy_(layer.weight_quantizer(layer.weight))
    return module


def write_fp8_onnx(
    family: Family,
    signature: Signature,
    checkpoint: Path,
    ranges: dict[str, float],
    folder: Path,
) -> dict[str, float]:
    """Write `model.onnx` and `layers.json` (what was done to each layer) into `folder`.

    Returns the totals. Raises QuantizationError when a quantized layer of the module is not quantized
    in the file.
    """
    module = quantized_module(checkpoint, ranges)
    path = folder / ONNX_FILE
    trace(module, signature, path)
    model = native_fp8(onnx.load(path))
    layers = audit(module.model, family)
    _check_every_layer(model, module)
    save_onnx(model, path)
    (folder / LAYERS_FILE).write_text(json.dumps(as_json(layers), indent=1) + "\n")
    return totals(layers)


def native_fp8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn ModelOpt's exported quantizers into ONNX's own Q/DQ, and the weights into E4M3.

    ModelOpt's `compress_weights` stores the weights. Its `post_process` is not used: it would also
    quantize the patch embedding's weights and the softmax of attention that is not quantized
    (modelopt 0.47), and it leaves the nodes in the `trt` domain.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        model = FP8QuantExporter.compress_weights(model)
    zero = onnx.TensorProto(name="fp8_zero_point", data_type=TensorProto.FLOAT8E4M3FN, raw_data=b"\0")
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        if node.op_type == "TRT_FP8QuantizeLinear":
            node.op_type, node.domain = "QuantizeLinear", ""
            node.input.append(zero.name)
            node.attribute.append(helper.make_attribute("saturate", 1))
        elif node.op_type in ("TRT_FP8DequantizeLinear", "DequantizeLinear"):
            node.op_type, node.domain = "DequantizeLinear", ""
    domains = [entry for entry in model.opset_import if entry.domain != "trt"]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    # The shapes and types that the exporter wrote for the trt nodes (UINT8, unknown) are wrong now.
    del model.graph.value_info[:]
    return model


def _check_every_layer(model: onnx.ModelProto, module: nn.Module) -> None:
    """Raise QuantizationError unless the file quantizes what the module does, with the same ranges."""
    constants = {weight.name: weight for weight in model.graph.initializer}
    found: dict[str, TensorProto] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] in constants
        ):
            # /model/transformer_blocks.0/attn/to_q/input_quantizer/… → model.transformer_blocks.0.…
            found[".".join(node.name.strip("/").split("/")[:-1])] = constants[node.input[1]]
    expected = {
        name: quantizer
        for name, quantizer in module.named_modules()
        if name.endswith("_quantizer") and getattr(quantizer, "is_enabled", False)
    }
    # TorchScript names scopes by attribute; to_out.0 and net.0.proj appear there as they are.
    if found.keys() != expected.keys():
        differing = sorted(found.keys() ^ expected.keys())
        raise QuantizationError(
            f"the FP8 file and the policy differ at {differing[0]} ({len(differing)} places): "
            "this version of ModelOpt exports differently"
        )
    for name, quantizer in expected.items():
        scale = float(numpy_helper.to_array(found[name]))
        if not np.isclose(scale, float(quantizer.amax) / E4M3_MAX, rtol=1e-6, atol=0):
            raise QuantizationError(
                f"{name}: its scale in the file is {scale}, expected {float(quantizer.amax) / E4M3_MAX}"
            )
