"""The readiness check: for each rule a graph that breaks it alone; the miniature's files break none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.checks.operators import TYPES
from engines.checks.readiness import check_ready, readiness, warnings
from engines.source import Source
from mmdit.artifact import Manifest, read_manifest
from mmdit.contract import COMPONENTS, Dtype, Precision, Signature, Tensor, components
from mmdit.errors import EngineError
from mmdit.family import Family
from mmdit.shapes import shape_set

HALF, E4M3 = TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN
SIGNATURE = Signature(
    inputs=(Tensor("x", Dtype.FP16, ("h", 8)),), outputs=(Tensor("y", Dtype.FP16, ("h", 8)),), max_rows=2
)
Change = Callable[[onnx.ModelProto], None]


def model() -> onnx.ModelProto:
    """Attention and a linear in FP8, with its axes and a resize: [rows, h, 8] → [rows, h, 8]."""
    nodes = [
        helper.make_node("Constant", [], ["scale"], "/scale", value=half(0.25)),
        helper.make_node("Mul", ["x", "scale"], ["q"], "/attn/Mul"),
        helper.make_node("Transpose", ["x"], ["k"], "/attn/Transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["scores"], "/attn/MatMul"),
        helper.make_node("Constant", [], ["mask"], "/mask", value=half(-65504)),
        helper.make_node("Add", ["scores", "mask"], ["masked"], "/attn/Add"),
        helper.make_node("Softmax", ["masked"], ["weights"], "/attn/Softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "x"], ["attended"], "/attn/MatMul_1"),
        helper.make_node("Unsqueeze", ["attended", "axis"], ["wide"], "/Unsqueeze"),
        helper.make_node("Resize", ["wide", "", "ones"], ["resized"], "/Resize", mode="nearest"),
        helper.make_node("Squeeze", ["resized", "axis"], ["flat"], "/Squeeze"),
        helper.make_node("QuantizeLinear", ["flat", "x_scale", "zero"], ["x_q"], "/linear/Q"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale"], ["x_dq"], "/linear/DQ"),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["w_dq"], "/linear/weight/DQ"),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["product"], "/linear/MatMul"),
        helper.make_node("Add", ["product", "bias"], ["y"], "/linear/Add"),
    ]
    initializers = [
        numpy_helper.from_array(np.array([1]), "axis"),
        numpy_helper.from_array(np.ones(4, np.float32), "ones"),
        half(0.5, "x_scale"),
        half(0.25, "w_scale"),
        TensorProto(name="zero", data_type=E4M3, raw_data=b"\0"),
        TensorProto(name="w", data_type=E4M3, dims=[8, 8], raw_data=bytes(64)),
        numpy_helper.from_array(np.full(8, 1e-6, np.float16), "bias"),  # a weight may be subnormal
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", HALF, ["rows", "h", 8])],
        [helper.make_tensor_value_info("y", HALF, ["rows", "h", 8])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def half(value: float, name: str = "value") -> TensorProto:
    return numpy_helper.from_array(np.array(value, np.float16), name)


def source(
    folder: Path, change: Change = lambda model: None, weights: dict[str, Any] | None = None
) -> Source:
    """The model's ONNX folder after a change; the linear's weight lies outside."""
    made = model()
    change(made)
    onnx.save_model(
        made,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=64,
    )
    findings = {} if weights is None else {"weights": weights}
    manifest = Manifest(kind="onnx", checkpoint="", made_from={}, settings={}, versions={}, findings=findings)
    return Source("mmdit", Precision.FP8, folder, manifest)


def broken(found: Source) -> dict[str, list[str]]:
    findings = readiness(found, SIGNATURE)
    return {rule: finding.broken for rule, finding in findings.items() if finding.broken}


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(each for each in model.graph.node if each.name == name)


def insert(before: str, *nodes: onnx.NodeProto) -> Change:
    """Put nodes before one, which then reads the last one's output in place of its first input."""

    def change(model: onnx.ModelProto) -> None:
        reader = node(model, before)
        index = list(model.graph.node).index(reader)
        reader.input[0] = nodes[-1].output[0]
        for offset, each in enumerate(nodes):
            model.graph.node.insert(index + offset, each)

    return change


def newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def plugin(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("trt", 1))
    model.graph.node.append(helper.make_node("Plugin", ["flat"], ["other"], "/plugin", domain="trt"))


def cubic(model: onnx.ModelProto) -> None:
    node(model, "/Resize").attribute[0].s = b"cubic"


