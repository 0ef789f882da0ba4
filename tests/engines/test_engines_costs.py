"""What a component's graph costs: FLOPs by precision, weights read, the largest live set."""

import pytest
from onnx import helper

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import SD3Transformer2DModel
from small_graphs import FP8, FP32, model, scalar, weight
from torch.utils.flop_counter import FlopCounterMode

from engines.checks.graph import load
from engines.forecast.costs import Costs, costs
from engines.forecast.model_costs import PUBLISHED, model_costs, published
from engines.source import sources
from export.modules import explicit_attention, load_module
from measure.geometry import config_of
from mmdit.contract import Precision, components, dims_at
from mmdit.errors import EngineError
from mmdit.shapes import shape_set

node = helper.make_node


def only(found: Costs):
    (products,) = found.products
    return products


def counted_flops(module, *inputs) -> int:
    with torch.no_grad(), explicit_attention(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def test_a_product_counts_two_for_each_multiplication_and_reads_its_weight_once():
    """Rows and tokens multiply the FLOPs, not the weight's bytes."""
    graph = model([node("MatMul", ["x", "w"], ["y"])], {"x": ["rows", 7, 32]}, [weight("w", [32, 48])])
    products = only(costs(graph, {"x": (3, 7, 32)}))
    assert (products.flops, products.weight_bytes) == (2 * 3 * 7 * 32 * 48, 2 * 32 * 48)
    assert (products.kind, products.attention) == ("fp16", False)


@pytest.mark.parametrize(
    ("operation", "filter_dims", "attributes"),
    [
        ("Conv", [6, 4, 3, 3], {"pads": [1, 1, 1, 1]}),
        ("Conv", [6, 2, 3, 3], {"pads": [1, 1, 1, 1], "group": 2}),
        ("Conv", [6, 4, 2, 2], {"strides": [2, 2]}),
        ("ConvTranspose", [4, 6, 2, 2], {"strides": [2, 2]}),
    ],
)
def test_a_convolutions_flops_are_torchs(operation, filter_dims, attributes):
    """With groups, strides and padding; a transposed one counts by its inputs."""
    graph = model(
        [node(operation, ["x", "w"], ["y"], kernel_shape=filter_dims[2:], **attributes)],
        {"x": ["rows", 4, "h", "w"]},
        [weight("w", filter_dims)],
    )
    function = torch.nn.functional.conv2d if operation == "Conv" else torch.nn.functional.conv_transpose2d
    expected = counted_flops(
        lambda: function(
            torch.zeros(2, 4, 8, 10),
            torch.zeros(filter_dims),
            stride=attributes.get("strides", 1),
            padding=1 if "pads" in attributes else 0,
            groups=attributes.get("group", 1),
        )
    )
    assert costs(graph, {"x": (2, 4, 8, 10)}).flops == expected


@pytest.mark.parametrize(("transposed", "dims"), [(0, (5, 32)), (1, (32, 5))])
def test_a_gemm_sums_over_the_right_side_of_its_input(transposed, dims):
    """Which is the first one where it is transposed."""
    graph = model(
        [node("Gemm", ["x", "w"], ["y"], transA=transposed)], {"x": list(dims)}, [weight("w", [32, 8])]
    )
    assert costs(graph, {"x": dims}).flops == 2 * 5 * 32 * 8


def linear(quantized_input: bool) -> list:
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale"], ["xd"]),
        node("DequantizeLinear", ["w", "scale"], ["wd"]),
    ]
    return [
        *(nodes if quantized_input else nodes[2:]),
        node("MatMul", ["xd" if quantized_input else "x", "wd"], ["y"]),
    ]


@pytest.mark.parametrize(("quantized_input", "kind"), [(True, "fp8"), (False, "fp16")])
def test_a_product_is_fp8_where_both_operands_are_dequantized(quantized_input, kind):
    """FP8 weights alone run in FP16, and are read with one byte each all the same."""
    zero = helper.make_tensor("zero", FP8, [], b"\0", raw=True)
    graph = model(
        linear(quantized_input),
        {"x": ["rows", 64]},
        [weight("w", [64, 64], FP8), scalar("scale"), zero],
    )
    products = only(costs(graph, {"x": (2, 64)}))
    assert (products.kind, products.weight_bytes) == (kind, 64 * 64)


def test_a_product_in_fp32_is_told_apart():
    """An FP32 island has neither FP16's rate nor its bytes."""
    graph = model([node("MatMul", ["x", "w"], ["y"])], {"x": [2, 8]}, [weight("w", [8, 8], FP32)], FP32)
    products = only(costs(graph, {"x": (2, 8)}))
    assert (products.kind, products.weight_bytes) == ("fp32", 4 * 64)


def attention(head: int) -> tuple:
    graph = model(
        [
            node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            node("MatMul", ["q", "kt"], ["scores"]),
            node("Softmax", ["scores"], ["weights"]),
            node("MatMul", ["weights", "v"], ["y"]),
        ],
        {name: ["rows", 2, "tokens", head] for name in "qkv"},
    )
    return graph, {name: (1, 2, 1000, head) for name in "qkv"}


