"""The FP8 MMDiT: ModelOpt's arithmetic in ONNX's own operators, where the precision policy says so."""

import json
import math

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_linears import Graph, Linear

import export.quiet  # noqa: F401  isort: skip
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from export.audit import AUDIT_FILE
from export.modules import load_module
from export.onnx_from_checkpoint import ONNX_FILE
from export.tracing import example_inputs
from export.weights import E4M3_MAX
from mmdit.contract import Precision, components
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set

LAYERS = 61  # linears in the miniature's four blocks, two of them with dual attention


# What stays FP16: every other linear, and the patch embedding.
HIGH_PRECISION = {
    "pos_embed.proj",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "context_embedder",
    "norm_out.linear",
    "proj_out",
}


# Relative error of a layer's output, measured over all layers: 0.03 % in the middle; at worst 0.7 %, where
# calibration gave a scale of few bits (35 / 2048), so that many values lie half-way between two E4M3
# numbers: ModelOpt multiplies by the inverse, ONNX Runtime divides.
WORST_LAYER, MIDDLE_LAYER = 0.01, 0.001


@pytest.fixture(scope="module")
def family(miniature):
    return family_from_checkpoint(miniature)


@pytest.fixture(scope="module")
def signature(family):
    return components(family, shape_set(family))["mmdit"]


@pytest.fixture(scope="module")
def fp8_model(build):
    return onnx.load(build.onnx("mmdit", Precision.FP8) / ONNX_FILE)


@pytest.fixture(scope="module")
def fp8_graph(fp8_model):
    return Graph(fp8_model)


@pytest.fixture(scope="module")
def fp16_graph(build):
    return Graph(onnx.load(build.onnx("mmdit") / ONNX_FILE))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each output without a shape
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


def quantize_nodes(graph: Graph) -> list[onnx.NodeProto]:
    return [node for node in graph.nodes if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("size", [(80, 112), (128, 160)], ids=str)
def test_each_quantized_layer_gives_what_modelopts_gives(
    size, fp8_model, fp8_graph, fake_quantized, signature
):
    """Fed the same input, a layer of the file and one of the module agree to 1 %."""
    linears = {
        name: linear
        for name, linear in fp8_graph.linears().items()
        if fp8_graph.constants[linear.weight].data_type == TensorProto.FLOAT8E4M3FN
    }
    assert len(linears) == LAYERS
    exposed = onnx.ModelProto()
    exposed.CopyFrom(fp8_model)
    names = dict.fromkeys(name for linear in linears.values() for name in (linear.input, linear.output))
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names
    )
    inputs = [value.numpy() for value in example_inputs(signature, 2, size)]
    feed = {tensor.name: value for tensor, value in zip(signature.inputs, inputs, strict=True)}
    values = dict(zip(names, session(exposed).run(list(names), feed), strict=True))

    modules = dict(fake_quantized.model.named_modules())
    errors = {}
    for name, linear in linears.items():
        with torch.no_grad():
            expected = modules[name](torch.from_numpy(values[linear.input]).float()).numpy()
        errors[name] = norm(values[linear.output] - expected) / norm(expected)
    worst = max(errors, key=errors.__getitem__)
    middle = float(np.median(list(errors.values())))
    print(f"\n{size}: worst of {len(errors)} layers {errors[worst]:.2%} ({worst}), median {middle:.3%}")
    assert errors[worst] <= WORST_LAYER
    assert middle <= MIDDLE_LAYER


@pytest.mark.parametrize("timestep", [999.0, 750.0, 500.0, 100.0, 20.0])
def test_the_whole_pass_is_nearer_to_modelopts_than_fp8_is_to_fp16(
    timestep, build, fp8_model, fake_quantized, signature, denoising
):
    """At most 0.75 of FP8's own error: rounding flips, spread over the blocks, leave about half of it."""
    feed = denoising(timestep, 80, 112)
    inputs = [torch.from_numpy(feed[tensor.name]) for tensor in signature.inputs]
    fp8 = session(fp8_model).run(None, feed)[0].astype(np.float64)
    fp16 = session(onnx.load(build.onnx("mmdit") / ONNX_FILE)).run(None, feed)[0].astype(np.float64)
    with torch.no_grad():
        modelopt = fake_quantized(*(value.float() for value in inputs)).numpy()
    to_modelopt, to_fp16 = norm(fp8 - modelopt) / norm(fp16), norm(fp8 - fp16) / norm(fp16)
    print(f"\ntimestep {timestep:.0f}: FP8 file to ModelOpt {to_modelopt:.2%}, to FP16 {to_fp16:.2%}")
    assert 0.005 < to_fp16 < 0.1  # measured 4.1 to 9.5 %: quantized, and not broken
    assert to_modelopt <= 0.75 * to_fp16


def test_nearly_all_flops_of_the_blocks_linears_run_on_fp8_weights(
    build, miniature, fp8_graph, signature, family
):
    """At least 95 %, counted from the shapes that really pass; each layer's count is the report's."""
    module = load_module("mmdit", miniature, torch.float16)
    flops = {}
    for name, layer in module.model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda layer, given, _, name=name: flops.update(
                    {name: 2 * math.prod(given[0].shape) * layer.out_features}
                )
            )
    with torch.no_grad():
        module(*example_inputs(signature, 1, (family.default_size, family.default_size)))
    on_fp8 = {
        name
        for name, linear in fp8_graph.linears().items()
        if fp8_graph.constants[linear.weight].data_type == TensorProto.FLOAT8E4M3FN
    }
    blocks = {name: count for name, count in flops.items() if name.startswith("transformer_blocks.")}
    share = sum(count for name, count in blocks.items() if name in on_fp8) / sum(blocks.values())
    print(f"\n{share:.1%} of the linear FLOPs of the blocks on FP8 weights")
    assert share >= 0.95
    audit = json.loads((build.onnx("mmdit", Precision.FP8) / AUDIT_FILE).read_text())
    assert {layer["name"]: layer["flops"] for layer in audit["layers"]} == flops


