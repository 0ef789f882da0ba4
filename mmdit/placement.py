"""An FP8 file's graph, and TensorRT's rules about where Q and DQ stand. One rule a function.

The rules are those of TensorRT's manual on explicit quantization and of its ONNX parser (11.4); whether
a pair that keeps them is fused is the builder's to tell. The export's audit and the engines' readiness check
both hold files against them. Imports onnx, as no other module here does.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

SMALL = 1 << 12  # bytes; larger initializers are weights


@dataclass(frozen=True)
class Linear:
    """A linear layer's product: its stored weight [input, output], and the scales of what is quantized."""

    weight: TensorProto
    weight_scale: TensorProto | None
    input_scale: TensorProto | None

    @property
    def outputs(self) -> int:
        """Its output features."""
        return int(self.weight.dims[1])

    @property
    def precision(self) -> str:
        """As the policy names it."""
        if self.weight.data_type == TensorProto.FLOAT:
            return "fp32"
        if self.weight_scale is None:
            return "fp16" if self.input_scale is None else "fp16 with a quantized input"
        return "fp8-weights" if self.input_scale is None else "fp8"


@dataclass(frozen=True)
class Finding:
    """How many places a rule looked at, and the names of those that break it."""

    places: int
    broken: list[str] = field(default_factory=list)


