"""The audit: what it says of each layer, what it counts, and what it refuses."""

import json

import onnx
import pytest
from diffusers import SD3Transformer2DModel
from onnx import numpy_helper

import export.quiet  # noqa: F401  isort: skip
import torch

from export.audit import AUDIT_FILE, AUDIT_PAGE, write_audit
from export.checkpoint import linears
from export.onnx_from_checkpoint import ONNX_FILE
from export.policy import AttentionPrecision, LayerPrecision, Rule, read_policy
from export.remedies import Fold, Island, Remedies
from mmdit.contract import Precision
from mmdit.errors import QuantizationError
from mmdit.family import family_from_checkpoint

LAYER = "transformer_blocks.1.ff.net.2"
FP16 = AttentionPrecision.FP16


@pytest.fixture(scope="module")
def family(miniature):
    return family_from_checkpoint(miniature)


@pytest.fixture(scope="module")
def decisions(miniature):
    return read_policy().decide(linears(miniature))


@pytest.fixture(scope="module")
def model(build) -> onnx.ModelProto:
    return onnx.load(build.onnx("mmdit", Precision.FP8) / ONNX_FILE)


@pytest.fixture(scope="module")
def audit(build) -> dict:
    return json.loads((build.onnx("mmdit", Precision.FP8) / AUDIT_FILE).read_text())


@pytest.fixture
def audited(family, decisions, model, tmp_path):
    """Audits a changed copy of the FP8 file."""

    def run(change=lambda model: None, decided=decisions, attention=FP16, remedies=None) -> dict:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        change(changed)
        onnx.save(changed, tmp_path / ONNX_FILE)
        write_audit(tmp_path, family, decided, attention, remedies or {})
        return json.loads((tmp_path / AUDIT_FILE).read_text())

    return run


def find(model: onnx.ModelProto, layer: str, kind: str) -> onnx.NodeProto:
    path = layer.replace(".", "/").replace("blocks/", "blocks.").replace("net/", "net.")
    return next(node for node in model.graph.node if path in node.name and node.op_type == kind)


def test_each_layer_has_its_precision_scales_and_bytes(audit, model):
    """As they are in the file."""
    layers = {layer["name"]: layer for layer in audit["layers"]}
    assert len(layers) == 68
    scales = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith("/scale")}
    layer = layers[LAYER]
    stored = scales["/model/transformer_blocks.1/ff/net.2/input_quantizer/scale"]
    assert layer["scale"] == float(numpy_helper.to_array(stored))
    assert layer["amax"] == 448 * layer["scale"]
    assert (layer["precision"], layer["group"]) == ("fp8", "feed-forward")
    assert layer["bytes"] == layer["weights"] + 2 == 192 * 768 + 2
    adaln = layers["transformer_blocks.1.norm1.linear"]
    assert adaln["precision"] == "fp8-weights" and adaln["amax"] is None
    low, high = adaln["weight_scale"]
    assert 2**-14 <= low < high and adaln["bytes"] == adaln["weights"] + 2 * adaln["weights"] // 192
    outside = layers["proj_out"]
    assert outside["bytes"] == outside["bytes_fp16"] and outside["weight_scale"] is None


def test_the_shares_of_flops_are_those_of_the_layers(audit):
    """Linears in FP8 over all linears; attention's products and the patch embedding count among all FLOPs."""
    totals, layers = audit["totals"], audit["layers"]
    linear = sum(layer["flops"] for layer in layers)
    fp8 = sum(layer["flops"] for layer in layers if layer["precision"] == "fp8")
    products = sum(product["flops"] for product in audit["attention"])
    assert totals["linear_flops_in_fp8"] == fp8 / linear >= 0.95
    assert totals["flops"] > linear + products
    assert totals["all_flops_in_fp8"] == fp8 / totals["flops"]
    # 64 image and 333 context tokens, 192 wide: two products of 2 N² D each
    assert audit["attention"][0]["flops"] == 4 * (64 + 333) ** 2 * 192
    assert audit["attention"][1]["flops"] == 4 * 64**2 * 192


def test_the_bytes_are_those_of_the_file(audit, model):
    """Weights, scales and everything else that is stored, but for the graph itself."""
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    activations = 2 * sum(layer["scale"] is not None for layer in audit["layers"])
    assert audit["totals"]["weight_bytes"] == stored - activations


