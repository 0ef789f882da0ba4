"""The weights of an ONNX file: what each initializer is made from, written one at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from export.ranges import Ranges
from mmdit.errors import EngineError
from mmdit.progress import Progress

E4M3_MAX = 448.0  # the largest number of E4M3
INLINE_BYTES = 2**28  # protobuf ends at 2 GiB; with less inside, a graph is read without its weights
_EXTERNAL_TENSOR_BYTES = 1024  # smaller ones stay in the graph
_ALIGNMENT = 4096  # a page, so that a runtime can map each weight


@dataclass(frozen=True)
class Weight:
    """How an initializer is made from a tensor of the module.

    With `scale`, a scalar or one number for each output channel, it is stored as E4M3 in its units.
    """

    source: str
    transposed: bool = False
    scale: Tensor | None = None


@dataclass
class Graph:
    """A model whose initializers have no data yet, and what they are made from.

    `weights`: initializer → how it is made; an initializer that is not among them has its data.
    """

    model: onnx.ModelProto
    weights: dict[str, Weight]
    tensors: dict[str, Tensor]

    def stored(self, name: str) -> Tensor:
        """An initializer's values as they are written; E4M3 as the bytes of its codes."""
        weight = self.weights[name]
        tensor = self.tensors[weight.source]
        if weight.scale is not None:
            scale = weight.scale.float()
            # One rounding, of the quotient in FP32.
            values = tensor.float() / (scale if scale.ndim == 0 else scale[:, None])
            tensor = values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        return tensor.T if weight.transposed else tensor


def save(graph: Graph, path: Path, label: str) -> dict[str, Any]:
    """Write a model; its weights in one file beside it when together they are large.

    Holds one weight at a time besides the module's own in the second case. Returns the range of what it
    wrote (`export.ranges`). Raises EngineError when a weight is not finite or the checker refuses the file.
    """
    data = path.with_name(f"{path.name}.data")
    total = sum(_bytes(tensor) for tensor in graph.model.graph.initializer)
    offsets = placed_outside(graph, data.name) if total > INLINE_BYTES else {}
    ranges = Ranges()
    if offsets:
        with data.open("wb") as stream, Progress(f"{label}: writing", total >> 20, "MB") as progress:
            for name, offset in offsets.items():
                stream.seek(offset)
                stream.write(_content(graph, name, ranges))
                progress.update(stream.tell() >> 20)
    save_graph(graph, path, ranges)
    return ranges.found()


def placed_outside(graph: Graph, data: str) -> dict[str, int]:
    """Give every weight but the small ones a place in the file `data`; initializer → its offset in bytes."""
    offsets = {}
    end = 0
    for tensor in graph.model.graph.initializer:
        length = _bytes(tensor)
        if tensor.name not in graph.weights or length < _EXTERNAL_TENSOR_BYTES:
            continue
        offset = end + -end % _ALIGNMENT
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": data, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        offsets[tensor.name] = offset
        end = offset + length
    return offsets


def save_graph(graph: Graph, path: Path, ranges: Ranges) -> None:
    """Write a model's file, with the weights that have no place outside it, and add their ranges.

    Raises EngineError when a weight is not finite or the checker refuses the file.
    """
    for tensor in graph.model.graph.initializer:
        if tensor.name in graph.weights and tensor.data_location != TensorProto.EXTERNAL:
            tensor.raw_data = _content(graph, tensor.name, ranges)
    onnx.save_model(graph.model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{path} is not a valid ONNX model: {error}") from None


def _content(graph: Graph, name: str, ranges: Ranges) -> bytes:
    weight, tensor = graph.weights[name], graph.stored(name)
    ranges.add(weight.source, graph.tensors[weight.source], tensor)
    content: bytes = tensor.contiguous().numpy().tobytes()
    return content


def _bytes(tensor: TensorProto) -> int:
    if tensor.raw_data:
        return len(tensor.raw_data)
    size = (
        1
        if tensor.data_type == TensorProto.FLOAT8E4M3FN
        else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )
    return size * int(np.prod(tensor.dims, dtype=np.int64))
