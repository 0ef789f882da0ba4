"""A component's ONNX graph, held against the tensor contract before any runtime sees it."""

from pathlib import Path
from typing import Any

import numpy as np

from mmdit.contract import Dtype, Signature, Tensor
from mmdit.errors import EngineError


def check_graph(onnx_file: Path, component: str, signature: Signature) -> None:
    """Check that a graph is valid ONNX and that its inputs and outputs are the contract's.

    Rows stand first and are dynamic, as is every dim that the contract names with a letter: a
    profile cannot vary a fixed dim, and Triton's TensorRT backend refuses a max_batch_size above 1
    over one. An output's dim that the file leaves open, because shape inference could not tell it,
    is seen when the engine runs or is loaded. Raises EngineError.
    """
    check_valid(onnx_file, component)
    if wrong := differences(load(onnx_file, component).graph, signature):
        raise EngineError(
            f"{component}: {onnx_file} does not keep the contract: {'; '.join(wrong)}; export it again"
        )


def load(onnx_file: Path, component: str) -> Any:
    """A file's model without its external weights; raises EngineError when it cannot be read."""
    import onnx

    try:
        return onnx.load(str(onnx_file), load_external_data=False)
    except Exception as error:  # protobuf and the file system each raise their own
        raise _invalid(onnx_file, component, error) from error


def check_valid(onnx_file: Path, component: str) -> None:
    """Raise EngineError when a file is not valid ONNX."""
    import onnx

    try:
        onnx.checker.check_model(str(onnx_file))
    except Exception as error:  # the checker, protobuf and the file system each raise their own
        raise _invalid(onnx_file, component, error) from error


def differences(graph: Any, signature: Signature) -> list[str]:
    """What a graph's inputs and outputs have that the contract has not, or the other way round."""
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initializers]
    return _differences("input", inputs, signature.inputs) + _differences(
        "output", list(graph.output), signature.outputs
    )


def _invalid(onnx_file: Path, component: str, error: Exception) -> EngineError:
    reason = " ".join(str(error).split())
    return EngineError(f"{component}: {onnx_file} is no valid ONNX model: {reason}")


def _differences(kind: str, values: list[Any], tensors: tuple[Tensor, ...]) -> list[str]:
    found = {value.name: value.type.tensor_type for value in values}
    expected = {tensor.name: tensor for tensor in tensors}
    wrong = [f"{kind} {name!r} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{kind} {name!r} is not in the contract" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        has, wants = _described(found[name]), expected[name]
        dims = ("rows", *wants.dims)
        same = len(has[1]) == len(dims) and all(
            dim == wanted or (isinstance(dim, str) and (isinstance(wanted, str) or kind == "output"))
            for dim, wanted in zip(has[1], dims, strict=True)
        )
        if has[0] != wants.dtype.value or not same:
            wrong.append(
                f"{kind} {name!r} is {has[0]} {_listed(has[1])}, expected "
                f"{wants.dtype.value} {_listed(dims)} where a name stands for a dynamic dim"
            )
    return sorted(wrong)


def _described(tensor_type: Any) -> tuple[str, tuple[int | str, ...]]:
    import onnx

    names = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype.numpy)): dtype.value for dtype in Dtype}
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor_type.shape.dim
    )
    code = tensor_type.elem_type
    return names.get(code, onnx.TensorProto.DataType.Name(code)), dims


def _listed(dims: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, dims))}]"
