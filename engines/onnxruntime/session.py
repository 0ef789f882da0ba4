"""An ONNX file in ONNX Runtime, on the CPU."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.runtimes import Array, Run
from engines.source import MODEL
from mmdit.artifact import Manifest
from mmdit.contract import Precision
from mmdit.errors import EngineError


def session(onnx_file: Path, component: str, precision: Precision) -> Any:
    """A session, optimized as far as the precision allows; raises EngineError when it cannot be loaded."""
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
    try:
        return onnxruntime.InferenceSession(str(onnx_file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but Exception
        reason = " ".join(str(error).split())
        raise EngineError(f"{component}: ONNX Runtime cannot load {onnx_file}: {reason}") from error


@contextlib.contextmanager
def opened(folder: Path, manifest: Manifest) -> Iterator[Run]:
    """Load the ONNX file in `folder`; raises EngineError when it cannot be loaded or run."""
    file, component = folder / MODEL, manifest.settings["component"]
    loaded = [session(file, component, Precision(manifest.settings["precision"]))]
    names = [tensor.name for tensor in loaded[0].get_outputs()]

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        try:
            return dict(zip(names, loaded[0].run(names, inputs), strict=True))
        except Exception as error:  # its exceptions share no base but Exception
            reason = " ".join(str(error).split())
            raise EngineError(f"{component}: ONNX Runtime cannot run {file}: {reason}") from error

    try:
        yield run
    finally:
        loaded.clear()  # the caller may keep `run`