def computed_axis(model: onnx.ModelProto) -> None:
    insert("/attn/Mul", helper.make_node("Identity", ["axis"], ["computed"], "/Identity"))(model)
    node(model, "/attn/Mul").input[0] = "x"
    node(model, "/Unsqueeze").input[1] = "computed"


def mixed(model: onnx.ModelProto) -> None:
    bias = model.graph.initializer[-1]
    bias.CopyFrom(numpy_helper.from_array(np.ones(8, np.float32), "bias"))


def scale_of(value: float) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node(model, "/scale").attribute[0].t.CopyFrom(half(value))

    return change


def fixed_rows(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def per_channel(model: onnx.ModelProto) -> None:
    scales = numpy_helper.from_array(np.full(8, 0.5, np.float16), "x_scale")
    next(each for each in model.graph.initializer if each.name == "x_scale").CopyFrom(scales)


def cast(input: str, output: str, to: int, name: str = "/Cast") -> onnx.NodeProto:
    return helper.make_node("Cast", [input], [output], name, to=to)


DOUBLE = TensorProto.DOUBLE
BROKEN: dict[str, tuple[Change, str]] = {
    "parsed_opset": (newer_opset, "opset 21"),
    "known_operators": (plugin, "Plugin /plugin (of domain trt)"),
    "supported_types": (
        insert("/linear/Q", cast("flat", "wide64", DOUBLE), cast("wide64", "narrow", HALF, "/Cast_1")),
        "Cast /Cast (DOUBLE)",
    ),
    "supported_attributes": (cubic, "Resize /Resize (mode cubic)"),
    "axes_known": (computed_axis, "Unsqueeze /Unsqueeze (computed)"),
    "one_type": (mixed, "Add /linear/Add (FLOAT and FLOAT16)"),
    "attention_fuses": (
        insert("/attn/Add", helper.make_node("Div", ["scores", "scale"], ["divided"], "/attn/Div")),
        "Softmax /attn/Softmax (Add between the first product and the softmax)",
    ),
    "normal_constants": (scale_of(1e-6), "scale of /attn/Mul (subnormal in FP16: 1.0e-06)"),
    "contract": (fixed_rows, "input 'x' is FP16 [2, h, 8]"),
    "activations_per_tensor": (per_channel, "/linear/Q"),
}


def test_a_graph_that_is_ready_breaks_no_rule(tmp_path):
    """And every rule looks at something in it, but for the weights' range, which is recorded elsewhere."""
    found = readiness(source(tmp_path), SIGNATURE)
    assert {rule: finding.broken for rule, finding in found.items() if finding.broken} == {}
    assert [rule for rule, finding in found.items() if not finding.places] == ["weights"]


@pytest.mark.parametrize("rule", BROKEN)
def test_a_graph_that_breaks_a_rule_is_found_by_it_alone(rule, tmp_path):
    """The rule names the place, and what is wrong there."""
    change, place = BROKEN[rule]
    found = broken(source(tmp_path, change))
    assert found.keys() == {rule}
    assert found[rule][0].startswith(place)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            insert("/attn/Softmax", helper.make_node("Mul", ["masked", "scale"], ["scaled"], "/attn/Mul_1")),
            "Mul between the first product and the softmax",
        ),
        (
            insert("/attn/Softmax", cast("masked", "m32", 1), cast("m32", "m16", HALF, "/Cast_1")),
            "Cast between the first product and the softmax",
        ),
        (
            insert("/attn/MatMul_1", cast("weights", "w32", 1), cast("w32", "w16", HALF, "/Cast_1")),
            "Cast behind the softmax",
        ),
        (
            insert("/attn/MatMul", cast("q", "q32", 1), cast("q32", "q16", HALF, "/Cast_1")),
            "a Cast in front of the first product",
        ),
        (
            lambda model: setattr(node(model, "/attn/Softmax").attribute[0], "i", 1),
            "not over the last axis",
        ),
        (
            lambda model: model.graph.node.append(helper.make_node("Relu", ["weights"], ["seen"], "/Relu")),
            "2 readers of the softmax, expected the second product",
        ),
    ],
    ids=["scaled", "softmax in FP32", "cast weights", "cast operand", "another axis", "read twice"],
)
def test_attention_in_another_pattern_is_found(change, reason, tmp_path):
    """Whatever stands between its two products, or right in front of them."""
    assert broken(source(tmp_path, change)) == {"attention_fuses": [f"Softmax /attn/Softmax ({reason})"]}