def test_every_placement_rule_holds_for_the_file(audit):
    """And each has looked at something."""
    assert len(audit["rules"]) == 9
    assert all(rule["places"] and not rule["broken"] for rule in audit["rules"])


def test_remedies_are_listed_with_their_magnitudes(audited):
    """A fold and an island, with the tensors that called for them."""
    fold = Fold(stream="hidden", power=3, magnitude=2e5, tensor="encoder: add", reason="too large")
    island = Island(module="encoder.block.1", magnitude=9e5, tensor="wo: mul", reason="too large")
    found = audited(remedies={"t5": Remedies(folds=(fold,), islands=(island,))})["remedies"]
    assert [(each["component"], each["place"], each["magnitude"]) for each in found] == [
        ("t5", "hidden", 2e5),
        ("t5", "encoder.block.1", 9e5),
    ]


def test_a_layer_whose_input_is_not_quantized_is_refused(audited):
    """Half-quantized: its weights are FP8, its products are not."""

    def change(model):
        quantize = find(model, LAYER, "QuantizeLinear")
        product = find(model, LAYER, "MatMul")
        product.input[0] = quantize.input[0]

    with pytest.raises(QuantizationError, match=rf"{LAYER} is fp8-weights in the FP8 file, but fp8"):
        audited(change)


def test_a_layer_whose_weight_is_not_quantized_is_refused(audited, decisions):
    """The policy decided FP8, the file has it in FP8 too, but another policy has it in FP16."""
    other = decisions | {LAYER: Rule(pattern=".*", precision=LayerPrecision.FP16)}
    with pytest.raises(QuantizationError, match=rf"{LAYER} is fp8 in the FP8 file, but fp16 by the policy"):
        audited(decided=other)


def test_attention_that_is_quantized_in_part_is_refused(audited):
    """The softmax alone, as ModelOpt's own exporter leaves it."""

    def change(model):
        softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
        product = next(node for node in model.graph.node if softmax.output[0] in node.input)
        scale = next(tensor.name for tensor in model.graph.initializer if tensor.name.endswith("/scale"))
        pair = [
            onnx.helper.make_node("QuantizeLinear", [softmax.output[0], scale, "fp8_zero_point"], ["q"]),
            onnx.helper.make_node("DequantizeLinear", ["q", scale], ["dq"]),
        ]
        index = list(model.graph.node).index(product)
        product.input[0] = "dq"
        for node in reversed(pair):
            model.graph.node.insert(index, node)

    with pytest.raises(QuantizationError, match=r"attention's operands s are quantized, expected none"):
        audited(change)


def test_attention_that_should_be_quantized_is_refused_when_it_is_not(audited):
    """All or nothing, as the policy says for the target."""
    with pytest.raises(QuantizationError, match="operands none are quantized, expected all of q, k, s, v"):
        audited(attention=AttentionPrecision.FP8)


def test_the_page_shows_every_layer_and_needs_no_network(build, audit):
    """One file."""
    text = (build.onnx("mmdit", Precision.FP8) / AUDIT_PAGE).read_text()
    assert all(layer["name"] in text for layer in audit["layers"])
    assert f"{audit['totals']['linear_flops_in_fp8']:.1%}" in text
    assert "http" not in text and "<script" not in text and "src=" not in text


def test_mediums_geometry_takes_at_most_52_percent_of_fp16s_bytes():
    """With AdaLN's weights in FP8, counted from the real shapes; measured on disk in docs/measurements."""
    from measure.geometry import config_of

    config = config_of("medium")
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    side, width = config["pos_embed_max_size"], config["caption_projection_dim"]
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    sizes["pos_embed.pos_embed"] = side * width  # by row and by column
    weights = {name: tensor.shape[0] for name, tensor in model.state_dict().items() if tensor.ndim == 2}
    decided = read_policy().decide(name.removesuffix(".weight") for name in weights)
    saved = 0
    for name, channels in weights.items():
        precision = decided[name.removesuffix(".weight")].precision
        scales = {LayerPrecision.FP8: 2, LayerPrecision.FP8_WEIGHTS: channels}.get(precision)
        saved += 0 if scales is None else sizes[name] - 2 * scales
    fp16 = 2 * sum(sizes.values())
    assert 4.4e9 < fp16 < 4.6e9
    assert (fp16 - saved) / fp16 <= 0.52
