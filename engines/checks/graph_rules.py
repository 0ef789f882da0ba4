"""What TensorRT asks of a graph beyond Q and DQ (`mmdit.placement`). One rule a function.

From the manuals of 11.4 and the ONNX parser's support table (`operators.py`). A rule gives the places it
looked at and the names of those that break it, with what is wrong there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from engines.checks.operators import ATTRIBUTES, BUILD_TIME_INPUTS, OPSETS, TYPES
from mmdit.placement import FileGraph, Finding

_SCALED = ("QuantizeLinear", "DequantizeLinear")  # whose types `mmdit.placement.scale_type` holds


def parsed_opset(graph: FileGraph) -> Finding:
    """The opset is one that every version of the parser reads."""
    return Finding(1, [] if graph.opset in OPSETS else [f"opset {graph.opset}"])


def known_operators(graph: FileGraph) -> Finding:
    """Every operator is in the parser's support table."""
    return Finding(
        len(graph.nodes),
        [
            _at(node, f"of domain {node.domain}" if node.domain else "unknown")
            for node in graph.nodes
            if not _known(graph, node)
        ],
    )


def supported_types(graph: FileGraph) -> Finding:
    """Every operator's data has an element type of the parser's support table."""
    nodes = [node for node in graph.nodes if _known(graph, node)]
    broken = []
    for node in nodes:
        found = {
            onnx.TensorProto.DataType.Name(code)
            for variable, codes in _types(graph, node).items()
            if _is_data(variable, node.op_type, graph.opset)
            for code in codes
        }
        if wrong := sorted(found - TYPES[node.op_type]):
            broken.append(_at(node, ", ".join(wrong)))
    return Finding(len(nodes), broken)


def supported_attributes(graph: FileGraph) -> Finding:
    """Where the parser takes some of an attribute's values alone, it is one of them."""
    nodes = [node for node in graph.nodes if node.op_type in ATTRIBUTES]
    broken = []
    for node in nodes:
        for name, values in ATTRIBUTES[node.op_type].items():
            found = _attribute(node, name, values[0])
            if found not in values:
                broken.append(_at(node, f"{name} {found}"))
    return Finding(len(nodes), broken)


def axes_known(graph: FileGraph) -> Finding:
    """Axes are constants: they must be known when the engine is built."""
    nodes = [
        node
        for node in graph.nodes
        if node.op_type in BUILD_TIME_INPUTS and len(node.input) > BUILD_TIME_INPUTS[node.op_type]
    ]
    return Finding(
        len(nodes),
        [
            _at(node, "computed")
            for node in nodes
            if (name := node.input[BUILD_TIME_INPUTS[node.op_type]]) and name not in graph.constants
        ],
    )


def one_type(graph: FileGraph) -> Finding:
    """What an operator combines has one element type: strongly typed networks cast nothing by themselves."""
    nodes = [
        node
        for node in graph.nodes
        if _known(graph, node) and len(node.input) > 1 and node.op_type not in _SCALED
    ]
    broken = []
    for node in nodes:
        by_variable = _types(graph, node)
        if node.op_type == "Pow":  # whose exponent may have another type in ONNX, but not in TensorRT
            by_variable = {"T": set().union(*by_variable.values())}
        for codes in by_variable.values():
            if len(codes) > 1:
                names = sorted(onnx.TensorProto.DataType.Name(code) for code in codes)
                broken.append(_at(node, " and ".join(names)))
    return Finding(len(nodes), broken)


def attention_fuses(graph: FileGraph) -> Finding:
    """Attention is MatMul, at most one Add, Softmax, MatMul: scaled before the products, without casts."""
    nodes = [node for node in graph.nodes if node.op_type == "Softmax"]
    return Finding(len(nodes), [_at(node, reason) for node in nodes if (reason := _unfused(graph, node))])


def normal_constants(graph: FileGraph) -> Finding:
    """A constant is finite, and in FP16 zero or a normal number."""
    places = 0
    broken = []
    for name, tensor in graph.constants.items():
        # The weights' subnormal numbers are counted where they are written: some have a few.
        if tensor.data_type not in (TensorProto.FLOAT16, TensorProto.FLOAT) or (
            tensor.data_location == TensorProto.EXTERNAL
        ):
            continue
        places += 1
        values = np.abs(numpy_helper.to_array(tensor))
        least = np.finfo(values.dtype).smallest_normal
        weight = name in graph.stored and values.size > 1
        if not np.isfinite(values).all():
            broken.append(f"{_named(graph, name)} (not finite)")
        elif not weight and values.dtype == np.float16 and ((values > 0) & (values < least)).any():
            broken.append(f"{_named(graph, name)} (subnormal in FP16: {values[values > 0].min():.1e})")
    return Finding(places, broken)


