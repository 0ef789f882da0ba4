"""What one call of a component costs, read off its ONNX graph: FLOPs, bytes read, memory alive at once.

The roofline and the memory planner stand on these figures. The graph is enough: of a weight, its dims.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

from onnx import ModelProto, NodeProto, TensorProto
from pydantic import BaseModel, ConfigDict

from engines.checks.tensors import Tensors, element_bytes, tensors_of
from engines.forecast.liveness import live_bytes
from mmdit.errors import EngineError

_LARGEST_FUSED_HEAD = 256  # of flash attention's kernels; the VAE's one head has 512
_ON_SCORES = ("Add", "Cast", "Div", "Mul", "Where", "Softmax", "QuantizeLinear", "DequantizeLinear")
_BEFORE_PRODUCTS = ("Cast", "Reshape", "Transpose", "Unsqueeze")
_FLOATS: dict[int, Literal["fp16", "fp32"]] = {TensorProto.FLOAT16: "fp16", TensorProto.FLOAT: "fp32"}

Kind = Literal["fp8", "fp16", "fp32"]


class Products(BaseModel):
    """Matrix products that run in one precision and use each byte of their weights equally often.

    `flops` counts two for a multiplication and its addition. `attention`: both operands are computed.
    `weight_bytes` as stored: FP8 weights with an FP16 input are one byte each, in products of kind fp16.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    attention: bool
    flops: int
    weight_bytes: int


class Costs(BaseModel):
    """Of one call of a component, in bytes but for the FLOPs.

    `weights` is all that the file stores, `activations` what the products read and write besides,
    `live` the largest live set of tensors where attention is fused (`liveness.py` has the rules),
    `scores` what its largest scores would add where it is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    products: tuple[Products, ...]
    weights: int
    activations: int
    live: int
    scores: int

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(products.flops for products in self.products)

    @property
    def attention_flops(self) -> int:
        """Of attention's two products."""
        return sum(products.flops for products in self.products if products.attention)

    @property
    def weights_read(self) -> int:
        """The bytes of the weights that a product reads: all but embedding tables, norms and biases."""
        return sum(products.weight_bytes for products in self.products)


def costs(model: ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> Costs:
    """The costs of a graph; `inputs`: input → its shape, rows first.

    Raises EngineError for inputs that the graph has not, for dims that cannot be told, and for a product
    in a precision that no engine here has.
    """
    tensors = tensors_of(model, inputs)
    nodes = model.graph.node
    producers = {name: node for node in nodes for name in node.output}
    stored = _stored(model)
    scores = _fused_scores(nodes, tensors, stored)
    groups: dict[tuple[Kind, bool, float], list[int]] = {}
    activations = 0
    for node in nodes:
        flops = _flops(node, tensors)
        if not flops:
            continue
        weight_bytes = sum(stored.get(name, 0) for name in node.input[:2])
        activations += sum(
            _moved(name, producers, tensors)
            for name in (*node.input[:2], node.output[0])
            if name not in stored and name not in scores
        )
        kind = _kind(node, producers, tensors)
        group = groups.setdefault(
            (kind, not weight_bytes, flops / weight_bytes if weight_bytes else 0), [0, 0]
        )
        group[0] += flops
        group[1] += weight_bytes
    return Costs(
        products=tuple(
            Products(kind=kind, attention=attention, flops=flops, weight_bytes=weight_bytes)
            for (kind, attention, _), (flops, weight_bytes) in sorted(groups.items())
        ),
        weights=sum(stored[tensor.name] for tensor in model.graph.initializer),
        activations=activations,
        live=live_bytes(model.graph, tensors, {*stored, *scores}),
        scores=max(map(tensors.bytes_of, scores), default=0),
    )


def _flops(node: NodeProto, tensors: Tensors) -> int:
    if node.op_type == "MatMul":
        return 2 * prod(tensors.dims[node.output[0]]) * tensors.dims[node.input[0]][-1]
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return 2 * prod(tensors.dims[node.output[0]]) * tensors.dims[node.input[0]][0 if transposed else -1]
    if node.op_type == "Conv":  # each output is a product over a filter [outputs, inputs / groups, …]
        return 2 * prod(tensors.dims[node.output[0]]) * prod(tensors.dims[node.input[1]][1:])
    if node.op_type == "ConvTranspose":  # each input spreads over a filter [inputs, outputs / groups, …]
        return 2 * prod(tensors.dims[node.input[0]]) * prod(tensors.dims[node.input[1]][1:])
    return 0


def _kind(node: NodeProto, producers: Mapping[str, NodeProto], tensors: Tensors) -> Kind:
    """FP8 where both operands come from E4M3; else the type that both have."""
    sources = [_dequantized(name, producers) for name in node.input[:2]]
    if all(
        source is not None and tensors.types[source.input[0]] == TensorProto.FLOAT8E4M3FN
        for source in sources
    ):
        return "fp8"
    data_type = tensors.types[node.output[0]]
    if data_type not in _FLOATS:
        name = TensorProto.DataType.Name(data_type)
        raise EngineError(f"{node.op_type} {node.name!r} is in {name}: expected FLOAT16, FLOAT or FP8")
    return _FLOATS[data_type]


def _dequantized(name: str, producers: Mapping[str, NodeProto]) -> NodeProto | None:
    """The DequantizeLinear that an operand comes from."""
    node = producers.get(name)
    while node is not None and node.op_type in _BEFORE_PRODUCTS:
        node = producers.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _moved(name: str, producers: Mapping[str, NodeProto], tensors: Tensors) -> int:
    """The bytes of an operand or a result, in FP8 where it was quantized."""
    source = _dequantized(name, producers)
    data_type = tensors.types[name if source is None else source.input[0]]
    return prod(tensors.dims[name]) * element_bytes(data_type)


def _stored(model: ModelProto) -> dict[str, int]:
    """Constant tensor → the bytes that the file has of it, also behind a DequantizeLinear or a Transpose."""
    stored = {
        tensor.name: prod(tensor.dims) * element_bytes(tensor.data_type) for tensor in model.graph.initializer
    }
    for node in model.graph.node:
        if all(name in stored for name in node.input if name):
            # Of a DequantizeLinear the weight, not its scale; a Constant is a number or two.
            stored |= dict.fromkeys(node.output, stored[node.input[0]] if node.input else 0)
    return stored


def _fused_scores(nodes: Sequence[NodeProto], tensors: Tensors, stored: Mapping[str, int]) -> set[str]:
    """What lies between q·kᵀ and softmax·v where the head is small enough for a fused kernel."""
    behind: dict[
        str, list[str]
    ] = {}  # tensor → the products' results that it was made from by pointwise nodes
    fused: set[str] = set()
    for node in nodes:
        if node.op_type == "MatMul" and not any(name in stored for name in node.input):
            chain = behind.get(node.input[0], [])
            if "softmax" in chain:
                fused |= {name for name in chain if name != "softmax"}
            elif tensors.dims[node.input[0]][-1] <= _LARGEST_FUSED_HEAD:
                behind[node.output[0]] = [node.output[0]]
        elif node.op_type in _ON_SCORES:
            chain = next((behind[name] for name in node.input if name in behind), [])
            if chain:
                mark = ["softmax"] if node.op_type == "Softmax" else []
                behind[node.output[0]] = [*chain, *mark, node.output[0]]
    return fused
