"""Checkpoint and calibration → the MMDiT's FP8 ONNX file: native Q/DQ, weights stored as E4M3."""

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from export.modules import Mmdit, load_module
from export.native_fp8 import native_fp8
from export.onnx_from_checkpoint import ONNX_FILE, check_finite, save_onnx, traced
from export.quantization import E4M3_MAX, as_json, audit, insert_quantizers, set_ranges, totals
from mmdit.contract import Signature
from mmdit.errors import QuantizationError
from mmdit.family import Family
from mmdit.progress import Progress

LAYERS_FILE = "layers.json"


def quantized_module(checkpoint: Path, ranges: dict[str, float], dtype: torch.dtype = torch.float16) -> Mmdit:
    """The MMDiT with ModelOpt's fake quantization; the reference for the FP8 ONNX file."""
    module = load_module("mmdit", checkpoint, dtype)
    check_finite("mmdit", module)
    assert isinstance(module, Mmdit)
    insert_quantizers(module.model)
    set_ranges(module.model, ranges)
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
    with Progress("onnx-fp8 mmdit", total=3, unit="of load, trace, save") as progress:
        module = quantized_module(checkpoint, ranges)
        progress.advance()
        model = traced(module, signature, folder)
        native_fp8(model)
        _check_every_layer(model, module)
        progress.advance()
        save_onnx(model, folder / ONNX_FILE)
    layers = audit(module.model, family)
    (folder / LAYERS_FILE).write_text(json.dumps(as_json(layers), indent=1) + "\n")
    return totals(layers)


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