class FileGraph:
    """An ONNX graph by tensor name: producers, readers, constants and element types."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Weights' data may be absent; that of small constants must be there."""
        self.opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        self.nodes = model.graph.node
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constants = dict(self.stored)
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = node.attribute[0].t
        typed = (*model.graph.input, *model.graph.value_info, *model.graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in typed}
        self.types |= {name: tensor.data_type for name, tensor in self.constants.items()}

    @classmethod
    def read(cls, path: Path) -> "FileGraph":
        """The graph of a file, with element types inferred, without its weights' data."""
        return cls.of(onnx.load(str(path), load_external_data=False))

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "FileGraph":
        """The graph of a model, with element types inferred; takes the weights' data out of the model."""
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) > SMALL and tensor.data_type != TensorProto.INT64:
                del tensor.external_data[:]
                scales = tensor.name.endswith("/scale")
                if not scales:
                    tensor.raw_data = b""
                    tensor.data_location = TensorProto.EXTERNAL
        return cls(onnx.shape_inference.infer_shapes(model))

    def linears(self) -> dict[str, Linear]:
        """Layer, as the transformer names it → its product with a stored weight."""
        found = {}
        for node in self.nodes:
            if node.op_type != "MatMul":
                continue
            stored, weight_scale = self.behind_dequantize(node.input[1])
            if stored in self.constants:
                _, input_scale = self.behind_dequantize(node.input[0])
                layer = ".".join(node.name.strip("/").split("/")[1:-1])
                found[layer] = Linear(self.constants[stored], weight_scale, input_scale)
        return found

    def attentions(self) -> dict[str, dict[str, TensorProto | None]]:
        """Attention module → the scales of its products' operands: q, k, s (softmax) and v."""
        found = {}
        for node in self.nodes:
            if node.op_type != "Softmax":
                continue
            scores = self.producers[self._without_casts(node.input[0])]
            weights = node.output[0]
            while (reader := self.readers[weights][0]).op_type != "MatMul":
                weights = reader.output[0]
            operands = {
                "q": scores.input[0],
                "k": scores.input[1],
                "s": reader.input[0],
                "v": reader.input[1],
            }
            name = ".".join(node.name.strip("/").split("/")[1:-1])
            found[name] = {operand: self.behind_dequantize(tensor)[1] for operand, tensor in operands.items()}
        return found

    def pairs(self) -> Iterator[NodeProto]:
        """Every QuantizeLinear and DequantizeLinear."""
        return (node for node in self.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear"))

    def patch_weights(self) -> int:
        """The elements of the patch embedding's weights."""
        return sum(int(np.prod(self.constants[n.input[1]].dims)) for n in self.nodes if n.op_type == "Conv")

    def other_bytes(self) -> int:
        """The bytes of what is stored besides the linears' weights and scales."""
        linears = {linear.weight.name for linear in self.linears().values()}
        return sum(
            int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            for name, tensor in self.stored.items()
            if name not in linears and not name.endswith("/scale")
        )

    def behind_dequantize(self, name: str) -> tuple[str, TensorProto | None]:
        """What a DequantizeLinear in front of `name` reads, and its scale; `name` and None without one."""
        node = self.producers.get(name)
        while node is not None and node.op_type == "Cast":
            node = self.producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return name, None
        return node.input[0], self.constants[node.input[1]]

    def _without_casts(self, name: str) -> str:
        while self.producers[name].op_type in ("Cast", "Add"):
            name = self.producers[name].input[0]
        return name


def _place(node: NodeProto) -> str:
    return node.name or f"{node.op_type} of {node.output[0]}"


def opset(graph: FileGraph) -> Finding:
    """Q and DQ with FP16 scales need opset 19 or later."""
    places = len(list(graph.pairs()))
    return Finding(places, [f"opset {graph.opset}"] if places and graph.opset < 19 else [])


def e4m3_only(graph: FileGraph) -> Finding:
    """What is quantized is E4M3, symmetric: TensorRT knows no other FP8."""
    nodes = list(graph.pairs())
    broken = []
    for node in nodes:
        stored = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
        symmetric = zero is None or (
            zero.data_type == TensorProto.FLOAT8E4M3FN and not numpy_helper.to_array(zero).astype(float).any()
        )
        has_zero = zero is not None or node.op_type == "DequantizeLinear"
        if graph.types.get(stored) != TensorProto.FLOAT8E4M3FN or not symmetric or not has_zero:
            broken.append(_place(node))
    return Finding(len(nodes), broken)


def scale_type(graph: FileGraph) -> Finding:
    """A scale has the type of what is quantized: strongly typed networks cast nothing by themselves."""
    nodes = list(graph.pairs())
    broken = []
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            beside = [node.input[0]]
        else:  # its output has the scale's type, and the other operand of the product must have it too
            beside = [name for reader in graph.readers[node.output[0]] for name in reader.input]
            beside = [name for name in beside if graph.types.get(name) != TensorProto.INT64]
        if any(graph.types.get(name) != graph.types[node.input[1]] for name in beside):
            broken.append(_place(node))
    return Finding(len(nodes), broken)


def normal_scales(graph: FileGraph) -> Finding:
    """Scales are positive, finite, normal numbers of their type."""
    nodes = list(graph.pairs())
    broken = []
    for node in nodes:
        scale = numpy_helper.to_array(graph.constants[node.input[1]])
        low = np.finfo(scale.dtype).smallest_normal
        if not (np.isfinite(scale).all() and (scale >= low).all()):
            broken.append(_place(node))
    return Finding(len(nodes), broken)


def activations_per_tensor(graph: FileGraph) -> Finding:
    """An activation has one scale; only weights may have one for each channel."""
    nodes = [node for node in graph.pairs() if node.input[0] not in graph.constants]
    return Finding(len(nodes), [_place(node) for node in nodes if graph.constants[node.input[1]].dims])


def quantize_before_dequantize(graph: FileGraph) -> Finding:
    """A Q is read by DQs alone, of the same scale: anything else is left unfused, or is wrong."""
    nodes = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    broken = []
    for node in nodes:
        scale = numpy_helper.to_array(graph.constants[node.input[1]])
        readers = graph.readers[node.output[0]]
        same = all(
            reader.op_type == "DequantizeLinear"
            and np.array_equal(numpy_helper.to_array(graph.constants[reader.input[1]]), scale, equal_nan=True)
            for reader in readers
        )
        if not readers or not same:
            broken.append(_place(node))
    return Finding(len(nodes), broken)


def weights_stay_quantized(graph: FileGraph) -> Finding:
    """A weight is stored as E4M3 and has a DQ alone: a Q over a constant would be computed in every call."""
    nodes = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    return Finding(len(nodes), [_place(node) for node in nodes if node.input[0] in graph.constants])


def dequantize_before_product(graph: FileGraph) -> Finding:
    """A DQ is read by matrix products alone: elsewhere it does not fuse."""
    nodes = [node for node in graph.nodes if node.op_type == "DequantizeLinear"]
    broken = [
        _place(node)
        for node in nodes
        if any(reader.op_type != "MatMul" for reader in graph.readers[node.output[0]])
    ]
    return Finding(len(nodes), broken)


def whole_products(graph: FileGraph) -> Finding:
    """Of a product, both operands are quantized or neither, but for FP8 weights with an FP16 input."""
    broken = []
    nodes = [node for node in graph.nodes if node.op_type == "MatMul"]
    for node in nodes:
        stored, second = graph.behind_dequantize(node.input[1])
        _, first = graph.behind_dequantize(node.input[0])
        weight = stored in graph.constants
        if (first is not None and second is None) or (not weight and first is None and second is not None):
            broken.append(_place(node))
    return Finding(len(nodes), broken)


RULES: tuple[Callable[[FileGraph], Finding], ...] = (
    opset,
    e4m3_only,
    scale_type,
    normal_scales,
    activations_per_tensor,
    quantize_before_dequantize,
    weights_stay_quantized,
    dequantize_before_product,
    whole_products,
)
