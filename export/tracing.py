"""A module's graph, traced without its weights.

TorchScript's exporter keeps several copies of every weight: on 2.2 billion of them it needs more memory
than the machine that serves them. So the module is hollowed out first: each weight becomes a tensor of
the same shape that takes no memory, linears are recorded and not computed, and the file's initializers
are written afterwards, one at a time, from the weights that were set aside (`export/weights.py`).
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from export.modules import explicit_attention
from export.weights import Graph, Weight
from mmdit.contract import Signature, dims_vary
from mmdit.contract import Tensor as Contracted
from mmdit.samples import random_inputs

# Q/DQ with FP16 scales needs 19; 20 has Gelu. TorchScript's exporter is right at any size; torch's newer
# one is wrong at odd numbers of tokens (torch 2.13).
OPSET = 20
_TRACED_ROWS = 2
_TRACED_SIZE = (128, 160)  # pixels; any size would do, and none is special
_FOLDED_BYTES = 1 << 20  # the largest constant that folding makes


def traced(module: nn.Module, signature: Signature) -> Graph:
    """A module's graph with the contract's names and dynamic dims; the module is hollow afterwards."""
    tensors = (*signature.inputs, *signature.outputs)
    weights = _hollowed(module)
    stream = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), explicit_attention(), _recorded_linears():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # CLIP's pooling; its indices are never negative
        warnings.filterwarnings("ignore", message="Exporting aten::index operator", category=UserWarning)
        torch.onnx.export(
            module,
            example_inputs(signature, _TRACED_ROWS, _TRACED_SIZE if dims_vary(signature) else (0, 0)),
            stream,
            input_names=[tensor.name for tensor in signature.inputs],
            output_names=[tensor.name for tensor in signature.outputs],
            dynamic_axes={tensor.name: _dynamic_axes(tensor) for tensor in tensors},
            opset_version=OPSET,
            dynamo=False,
            export_params=False,
            do_constant_folding=False,  # it would compute with the weights
        )
    model = onnx.load_from_string(stream.getvalue())
    del stream
    graph = model.graph
    inputs = {tensor.name for tensor in signature.inputs}
    found = {}
    for index in reversed(range(len(graph.input))):
        name = graph.input[index].name
        if name not in inputs:
            found[name] = Weight(source=name)
            del graph.input[index]
    for name, weight in reversed(found.items()):
        stored = weights[weight.source]
        data_type = onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=stored.dtype).numpy().dtype)
        graph.initializer.append(TensorProto(name=name, dims=stored.shape, data_type=data_type))
    result = Graph(model, found, weights)
    _store_as_read(result)
    _fold_constants(model)
    for value, tensor in zip((*graph.input, *graph.output), tensors, strict=True):
        # The exporter leaves names of its own where it could not follow a dim.
        for dim, known in zip(value.type.tensor_type.shape.dim, ("rows", *tensor.dims), strict=True):
            if isinstance(known, int):
                dim.dim_value = known
            else:
                dim.dim_param = known
    return result


def example_inputs(
    signature: Signature, rows: int, size: tuple[int, int], seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """`mmdit.samples.random_inputs` as torch tensors, in the signature's order."""
    inputs = random_inputs(signature, rows, size, np.random.default_rng(seed))
    return tuple(torch.from_numpy(values) for values in inputs.values())


def _hollowed(module: nn.Module) -> dict[str, Tensor]:
    """Take a module's weights out; name → weight.

    In their place stands one NaN each, expanded: shapes without memory, and no two that the exporter
    could find equal and merge. Quantizers keep their ranges, and integers (positions) their values.
    """
    weights = {}
    for path, part in module.named_modules():
        if path.endswith("_quantizer"):
            continue
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None or not isinstance(tensor, Tensor):
                    continue
                weights[f"{path}.{name}" if path else name] = tensor.detach()
                if tensor.is_floating_point():
                    hollow: Tensor = torch.full((), torch.nan, dtype=tensor.dtype).expand(tensor.shape)
                    store[name] = (
                        nn.Parameter(hollow, requires_grad=False) if store is part._parameters else hollow
                    )
    return weights


class _Linear(torch.autograd.Function):
    """A linear layer that is recorded and not computed: with hollow weights there is nothing to compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, bias: Any) -> Any:
        product = g.op("MatMul", x, g.op("Transpose", weight, perm_i=[1, 0]))
        sizes = x.type().sizes()
        if sizes is not None:
            product.setType(x.type().with_sizes([*sizes[:-1], weight.type().sizes()[0]]))
        if torch.onnx.symbolic_helper._is_none(bias):
            return product
        return g.op("Add", product, bias)


@contextlib.contextmanager
def _recorded_linears() -> Iterator[None]:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = _Linear.apply(x, weight, bias)
        return output

    with mock.patch("torch.nn.functional.linear", linear):
        yield


def _fold_constants(model: onnx.ModelProto) -> None:
    """Compute what depends on constants alone (not on weights), once and for all."""
    graph = model.graph
    known: dict[str, Any] = {}
    made: dict[str, NodeProto] = {}
    for node in graph.node:
        if node.op_type == "Constant":
            known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif (
            node.domain == ""
            and len(node.output) == 1
            and all(name in known or not name for name in node.input)
        ):
            value = ReferenceEvaluator(node).run(None, {name: known[name] for name in node.input if name})[0]
            if value.nbytes > _FOLDED_BYTES:
                continue
            known[node.output[0]] = value
            constant = onnx.helper.make_node(
                "Constant", [], list(node.output), node.name, value=numpy_helper.from_array(value)
            )
            made[node.output[0]] = constant
    used = {name for node in graph.node if node.output[0] not in made for name in node.input}
    used |= {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        name = graph.node[index].output[0]
        if name in made:
            graph.node[index].CopyFrom(made[name])
        if name in known and name not in used:
            del graph.node[index]


def _store_as_read(graph: Graph) -> None:
    """Store the weights that are read through a Transpose or an Unsqueeze alone as they are read."""
    nodes = graph.model.graph.node
    constants = {node.output[0]: node.attribute[0].t for node in nodes if node.op_type == "Constant"}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gone = set()
    for tensor in graph.model.graph.initializer:
        through = readers.get(tensor.name, [])
        kinds = {node.op_type for node in through}
        if kinds == {"Transpose"} and len(tensor.dims) == 2:
            graph.weights[tensor.name] = Weight(graph.weights[tensor.name].source, transposed=True)
            tensor.dims[:] = reversed(tensor.dims)
        elif kinds == {"Unsqueeze"} and len({node.input[1] for node in through} & constants.keys()) == 1:
            for axis in numpy_helper.to_array(constants[through[0].input[1]]).tolist():
                tensor.dims.insert(axis, 1)
        else:
            continue
        for node in through:
            gone.add(node.output[0])
            for reader in readers[node.output[0]]:
                reader.input[list(reader.input).index(node.output[0])] = tensor.name
    for index in reversed(range(len(nodes))):
        if nodes[index].output[0] in gone:
            del nodes[index]


def _dynamic_axes(tensor: Contracted) -> dict[int, str]:
    names = {0: "rows"}
    return names | {axis: dim for axis, dim in enumerate(tensor.dims, start=1) if isinstance(dim, str)}
