"""Every tensor's dims and element type in an ONNX graph that is called with inputs of given shapes.

Without its weights or a runtime, in about a second at full size. ONNX's own inference over a whole graph
loses the dims behind a division or a slice of a computed shape, where the MMDiT's patches are counted. So the
graph is walked node by node: what shapes are computed from is computed, and each operator's own inference
tells the dims of the rest, or that they do not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mmdit.errors import EngineError

Dims = tuple[int, ...]
_COMPUTED = 1 << 12  # elements; what shapes are computed from is small
# FLOAT: the factors of a Resize.
_SHAPE_LIKE = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT)


@dataclass(frozen=True)
class Tensors:
    """Dims and ONNX element type of each tensor, by name."""

    dims: Mapping[str, Dims]
    types: Mapping[str, int]

    def bytes_of(self, name: str) -> int:
        """The memory that a tensor takes."""
        return prod(self.dims[name]) * element_bytes(self.types[name])


def tensors_of(model: ModelProto, inputs: Mapping[str, Dims]) -> Tensors:
    """The tensors of a graph; `inputs`: input → its shape, rows first. The weights' data may be absent.

    Raises EngineError for inputs that the graph has not, and naming the first node whose inputs' dims do not
    fit, or whose dims cannot be told.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    if (names := {value.name for value in model.graph.input} - stored) != inputs.keys():
        raise EngineError(f"the graph's inputs are {sorted(names)}, expected {sorted(inputs)}")
    return _Walk(model, inputs).run()


def element_bytes(data_type: int) -> int:
    """The bytes of one element of an ONNX type."""
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


class _Walk:
    """The way through a graph's nodes; `types` has each tensor's, `values` those of shape arithmetic."""

    def __init__(self, model: ModelProto, inputs: Mapping[str, Dims]) -> None:
        self.graph = model.graph
        self.opsets = list(model.opset_import)
        self.opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        self.types: dict[str, TypeProto] = {}
        self.values: dict[str, Any] = {}  # of small tensors that shapes may be computed from
        for value in self.graph.input:
            if value.name in inputs:
                code = value.type.tensor_type.elem_type
                self.types[value.name] = helper.make_tensor_type_proto(code, inputs[value.name])
        for tensor in self.graph.initializer:
            self.constant(tensor.name, tensor)

    def run(self) -> Tensors:
        for node in self.graph.node:
            if node.op_type == "Constant":
                self.constant(node.output[0], node.attribute[0].t)
            elif node.op_type == "Shape" and not node.attribute:  # which may cut
                self.know(node.output[0], np.array(self.dims(node.input[0]), np.int64))
            elif all(self.whole(name) for name in node.input if name):
                self.compute(node)
            else:
                self.infer(node)
        names = [*self.types]
        types = {name: self.types[name].tensor_type.elem_type for name in names}
        return Tensors({name: self.dims(name) for name in names}, types)

    def constant(self, name: str, tensor: TensorProto) -> None:
        shape_like = tensor.data_type in _SHAPE_LIKE and int(np.prod(tensor.dims)) <= _COMPUTED
        if shape_like and tensor.data_location != TensorProto.EXTERNAL:
            self.know(name, numpy_helper.to_array(tensor), tensor.data_type)
        else:
            self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)

    def know(self, name: str, value: Any, code: int | None = None) -> None:
        code = helper.np_dtype_to_tensor_dtype(value.dtype) if code is None else code
        self.types[name] = helper.make_tensor_type_proto(code, value.shape)
        if value.size <= _COMPUTED:
            self.values[name] = value

    def whole(self, name: str) -> bool:
        return name in self.values and self.values[name].dtype.kind in "iub"

    def compute(self, node: NodeProto) -> None:
        feeds = {name: self.values[name] for name in node.input if name}
        try:
            results = _evaluator(node.SerializeToString(), self.opset).run(None, feeds)
        except Exception as error:  # of numpy and of each operator's own
            raise self.refusal(node, str(error)) from error
        for name, result in zip(node.output, results, strict=True):
            self.know(name, np.asarray(result))

    def infer(self, node: NodeProto) -> None:
        data = {
            name: numpy_helper.from_array(self.values[name], name)
            for name in node.input
            if name in self.values
        }
        types = {name: self.types[name] for name in node.input if name}
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self.opsets
            )
        except onnx.shape_inference.InferenceError as error:
            raise self.refusal(node, str(error)) from error
        self.types |= found
        for name in node.output:
            if name:
                self.dims(name)
        if node.op_type == "Reshape":
            before, after = self.dims(node.input[0]), self.dims(node.output[0])
            if np.prod(before) != np.prod(after):
                raise self.refusal(node, f"{list(before)} has not as many elements as {list(after)}")

    def dims(self, name: str) -> Dims:
        found = self.types[name].tensor_type
        dims = found.shape.dim
        if not found.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
            node = next(each for each in self.graph.node if name in each.output)
            raise self.refusal(node, "the dims of its result cannot be told")
        return tuple(dim.dim_value for dim in dims)

    def refusal(self, node: NodeProto, reason: str) -> EngineError:
        inputs = [
            [d.dim_value if d.HasField("dim_value") else "?" for d in self.types[name].tensor_type.shape.dim]
            for name in node.input
            if name in self.types
        ]
        return EngineError(f"{node.op_type} {node.name} of {inputs}: {' '.join(reason.split())}")


@cache
def _evaluator(node: bytes, opset: int) -> ReferenceEvaluator:
    return ReferenceEvaluator(NodeProto.FromString(node))
