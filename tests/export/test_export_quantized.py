"""From calibrated ranges to the quantized module and its file: what is rounded, and what is refused."""

import math

import numpy as np
import onnx
import pytest
from onnx_linears import Graph

import export.quiet  # noqa: F401  isort: skip
from torch import nn

from export.fp8_from_calibration import write_fp8_onnx
from export.modules import load_module
from export.native_fp8 import native_fp8
from export.onnx_from_checkpoint import ONNX_FILE
from mmdit.contract import Precision, components
from mmdit.errors import QuantizationError
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set


@pytest.fixture(scope="module")
def family(miniature):
    return family_from_checkpoint(miniature)


@pytest.fixture(scope="module")
def signature(family):
    return components(family, shape_set(family))["mmdit"]


def test_a_range_is_rounded_up_to_a_scale_that_fp16_holds(fake_quantized, ranges):
    """So that the file and the fake quantization divide by the same number, and nothing is cut off."""
    modules = dict(fake_quantized.model.named_modules())
    for name, measured in ranges.items():
        amax = float(modules[name].input_quantizer.amax)
        assert measured <= amax <= measured * (1 + 2**-10)
        assert float(np.float16(amax / 448)) == amax / 448


def test_the_same_calibration_gives_the_same_bytes(build, quantized, signature, ranges, tmp_path):
    """Nothing of the file depends on the run that made it."""
    write_fp8_onnx(quantized(ranges), signature, tmp_path)
    folder = build.onnx("mmdit", Precision.FP8)
    assert (tmp_path / ONNX_FILE).read_bytes() == (folder / ONNX_FILE).read_bytes()


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_a_range_that_can_be_no_scale_is_refused(value, quantized, ranges):
    """The message names the layer and the value."""
    layer = "transformer_blocks.1.ff.net.2"
    with pytest.raises(QuantizationError, match=rf"{layer}: .*{value}"):
        quantized(ranges | {layer: value})


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_calibration_of_other_layers_is_refused(change, quantized, ranges):
    """A layer without a range, and a range without a layer, are named."""
    layer = "transformer_blocks.0.attn.to_q" if change == "missing" else "proj_out"
    other = {name: value for name, value in ranges.items() if name != layer}
    if change == "unknown":
        other[layer] = 1.0
    with pytest.raises(QuantizationError, match=rf"^{layer}: the calibration has .*calibrate again"):
        quantized(other)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_weights_without_a_range_are_refused(value, miniature, quantized, ranges, monkeypatch):
    """All zero, or not numbers: the message names the layer."""
    layer = "transformer_blocks.1.ff.net.2"

    def damaged(*arguments: object) -> nn.Module:
        module = load_module(*arguments)
        module.model.get_submodule(layer).weight.fill_(value)
        return module

    monkeypatch.setattr("export.fp8_from_calibration.load_module", damaged)
    monkeypatch.setattr("export.fp8_from_calibration.check_finite", lambda *_: None)
    with pytest.raises(QuantizationError, match=rf"{layer}: its weights' largest magnitude is {value}"):
        quantized(ranges)


def test_a_file_that_quantizes_other_layers_than_the_module_is_refused(
    quantized, signature, ranges, tmp_path, monkeypatch
):
    """Should ModelOpt's export change, the file is not written with a layer left out."""

    def forgetful(graph, scales) -> None:
        native_fp8(graph, scales)
        nodes = graph.model.graph.node
        next(node for node in nodes if node.op_type == "QuantizeLinear").op_type = "Identity"

    monkeypatch.setattr("export.fp8_from_calibration.native_fp8", forgetful)
    with pytest.raises(QuantizationError, match=r"differ at .*input_quantizer \(1 places\)"):
        write_fp8_onnx(quantized(ranges), signature, tmp_path)


def test_layers_with_equal_weights_each_store_their_own(quantized, signature, ranges, tmp_path):
    """TorchScript's exporter merges equal weights, and two quantizers of different ranges would share one."""
    module = quantized(ranges)
    first, second = (module.model.transformer_blocks[n].attn.to_q for n in (0, 1))
    second.weight.copy_(first.weight)
    second.weight_quantizer.amax = 2 * first.weight_quantizer.amax
    write_fp8_onnx(module, signature, tmp_path)
    graph = Graph(onnx.load(tmp_path / ONNX_FILE))
    stored = [graph.linears()[f"transformer_blocks.{n}.attn.to_q"].weight for n in (0, 1)]
    assert stored[0] != stored[1]
    bits = [np.frombuffer(graph.constants[name].raw_data, np.uint8) for name in stored]
    assert (bits[0] != bits[1]).mean() > 0.9
