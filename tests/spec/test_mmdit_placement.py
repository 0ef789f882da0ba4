"""TensorRT's rules about where Q and DQ stand: each with a graph that breaks that rule alone."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdit.placement import RULES, FileGraph

HALF, E4M3 = TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN


def graph(change: Callable[[onnx.ModelProto], None] = lambda model: None) -> FileGraph:
    """A linear in FP8 and its bias, with its types inferred, after a change."""

    def scale(name: str, *values: float) -> TensorProto:
        return numpy_helper.from_array(np.array(values if len(values) > 1 else values[0], np.float16), name)

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["x_q"], "/m/linear/input_quantizer/Q"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale"], ["x_dq"], "/m/linear/input_quantizer/DQ"),
        helper.make_node(
            "DequantizeLinear", ["w", "w_scale"], ["w_dq"], "/m/linear/weight_quantizer/DQ", axis=1
        ),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["product"], "/m/linear/MatMul"),
        helper.make_node("Add", ["product", "bias"], ["y"], "/m/linear/Add"),
    ]
    initializers = [
        scale("x_scale", 0.5),
        scale("w_scale", 0.25, 0.5),
        TensorProto(name="zero", data_type=E4M3, raw_data=b"\0"),
        TensorProto(name="w", data_type=E4M3, dims=[4, 2], raw_data=bytes(8)),
        scale("bias", 1.0, 2.0),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "linear",
            [helper.make_tensor_value_info("x", HALF, ["rows", 4])],
            [helper.make_tensor_value_info("y", HALF, ["rows", 2])],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    change(model)
    return FileGraph(onnx.shape_inference.infer_shapes(model))


def replace(name: str, values: object, dtype: type = np.float16) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.array(values, dtype), name))

    return change


def e5m2(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            tensor.data_type = TensorProto.FLOAT8E5M2


def no_zero_point(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[2]  # UINT8 then, by ONNX's default


def read_by_another(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["x_q"], ["other"], to=HALF))


def another_scale_behind(model: onnx.ModelProto) -> None:
    replace("bias", [1.0, 2.0])(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.125, np.float16), "other_scale"))
    model.graph.node[1].input[1] = "other_scale"


def constant_quantized(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 2), np.float16), "w16"))
    quantize = helper.make_node("QuantizeLinear", ["w16", "x_scale", "zero"], ["w_q"], "/m/linear/weight/Q")
    model.graph.node.insert(0, quantize)
    dequantize = model.graph.node[3]
    dequantize.input[:] = ["w_q", "x_scale"]
    del dequantize.attribute[:]


def added_to(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["x_dq"], ["other"]))


def fp16_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 2), np.float16), "w16"))
    model.graph.node[3].input[1] = "w16"


BROKEN = {
    "opset": lambda model: None,
    "e4m3_only": no_zero_point,
    "scale_type": replace("w_scale", [0.25, 0.5], np.float32),
    "normal_scales": replace("x_scale", 2.0**-15),
    "activations_per_tensor": replace("x_scale", [0.5, 0.5, 0.5, 0.5]),
    "quantize_before_dequantize": another_scale_behind,
    "weights_stay_quantized": constant_quantized,
    "dequantize_before_product": added_to,
    "whole_products": fp16_weight,
}


def broken(found: FileGraph) -> set[str]:
    return {rule.__name__ for rule in RULES if rule(found).broken}


def test_a_linear_in_fp8_breaks_no_rule():
    """And every rule looks at something in it."""
    assert broken(graph()) == set()
    assert all(rule(graph()).places for rule in RULES)


@pytest.mark.parametrize("rule", [rule.__name__ for rule in RULES])
def test_a_graph_that_breaks_a_rule_is_found_by_it_alone(rule):
    """The rule names the place."""
    found = graph(BROKEN[rule])
    if rule == "opset":  # onnx itself infers no types there
        found.opset = 18
    assert broken(found) == {rule}
    (finding,) = [each(found) for each in RULES if each.__name__ == rule]
    assert "/m/linear" in finding.broken[0] or rule == "opset"


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("e4m3_only", e5m2),
        ("normal_scales", replace("x_scale", 0.0)),
        ("normal_scales", replace("x_scale", np.nan)),
        ("normal_scales", replace("w_scale", [0.5, np.inf])),
        ("quantize_before_dequantize", read_by_another),
    ],
    ids=["E5M2", "zero", "not a number", "one infinite channel", "a Q that something else reads"],
)
def test_other_ways_to_break_a_rule_are_found(rule, change):
    """Each with the rule that it breaks."""
    assert broken(graph(change)) == {rule}
