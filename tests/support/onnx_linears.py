"""Reads an ONNX graph: which of its products are a module's linears, and what is around them."""

from dataclasses import dataclass

import onnx


@dataclass(frozen=True)
class Linear:
    """A linear layer in a graph: its product, and the tensors that it reads and writes."""

    product: onnx.NodeProto
    input: str  # before Q, if there is one
    weight: str  # the stored tensor
    output: str  # with the bias
    quantized_input: bool


class Graph:
    """An ONNX graph, with its producers, consumers and constants by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = model.graph.node
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = node.attribute[0].t

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def linears(self) -> dict[str, Linear]:
        """Layer, as the transformer names it → its place in the graph, for products with a weight."""
        found = {}
        for node in self.nodes:
            if node.op_type not in ("MatMul", "Conv"):
                continue
            weight = self._behind(self._behind(node.input[1], "Transpose"), "DequantizeLinear")
            if weight not in self.constants:
                continue  # one of attention's products
            output = node.output[0]
            if node.op_type == "MatMul":
                (bias,) = self.consumers(output)
                assert bias.op_type == "Add"
                output = bias.output[0]
            before = self._behind(node.input[0], "DequantizeLinear")
            layer = ".".join(node.name.strip("/").split("/")[1:-1])
            found[layer] = Linear(
                product=node,
                input=self._behind(before, "QuantizeLinear"),
                weight=weight,
                output=output,
                quantized_input=before != node.input[0],
            )
        return found

    def _behind(self, name: str, kind: str) -> str:
        producer = self.producers.get(name)
        return producer.input[0] if producer is not None and producer.op_type == kind else name
