"""What ModelOpt's own ONNX exporter leaves wrong, which `export/native_fp8.py` is there to repair.

A test that fails here is good news: with that version of ModelOpt the repair, or a part of it, can go.
"""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import export.quiet  # noqa: F401  isort: skip
import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

E4M3 = {"num_bits": (4, 3), "axis": None}


class Block(nn.Module):
    """A patch embedding, one quantized linear, and attention that nobody asked to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 96, 2, stride=2)
        self.linear = nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        query = self.linear(tokens)
        return (query @ tokens.transpose(1, 2)).softmax(-1) @ tokens


def quantized(axis: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    module = Block().half().eval()
    config = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "linear.weight_quantizer", "cfg": E4M3 | {"axis": axis}, "enable": True},
        {"quantizer_name": "linear.input_quantizer", "cfg": E4M3, "enable": True},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(module, {"quant_cfg": config, "algorithm": None})
    weight = module.linear.weight.detach().abs().float()
    module.linear.weight_quantizer.amax = weight.amax() if axis is None else weight.amax(1, keepdim=True)
    module.linear.input_quantizer.amax = torch.tensor(3.7)
    return module


def traced(module: nn.Module, path: Path) -> onnx.ModelProto:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = (torch.randn(1, 4, 8, 8).half(),)
        torch.onnx.export(
            module, example, str(path), opset_version=20, dynamo=False, do_constant_folding=True
        )
    return onnx.load(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> onnx.ModelProto:
    """What ModelOpt's FP8QuantExporter makes of the traced module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.onnx.export.fp8_exporter import FP8QuantExporter

        model = traced(quantized(), tmp_path_factory.mktemp("modelopt") / "model.onnx")
        return FP8QuantExporter.process_model(model)


def test_its_trace_still_has_nodes_of_a_domain_of_its_own(tmp_path):
    """Q and DQ are `trt::TRT_FP8…`, over weights in 16 bits."""
    model = traced(quantized(), tmp_path / "model.onnx")
    kinds = {node.op_type for node in model.graph.node if node.domain == "trt"}
    assert kinds == {"TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"}
    stored = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2}
    assert stored == {TensorProto.FLOAT16}


def test_it_still_quantizes_the_softmax_of_attention_that_is_not_quantized(exported):
    """Half-quantized attention costs accuracy and fuses nowhere."""
    (softmax,) = [node for node in exported.graph.node if node.op_type == "Softmax"]
    readers = {node.op_type for node in exported.graph.node if softmax.output[0] in node.input}
    assert readers & {"QuantizeLinear", "TRT_FP8QuantizeLinear"}


def test_it_still_quantizes_the_weights_of_the_patch_embedding(exported):
    """Which the configuration left alone."""
    producers = {name: node for node in exported.graph.node for name in node.output}
    (convolution,) = [node for node in exported.graph.node if node.op_type == "Conv"]
    assert producers[convolution.input[1]].op_type == "DequantizeLinear"


def test_it_still_knows_one_scale_for_a_tensor_alone(tmp_path):
    """A scale for each output channel cannot be traced."""
    with pytest.raises(AssertionError, match="only for per-tensor quantization"):
        traced(quantized(axis=0), tmp_path / "model.onnx")


def test_its_e4m3_weights_are_still_rounded_from_a_quotient_in_fp16(exported):
    """One weight in hundreds falls on another E4M3 number than the fake quantization has."""
    module = quantized()
    amax = float(module.linear.weight_quantizer.amax)
    weight = module.linear.weight.detach().float()
    (stored,) = [
        tensor
        for tensor in exported.graph.initializer
        if tensor.data_type == TensorProto.FLOAT8E4M3FN and sorted(tensor.dims) == [96, 96]
    ]
    bits = torch.tensor(np.frombuffer(stored.raw_data, np.uint8).copy()).reshape(*stored.dims)
    once = (weight / (amax / 448)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert not torch.equal(bits, once.T) and not torch.equal(bits, once)
