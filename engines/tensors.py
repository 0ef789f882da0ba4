"""Every tensor's dims and element type in an ONNX graph that is called with inputs of given shapes.

Nothing is computed and no weight is read, so a full-size graph takes seconds. The dims come from ONNX
Runtime's symbolic inference: ONNX's own (1.21, with `data_prop`) loses them where a size is divided.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from mmdit.errors import EngineError, first_line

_INLINE = 1 << 12  # bytes; an initializer larger than that is no part of a shape's arithmetic


@dataclass(frozen=True)
class Tensors:
    """Dims and ONNX element type of each tensor, by name."""

    dims: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]

    def bytes_of(self, name: str) -> int:
        """The memory that a tensor takes."""
        return prod(self.dims[name]) * element_bytes(self.types[name])


def graph_of(path: Path) -> ModelProto:
    """An ONNX file's graph, without the weights that lie beside it. Raises EngineError if it is none."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf and the file system each raise their own
        raise EngineError(f"{path} is no ONNX model: {first_line(error)}; export it again") from error


def tensors_of(model: ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> Tensors:
    """The tensors of a graph; `inputs`: input → its shape, rows first.

    Raises EngineError naming inputs that the graph has not, or a node whose output's dims cannot be told.
    """
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    try:
        graph = SymbolicShapeInference.infer_shapes(_without_weights(model, inputs)).graph
    except Exception as error:  # it raises plain exceptions, and assertions
        raise EngineError(f"the dims in the graph cannot be told: {first_line(error)}") from error
    dims: dict[str, tuple[int, ...]] = {}
    types: dict[str, int] = {}
    for value in (*graph.output, *graph.value_info, *graph.input):
        known = _dims(value)
        if known is not None:
            dims[value.name] = known
            types[value.name] = value.type.tensor_type.elem_type
    for tensor in model.graph.initializer:
        dims[tensor.name], types[tensor.name] = tuple(tensor.dims), tensor.data_type
    for node in model.graph.node:
        if any(name and name not in dims for name in node.output):
            raise EngineError(f"{node.op_type} {node.name!r}: the dims of its output cannot be told")
    return Tensors(dims, types)


def element_bytes(data_type: int) -> int:
    """The bytes of one element of an ONNX type."""
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _without_weights(model: ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> ModelProto:
    """A copy whose inputs have fixed dims, and whose weights are inputs too: data would be looked for."""
    if (names := {value.name for value in model.graph.input}) != inputs.keys():
        raise EngineError(f"the graph's inputs are {sorted(names)}, expected {sorted(inputs)}")
    bare = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    for value in model.graph.input:
        bare.graph.input.append(_value(value.name, value.type.tensor_type.elem_type, inputs[value.name]))
    for value in model.graph.output:
        bare.graph.output.append(_value(value.name, value.type.tensor_type.elem_type, None))
    for tensor in model.graph.initializer:
        size = prod(tensor.dims) * element_bytes(tensor.data_type)
        if size <= _INLINE and tensor.data_location != TensorProto.EXTERNAL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(_value(tensor.name, tensor.data_type, tensor.dims))
    return bare


def _value(name: str, data_type: int, dims: Any) -> ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, data_type, dims)


def _dims(value: ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)