def test_the_scores_of_fused_attention_take_no_memory():
    """Each is 4 MB here; a head as large as the VAE's fits no fused kernel, and its scores are stored."""
    scores = 2 * 1000 * 1000 * 2
    fused, apart = costs(*attention(64)), costs(*attention(512))
    assert fused.attention_flops == fused.flops == 2 * 2 * 2 * 1000 * 1000 * 64
    assert fused.live < scores == fused.scores
    assert apart.live > scores and apart.scores == 0


def test_a_tensor_lives_from_its_producer_to_its_last_reader():
    """x stays for the sum; each pointwise result but the first overwrites its operand."""
    graph = model(
        [
            node("Sigmoid", ["x"], ["a"]),
            node("Mul", ["a", "a"], ["b"]),
            node("Reshape", ["b", "shape"], ["c"]),
            node("Reshape", ["c", "back"], ["d"]),
            node("Add", ["d", "x"], ["y"]),
        ],
        {"x": ["rows", 1000]},
        [
            helper.make_tensor("shape", 7, [3], [0, 10, 100]),
            helper.make_tensor("back", 7, [2], [0, 1000]),
        ],
    )
    assert costs(graph, {"x": (4, 1000)}).live == 2 * 4 * 1000 * 2


def test_dims_that_cannot_be_told_are_an_error_that_names_the_node():
    """Better than a figure that lacks a product."""
    graph = model([node("NonZero", ["x"], ["y"], name="/model/where")], {"x": [3, 4]})
    with pytest.raises(EngineError, match="NonZero /model/where"):
        costs(graph, {"x": (3, 4)})


def test_inputs_of_another_component_are_an_error():
    """It names what the graph has."""
    graph = model([node("Sigmoid", ["x"], ["y"])], {"x": ["rows", 4]})
    with pytest.raises(EngineError, match=r"inputs are \['x'\], expected \['latent'\]"):
        costs(graph, {"latent": (3, 4)})


@pytest.fixture(scope="module")
def miniature_costs(build):
    """component, precision → the costs of its file, for any size and rows."""
    found = {}
    for precision in Precision:
        for source in sources(build, "miniature", precision)[0]:
            found[source.component, source.precision] = load(source.onnx, source.component)
    family = sources(build, "miniature", Precision.FP16)[1]
    signatures = components(family, shape_set(family))

    def of(component, precision=Precision.FP16, size=(128, 160), rows=1):
        inputs = signatures[component].inputs
        shapes = {tensor.name: (rows, *dims_at(tensor, size)) for tensor in inputs}
        return costs(found[component, precision], shapes)

    return of


@pytest.mark.parametrize("component", ["clip_l", "clip_g", "t5", "mmdit", "vae_decoder"])
def test_a_components_flops_are_what_torch_counts(miniature_costs, miniature, build, component):
    """At an odd size, within 2 %, the module computing and the graph only being read."""
    family = sources(build, "miniature", Precision.FP16)[1]
    inputs = components(family, shape_set(family))[component].inputs
    tensors = [torch.zeros((1, *dims_at(each, (128, 176))), dtype=torch.float32) for each in inputs]
    tensors = [
        each.long() if spec.name == "input_ids" else each for each, spec in zip(tensors, inputs, strict=True)
    ]
    expected = counted_flops(load_module(component, miniature, torch.float32), *tensors)
    assert miniature_costs(component, size=(128, 176)).flops == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("precision", list(Precision))
def test_the_mmdits_costs_grow_with_its_rows(miniature_costs, precision):
    """So one row's are enough: the rest is a multiplication, but for the positions that rows share."""
    one, four = miniature_costs("mmdit", precision), miniature_costs("mmdit", precision, rows=4)
    assert four.flops == 4 * one.flops and four.weights_read == one.weights_read
    assert four.live == pytest.approx(4 * one.live, rel=0.05)


def test_fp8_changes_what_is_read_and_not_what_is_multiplied(miniature_costs):
    """Attention's products stay FP16 by the policy."""
    fp16, fp8 = (miniature_costs("mmdit", precision) for precision in Precision)
    assert fp8.flops == fp16.flops and fp8.attention_flops == fp16.attention_flops
    assert fp8.weights_read < 0.6 * fp16.weights_read
    assert {products.kind for products in fp8.products} == {"fp8", "fp16"}
    assert all(products.kind == "fp16" for products in fp8.products if products.attention)


@pytest.mark.parametrize("geometry", PUBLISHED)
def test_the_published_models_flops_are_what_torch_counts(geometry):
    """A step of two rows at 1024², with 333 text tokens, on the meta device."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config_of(geometry))
        latent, context = torch.empty(2, 16, 128, 128), torch.empty(2, 333, 4096)
        pooled, timestep = torch.empty(2, 2048), torch.empty(2)
    expected = counted_flops(transformer, latent, context, pooled, timestep)
    costs_kept = {each.family.variant: each for each in published()}[geometry]
    for precision in Precision:
        row = costs_kept.at("mmdit", (1024, 1024), precision)
        assert 2 * row.flops == pytest.approx(expected, rel=1e-3)


def test_a_models_costs_are_those_of_its_files(build):
    """Each component once, the text encoders at no size."""
    found, family = sources(build, "miniature", Precision.FP8)
    kept = model_costs(found, family, [(128, 128), (64, 256)])
    assert [entry.size for entry in kept.entries if entry.component == "t5"] == [None]
    assert kept.at("mmdit", (64, 256), Precision.FP8).flops > 0