def external_data(model: onnx.ModelProto, folder: Path) -> Finding:
    """Every weight outside the graph is there: its file, and as many bytes in it as its dims need."""
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    sizes: dict[str, int | None] = {}
    broken = []
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        if location not in sizes:
            path = folder / location
            sizes[location] = path.stat().st_size if location and path.is_file() else None
        size = sizes[location]
        needed = bytes_of(tensor)
        offset = int(place.get("offset", 0))
        length = int(place.get("length", needed))
        if size is None:
            broken.append(f"{tensor.name} (no file {location!r})")
        elif length != needed:
            broken.append(f"{tensor.name} ({length} bytes, its dims need {needed})")
        elif offset + length > size:
            broken.append(f"{tensor.name} (ends at byte {offset + length} of {location}'s {size})")
    return Finding(len(outside), broken)


GRAPH_RULES: tuple[Callable[[FileGraph], Finding], ...] = (
    parsed_opset,
    known_operators,
    supported_types,
    supported_attributes,
    axes_known,
    one_type,
    attention_fuses,
    normal_constants,
)


def _unfused(graph: FileGraph, softmax: NodeProto) -> str | None:
    """What keeps an attention from fusing."""
    if _attribute(softmax, "axis", -1) != -1:
        return "not over the last axis"
    scores = graph.producers.get(softmax.input[0])
    if scores is not None and scores.op_type == "Add":
        scores = next(
            (
                producer
                for name in scores.input
                if (producer := graph.producers.get(name)) is not None and producer.op_type == "MatMul"
            ),
            scores,
        )
    if scores is None or scores.op_type != "MatMul":
        return f"{scores.op_type if scores else 'an input'} between the first product and the softmax"
    weights = softmax.output[0]
    while True:
        readers = graph.readers[weights]
        if len(readers) != 1:
            return f"{len(readers)} readers of the softmax, expected the second product"
        (product,) = readers
        if product.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            break
        weights = product.output[0]
    if product.op_type != "MatMul" or product.input[0] != weights:
        return f"{product.op_type} behind the softmax"
    for operand in (*scores.input, product.input[1]):
        if any(node.op_type == "Cast" for node in _before(graph, operand)):
            return f"a Cast in front of {'v' if operand == product.input[1] else 'the first product'}"
    return None


def _before(graph: FileGraph, name: str) -> Iterator[NodeProto]:
    """A product's operand's producer, and those in front of its Q, DQ and Transpose."""
    node = graph.producers.get(name)
    while node is not None:
        yield node
        moved = node.op_type in ("QuantizeLinear", "DequantizeLinear", "Transpose")
        node = graph.producers.get(node.input[0]) if moved else None


def _known(graph: FileGraph, node: NodeProto) -> bool:
    return not node.domain and node.op_type in TYPES and _schema(node.op_type, graph.opset) is not None


def _types(graph: FileGraph, node: NodeProto) -> dict[str, set[int]]:
    """An operator's type variables, and the element types that they have here, as far as they are known."""
    schema = _schema(node.op_type, graph.opset)
    found: dict[str, set[int]] = defaultdict(set)
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            formal = formals[min(index, len(formals) - 1)]  # the last one of some takes any number
            if code := graph.types.get(name, 0):
                found[formal.type_str].add(code)
    return found


def _is_data(variable: str, operator: str, opset: int) -> bool:
    """Whether a type variable is one that may be FP32: not indices, axes or what is stored quantized."""
    return any(
        each.type_param_str == variable and "tensor(float)" in each.allowed_type_strs
        for each in _schema(operator, opset).type_constraints
    )


@cache
def _schema(operator: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return None


def _attribute(node: NodeProto, name: str, default: object) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            value = onnx.helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


def bytes_of(tensor: TensorProto) -> int:
    """The bytes that a tensor's dims need."""
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size * int(np.prod(tensor.dims, dtype=np.int64))


def _named(graph: FileGraph, constant: str) -> str:
    """A constant by the first node that reads it: its own name says nothing."""
    readers = graph.readers.get(constant, [])
    return f"{constant} of {readers[0].name}" if readers else constant


def _at(node: NodeProto, what: str) -> str:
    return f"{node.op_type} {node.name or node.output[0]} ({what})"
