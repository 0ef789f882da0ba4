"""An engine for ONNX Runtime: the ONNX file itself, once it has run and kept the contract."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines.source import Source
from mmdit.contract import Precision, Signature, bounds, dims_at
from mmdit.errors import EngineError
from mmdit.family import Family
from mmdit.shapes import ShapeSet, Size

_TOKEN_IDS = 8  # every vocabulary has as many


def onnxruntime_from_onnx(
    source: Source, folder: Path, *, signature: Signature, shapes: ShapeSet, family: Family
) -> dict[str, Any]:
    """Copy a component's ONNX files into `folder` and run them at the bounds of every profile.

    Copies, not hard links: onnx refuses external weights that have several names, and the links
    would spoil the original too. Returns findings. Raises EngineError when ONNX Runtime cannot load
    or run the graph, or an output is not finite or not what the contract says.
    """
    component = source.component
    for name in source.files:
        shutil.copyfile(source.folder / name, folder / name)
    start = time.monotonic()
    try:
        loaded_session = session(folder / source.onnx.name, source.precision)
    except Exception as error:  # its exceptions share no base but Exception
        reason = " ".join(str(error).split())
        raise EngineError(f"{component}: ONNX Runtime cannot load it: {reason}") from error
    loaded = time.monotonic()
    points = sorted({point for bound in bounds(signature, shapes) for point in bound})
    for rows, size in points:
        _check_runs(loaded_session, component, signature, family, rows, size)
    return {
        "engine_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "seconds_to_load": round(loaded - start, 3),
        "ran_at": [{"rows": rows, "size": list(size)} for rows, size in points],
    }


def _check_runs(
    loaded: Any, component: str, signature: Signature, family: Family, rows: int, size: Size
) -> None:
    at = f"{rows} rows of {size[0]}×{size[1]} pixels"
    try:
        results = loaded.run(
            [tensor.name for tensor in signature.outputs], _random_inputs(signature, family, rows, size)
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"{component}: ONNX Runtime cannot run it at {at}: {reason}") from error
    for tensor, result in zip(signature.outputs, results, strict=True):
        expected = (rows, *dims_at(tensor, size))
        if result.dtype != tensor.dtype.numpy or result.shape != expected:
            raise EngineError(
                f"{component}: output {tensor.name!r} is {result.dtype} {list(result.shape)} at "
                f"{at}, expected {tensor.dtype.value} {list(expected)}"
            )
        if not np.isfinite(result).all():
            raise EngineError(
                f"{component}: output {tensor.name!r} holds values that are not finite for random "
                f"inputs at {at}: look for an overflow in the export's report"
            )


def session(onnx_file: Path, precision: Precision) -> Any:
    """An ONNX Runtime session on the CPU, optimized as far as the precision allows."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A thread that spins takes the core of the one that it waits for when others work here too.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if precision is Precision.FP8:
        # None: basic optimizations compute FP8 attention wrong (8 % off, ONNX Runtime 1.31), extended ones
        # fuse FP8 Q/DQ into MatMulIntegerToFloat and reject it. It costs a tenth of the speed.
        none = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = none
    return onnxruntime.InferenceSession(str(onnx_file), options, providers=["CPUExecutionProvider"])


def _random_inputs(signature: Signature, family: Family, rows: int, size: Size) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    inputs = {}
    for tensor in signature.inputs:
        shape = (rows, *dims_at(tensor, size))
        if tensor.name == "input_ids":
            values: Any = generator.integers(0, _TOKEN_IDS, shape)
        elif tensor.name == "timestep":
            values = generator.uniform(0, family.train_timesteps, shape)
        else:
            values = generator.standard_normal(shape)
        inputs[tensor.name] = values.astype(tensor.dtype.numpy)
    return inputs