@pytest.mark.parametrize(("value", "told"), [(np.inf, "not finite"), (np.nan, "not finite")])
def test_a_constant_that_is_not_finite_is_found(value, told, tmp_path):
    """As -inf of a mask is: FP16's softmax over a row of them gives no number."""
    assert told in broken(source(tmp_path, scale_of(value)))["normal_constants"][0]


def test_a_constant_of_zero_is_fine(tmp_path):
    """It is exact in every type."""
    assert broken(source(tmp_path, scale_of(0.0))) == {}


def test_a_file_of_weights_that_is_gone_or_cut_off_is_found(tmp_path):
    """Before anything else is asked: the tensor, and how far its file goes."""
    found = source(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:60])
    assert broken(found) == {"external_data": ["w (ends at byte 64 of model.onnx.data's 60)"]}
    data.unlink()
    assert broken(found) == {"external_data": ["w (no file 'model.onnx.data')"]}


def test_a_weight_whose_length_is_not_its_dims_is_found(tmp_path):
    """A runtime would read another weight's bytes."""
    found = source(tmp_path)
    edited = onnx.load(found.onnx, load_external_data=False)
    weight = next(each for each in edited.graph.initializer if each.name == "w")
    next(entry for entry in weight.external_data if entry.key == "length").value = "32"
    onnx.save_model(edited, found.onnx)
    assert broken(found) == {"external_data": ["w (32 bytes, its dims need 64)"]}


def test_weights_that_were_mostly_subnormal_when_written_are_found(tmp_path):
    """From the manifest: the weights are not read."""
    shares = {"share": 0.75, "worst": 0.75, "in": "blocks.3.weight"}
    weights = {"tensors": 12, "largest": {"magnitude": 3.5, "in": "b"}, "subnormal": shares, "zeroed": shares}
    assert broken(source(tmp_path, weights=weights)) == {"weights": ["75% of all values are subnormal"]}
    weights["subnormal"] = shares | {"share": 0.1}
    assert check_ready(source(tmp_path, weights=weights), SIGNATURE)["weights"]["recorded"] == weights


def test_a_single_weight_that_lost_much_is_a_warning(tmp_path):
    """Nothing in the checkpoint may depend on it, and exporting again would give the same."""
    lost = {"share": 0.01, "worst": 0.75, "in": "k_proj.bias"}
    kept = {"share": 0.01, "worst": 0.05, "in": "b"}
    of = source(tmp_path, weights={"tensors": 12, "subnormal": lost, "zeroed": kept})
    assert not broken(of)
    assert warnings(of.manifest) == ["k_proj.bias: 75% of its values are subnormal in the file"]


def test_the_error_names_the_component_the_rules_and_the_places(tmp_path):
    """And stays short however much is wrong."""

    def change(model: onnx.ModelProto) -> None:
        for index in range(500):
            model.graph.node.append(helper.make_node("Det", ["x"], [f"d{index}"], f"/{'deep/' * 90}{index}"))
        for each in (cubic, mixed, fixed_rows, per_channel, scale_of(1e-6)):
            each(model)

    with pytest.raises(EngineError) as told:
        check_ready(source(tmp_path, change), SIGNATURE)
    message = str(told.value)
    assert message.startswith(f"mmdit: {tmp_path / 'model.onnx'} is not ready for TensorRT: it breaks")
    assert "known_operators (500 of 516 places: Det /deep/" in message
    assert "and 2 more rules" in message and "make fp8" in message
    assert len(message) < 2500


def test_every_operator_of_the_table_is_onnx(tmp_path):
    """A name that no opset has would never be found missing."""
    assert {name for name in TYPES if not onnx.defs.has(name)} == set()


@pytest.mark.parametrize(
    ("component", "precision"),
    [*((component, Precision.FP16) for component in COMPONENTS), ("mmdit", Precision.FP8)],
)
def test_the_miniatures_files_are_ready(component, precision, build):
    """The report says what each rule saw: attention and weights in all of them."""
    folder = build.onnx(component, precision)
    manifest = read_manifest(folder)
    family = Family.model_validate(manifest.settings["family"])
    signature = components(family, shape_set(family))[component]
    report = check_ready(Source(component, precision, folder, manifest), signature)
    assert report["attention_fuses"]["places"] > 0 < report["weights"]["places"]
    assert report["known_operators"]["places"] == report["supported_types"]["places"] > 200
    assert (report["dequantize_before_product"]["places"] > 0) == (precision is Precision.FP8)
    assert report["weights"]["recorded"]["largest"]["magnitude"] > 0.1
    assert all(entry["rule"].endswith(".") for entry in report.values())
