"""The bounds of every profile: graphs that fail at one size alone, run and told from their dims."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.checks import bounds
from engines.checks.bounds import check_bounds
from engines.checks.tensors import tensors_of
from engines.source import Source
from mmdit.artifact import Manifest, read_manifest
from mmdit.contract import COMPONENTS, Dtype, Precision, Signature, Tensor, components
from mmdit.errors import EngineError
from mmdit.family import Family
from mmdit.shapes import ShapeSet, SizeRange, shape_set

LATENT = Tensor("latent", Dtype.FP16, (4, "h", "w"))
SIGNATURE = Signature((LATENT,), (Tensor("velocity", Dtype.FP16, (4, "h", "w")),), max_rows=2)
EVEN, ODD = (64, 128), (80, 112)  # 8×16 and 10×14 latent pixels: 32 and 35 patches
WAYS = {"run": 10**30, "told": 0}


def sizes(*found: tuple[int, int]) -> ShapeSet:
    ranges = [SizeRange(min=size, opt=size, max=size, max_rows=2) for size in found]
    return ShapeSet(name="test", multiple=16, sizes=found, ranges=tuple(ranges))


def patches(how: str) -> onnx.ModelProto:
    """Half of the patches, counted with a division that rounds, times two: right when they are even."""

    def whole(name: str, *values: int) -> TensorProto:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    nodes = [
        helper.make_node("Shape", ["latent"], ["shape"], "/Shape"),
        helper.make_node("Gather", ["shape", "first"], ["rows"], "/Gather"),
        helper.make_node("Gather", ["shape", "third"], ["h"], "/Gather_1"),
        helper.make_node("Gather", ["shape", "fourth"], ["w"], "/Gather_2"),
        helper.make_node("Mul", ["h", "w"], ["pixels"], "/Mul"),
        helper.make_node("Div", ["pixels", "eight"], ["halves"], "/Div"),
        helper.make_node("Mul", ["halves", "eight"], ["counted"], "/Mul_1"),
    ]
    if how == "Reshape":
        nodes += [
            helper.make_node("Concat", ["rows", "four", "counted"], ["wanted"], "/Concat", axis=0),
            helper.make_node("Reshape", ["latent", "wanted"], ["flat"], "/Reshape"),
        ]
    else:
        nodes += [
            helper.make_node("Concat", ["rows", "four", "rest"], ["wanted"], "/Concat", axis=0),
            helper.make_node("Reshape", ["latent", "wanted"], ["row"], "/Reshape_1"),
            helper.make_node("ConstantOfShape", ["counted"], ["ones"], "/Ones", value=half_one()),
            helper.make_node("Add", ["row", "ones"], ["flat"], "/Add"),
        ]
    nodes.append(helper.make_node("Reshape", ["flat", "shape"], ["velocity"], "/Reshape_2"))
    value = [helper.make_tensor_value_info("latent", TensorProto.FLOAT16, ["rows", 4, "h", "w"])]
    output = [helper.make_tensor_value_info("velocity", TensorProto.FLOAT16, ["rows", 4, "h", "w"])]
    constants = [
        *(whole("first", 0), whole("third", 2), whole("fourth", 3)),
        *(whole("four", 4), whole("eight", 8), whole("rest", -1)),
    ]
    graph = helper.make_graph(nodes, "patches", value, output, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def half_one() -> TensorProto:
    return numpy_helper.from_array(np.ones(1, np.float16))


def source(folder: Path, model: onnx.ModelProto) -> Source:
    onnx.save_model(model, folder / "model.onnx")
    manifest = Manifest(kind="onnx", checkpoint="", made_from={}, settings={}, versions={})
    return Source("mmdit", Precision.FP16, folder, manifest)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run whatever it costs, or told whatever it costs."""
    monkeypatch.setattr(bounds, "RUNNABLE", WAYS[request.param])
    return str(request.param)


@pytest.fixture
def family(build) -> Family:
    """The miniature's."""
    return Family.model_validate(read_manifest(build.onnx("mmdit")).settings["family"])


@pytest.mark.parametrize("how", ["Reshape", "Add"])
def test_a_graph_that_fails_at_one_size_alone_is_found(how, way, family, tmp_path):
    """The message names the node, and the rows and size; at an even number of patches nothing is wrong."""
    graph = source(tmp_path, patches(how))
    points = [{"rows": rows, "size": list(EVEN)} for rows in (1, 2)]
    key = "ran_at" if way == "run" else "dims_told_at"
    assert check_bounds(graph, SIGNATURE, sizes(EVEN)) == {key: points}
    with pytest.raises(EngineError, match=f"^mmdit: .*/{how}.*, at 1 rows of 80×112 pixels$"):
        check_bounds(graph, SIGNATURE, sizes(EVEN, ODD))


def test_an_output_of_other_dims_than_the_contracts_is_found(way, family, tmp_path):
    """Though the graph runs."""
    graph = patches("Reshape")
    graph.graph.node[-1].input[0] = "halves_of_them"
    graph.graph.node.insert(
        len(graph.graph.node) - 1,
        helper.make_node("Concat", ["flat", "flat"], ["halves_of_them"], "/Concat_1", axis=0),
    )
    graph.graph.node[-1].input[1] = "doubled"
    graph.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 1, 1]), "two"))
    graph.graph.node.insert(
        len(graph.graph.node) - 1, helper.make_node("Mul", ["shape", "two"], ["doubled"], "/Mul_2")
    )
    with pytest.raises(
        EngineError, match=r"output 'velocity' is .*\[2, 4, 8, 16\], expected .*\[1, 4, 8, 16\]"
    ):
        check_bounds(source(tmp_path, graph), SIGNATURE, sizes(EVEN))


def test_dims_that_depend_on_values_are_refused():
    """Nobody could give them a profile."""
    node = helper.make_node("NonZero", ["x"], ["y"], "/NonZero")
    value = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["rows", 4])]
    output = [helper.make_tensor_value_info("y", TensorProto.INT64, [2, "found"])]
    graph = helper.make_model(
        helper.make_graph([node], "g", value, output), opset_imports=[helper.make_opsetid("", 20)]
    )
    with pytest.raises(EngineError, match="NonZero /NonZero .*the dims of its result cannot be told"):
        tensors_of(graph, {"x": (1, 4)})


@pytest.mark.parametrize(
    ("component", "precision"),
    [*((component, Precision.FP16) for component in COMPONENTS), ("mmdit", Precision.FP8)],
)
def test_the_miniatures_dims_are_told_at_every_bound(component, precision, build, family, monkeypatch):
    """As they come out when it runs, which `make engines` on the CPU shows."""
    monkeypatch.setattr(bounds, "RUNNABLE", 0)
    folder = build.onnx(component, precision)
    shapes = shape_set(family)
    found = check_bounds(
        Source(component, precision, folder, read_manifest(folder)),
        components(family, shapes)[component],
        shapes,
    )
    assert len(found["dims_told_at"]) >= 3
