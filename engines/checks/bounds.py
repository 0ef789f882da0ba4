"""Whether a component's graph bears every profile: its smallest, usual and largest shapes.

A small graph is run there in ONNX Runtime. At full size that would take hours without a GPU: then its dims
are told node by node instead (`engines.checks.tensors`), which finds what does not fit together and no more.
"""

import math
from typing import Any

import numpy as np

from engines.checks.graph import load
from engines.onnxruntime.session import session
from engines.source import Source
from mmdit.contract import Signature, bounds, dims_at, dims_vary
from mmdit.errors import EngineError
from mmdit.samples import random_inputs
from mmdit.shapes import ShapeSet, Size

RUNNABLE = 10**12  # parameters × rows × positions of a call: at most a minute or two on two cores


def check_bounds(
    source: Source, signature: Signature, shapes: ShapeSet, loaded: Any = None
) -> dict[str, Any]:
    """Hold a graph against the contract at the bounds of every profile; returns findings: how, and where.

    `loaded` is an ONNX Runtime session of the file, when there is one. Raises EngineError when the graph
    does not run or its dims do not fit, or an output is not what the contract says, or not finite.
    """
    points = sorted({point for bound in bounds(signature, shapes) for point in bound})
    model = load(source.onnx, source.component)
    parameters = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    runs = parameters * max(rows * _positions(signature, size) for rows, size in points) <= RUNNABLE
    if runs and loaded is None:
        loaded = session(source.onnx, source.component, source.precision)
    for rows, size in points:
        try:
            if runs:
                _run(
                    loaded,
                    signature,
                    random_inputs(signature, rows, size, np.random.default_rng(0)),
                    rows,
                    size,
                )
            else:
                _tell(model, signature, rows, size)
        except EngineError as error:
            at = f"{rows} rows of {size[0]}×{size[1]} pixels"
            raise EngineError(f"{source.component}: {error}, at {at}") from error.__cause__
    return {
        "ran_at" if runs else "dims_told_at": [{"rows": rows, "size": list(size)} for rows, size in points]
    }


def _positions(signature: Signature, size: Size) -> int:
    """At how many places of a row a weight is applied, at most: tokens, or a latent's or picture's pixels."""
    if not dims_vary(signature):
        return dims_at(signature.inputs[0], size)[0]
    return max(
        math.prod(
            count
            for count, dim in zip(dims_at(tensor, size), tensor.dims, strict=True)
            if isinstance(dim, str)
        )
        for tensor in (*signature.inputs, *signature.outputs)
    )


def _tell(model: Any, signature: Signature, rows: int, size: Size) -> None:
    from engines.checks.tensors import tensors_of

    inputs = {tensor.name: (rows, *dims_at(tensor, size)) for tensor in signature.inputs}
    found = tensors_of(model, inputs).dims
    for tensor in signature.outputs:
        expected = (rows, *dims_at(tensor, size))
        if found[tensor.name] != expected:
            raise EngineError(
                f"output {tensor.name!r} is {list(found[tensor.name])}, expected {list(expected)}"
            )


def _run(loaded: Any, signature: Signature, inputs: dict[str, Any], rows: int, size: Size) -> None:
    try:
        results = loaded.run([tensor.name for tensor in signature.outputs], inputs)
    except Exception as error:  # its exceptions share no base but Exception
        raise EngineError(f"ONNX Runtime cannot run it: {' '.join(str(error).split())}") from error
    for tensor, result in zip(signature.outputs, results, strict=True):
        expected = (rows, *dims_at(tensor, size))
        if result.dtype != tensor.dtype.numpy or result.shape != expected:
            raise EngineError(
                f"output {tensor.name!r} is {result.dtype} {list(result.shape)}, expected "
                f"{tensor.dtype.value} {list(expected)}"
            )
        if not np.isfinite(result).all():
            raise EngineError(
                f"output {tensor.name!r} holds values that are not finite for random inputs: look for an "
                "overflow in the export's report"
            )