def test_quantized_weights_take_half_the_bytes(fp8_graph, fp16_graph):
    """One byte a weight in the file, two in the FP16 file; AdaLN's among them."""
    fp8, fp16 = fp8_graph.linears(), fp16_graph.linears()
    assert fp8.keys() == fp16.keys()
    quantized = [name for name in fp8 if name not in HIGH_PRECISION]
    assert len(quantized) == LAYERS
    assert sum("norm1" in name for name in quantized) == 8

    def stored(graph: Graph, linears: dict[str, Linear]) -> int:
        return sum(len(graph.constants[linears[name].weight].raw_data) for name in quantized)

    assert stored(fp8_graph, fp8) * 2 == stored(fp16_graph, fp16) > 1_000_000


def test_layers_outside_the_blocks_stay_fp16(fp8_graph):
    """FP16 weights, and no quantized input: the embeddings, the embedders and the final projection."""
    linears = fp8_graph.linears()
    high = {
        name
        for name, linear in linears.items()
        if fp8_graph.constants[linear.weight].data_type == TensorProto.FLOAT16
    }
    assert high == HIGH_PRECISION
    assert not any(linears[name].quantized_input for name in high)


def test_inputs_are_quantized_where_fp8_products_run(fp8_graph):
    """Every linear of the blocks but AdaLN's, whose vectors scale every activation."""
    quantized = {name for name, linear in fp8_graph.linears().items() if linear.quantized_input}
    blocks = {name for name in fp8_graph.linears() if name not in HIGH_PRECISION}
    assert quantized == {name for name in blocks if "norm1" not in name}
    assert len(quantize_nodes(fp8_graph)) == len(quantized)  # and nothing else is


def test_attention_products_are_not_half_quantized(fp8_graph):
    """Softmax feeds its product directly, and the scores come from an unquantized product."""
    softmaxes = [node for node in fp8_graph.nodes if node.op_type == "Softmax"]
    assert len(softmaxes) == 6
    for softmax in softmaxes:
        assert [node.op_type for node in fp8_graph.consumers(softmax.output[0])] == ["MatMul"]
        product = fp8_graph.producers[softmax.input[0]]
        assert product.op_type == "MatMul"
        assert "DequantizeLinear" not in {fp8_graph.producers[name].op_type for name in product.input}


def test_quantizers_are_onnxs_own_with_fp16_scales(fp8_model, fp8_graph):
    """Q and DQ share a positive FP16 scalar; E4M3 everywhere; weights have no Q; no domain but ONNX's."""
    assert {node.domain for node in fp8_graph.nodes} == {""}
    assert [entry.domain for entry in fp8_model.opset_import] == [""]
    for node in fp8_graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = fp8_graph.constants[node.input[1]]
        assert scale.data_type == TensorProto.FLOAT16
        assert len(scale.dims) == ("norm1" in node.name)  # AdaLN's weights have one for each channel
        assert numpy_helper.to_array(scale).min() >= 2**-14
        if node.op_type == "QuantizeLinear":
            zero = fp8_graph.constants[node.input[2]]
            assert (zero.data_type, zero.raw_data) == (TensorProto.FLOAT8E4M3FN, b"\0")
            assert node.input[0] not in fp8_graph.constants
            (dequantize,) = fp8_graph.consumers(node.output[0])
            assert dequantize.op_type == "DequantizeLinear"
            other = fp8_graph.constants[dequantize.input[1]]
            assert numpy_helper.to_array(other) == numpy_helper.to_array(scale)
    floats = {tensor.data_type for tensor in fp8_graph.constants.values()}
    assert TensorProto.FLOAT8E5M2 not in floats


def test_a_channel_of_weights_is_rounded_in_units_of_its_own(fp8_graph, miniature):
    """AdaLN's weights: E4M3 over each channel's scale, normal in FP16 even where they are tiny."""
    module = load_module("mmdit", miniature, torch.float16)
    for name, linear in fp8_graph.linears().items():
        if "norm1" in name:
            weight = module.model.get_submodule(name).weight.float()
            (dequantize,) = fp8_graph.consumers(linear.weight)
            scale = torch.tensor(numpy_helper.to_array(fp8_graph.constants[dequantize.input[1]]).tolist())
            assert dequantize.attribute[0].i == 1  # [input, output]
            wanted = (weight.abs().amax(1) / E4M3_MAX).clamp(min=2**-14)
            assert ((scale >= wanted) & (scale <= wanted * (1 + 2**-10))).all()
            stored = fp8_graph.constants[linear.weight]
            bits = torch.frombuffer(bytearray(stored.raw_data), dtype=torch.uint8)
            values = bits.view(torch.float8_e4m3fn).float().reshape(*stored.dims).T
            assert torch.equal(values, (weight / scale[:, None]).to(torch.float8_e4m3fn).float())


def test_the_checker_accepts_the_file(build):
    """Valid with shape inference, although the exporter's own shapes had to go."""
    path = build.onnx("mmdit", Precision.FP8) / ONNX_FILE
    onnx.checker.check_model(str(path), full_check=True)
