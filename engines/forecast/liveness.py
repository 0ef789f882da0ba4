"""The largest set of a graph's tensors that is alive at once: an estimate of an engine's activation memory.

An estimate, by these rules; what TensorRT reserves is known when it has built:

- Nodes run in the file's order; a tensor lives from its producer to its last reader.
- A Reshape, a Transpose or a DequantizeLinear is a view: the kernel that reads it does its work.
- A pointwise node writes over an operand that dies with it.
- Constants, and what the caller says is never stored (the scores of fused attention), take nothing.

Fusing more saves more; kernels' scratch memory comes on top.
"""

from collections.abc import Collection

from onnx import GraphProto

from engines.checks.tensors import Tensors

_VIEWS = ("DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_POINTWISE = (
    *("Add", "Cast", "Div", "Gelu", "Mul", "Pow", "QuantizeLinear", "Sigmoid", "Softmax"),
    *("Sqrt", "Sub", "Tanh", "LayerNormalization", "InstanceNormalization"),
)


def live_bytes(graph: GraphProto, tensors: Tensors, absent: Collection[str]) -> int:
    """The bytes of the largest live set; tensors in `absent` take none."""
    owner: dict[str, str] = {value.name: value.name for value in graph.input}  # of a view, whose memory it is
    last_read: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            if name in owner:
                last_read[owner[name]] = index
        for name in node.output:
            if name and name not in absent:
                view = node.op_type in _VIEWS and node.input[0] in owner
                owner[name] = owner[node.input[0]] if view else name
    for value in graph.output:
        last_read[owner[value.name]] = len(graph.node)

    alive = {value.name: tensors.bytes_of(value.name) for value in graph.input}
    now = most = sum(alive.values())
    for index, node in enumerate(graph.node):
        new = {
            name: tensors.bytes_of(name)
            for name in node.output
            if owner.get(name) == name and name in last_read
        }
        read = {owner[name] for name in node.input if name in owner}
        dying = sum(alive.pop(name) for name in read if name in alive and last_read[name] == index)
        overwritten = min(dying, sum(new.values())) if node.op_type in _POINTWISE else 0
        most = max(most, now + sum(new.values()) - overwritten)
        alive |= new
        now += sum(new.values()) - dying
    return most
