"""An engine's folder to a function that runs it: named arrays in, named arrays out.

For what needs an engine's answers without a server, such as the quality gate. TensorRT's engines run
through Polygraphy, ONNX files through ONNX Runtime.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.engine import PLAN
from engines.plans.failures import explained
from engines.session import session
from engines.source import MODEL
from mmdit.artifact import Manifest, require
from mmdit.contract import Precision
from mmdit.errors import ArtifactError, EngineError

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Array]], dict[str, Array]]


@contextlib.contextmanager
def runner(folder: Path) -> Iterator[Run]:
    """Load the engine in `folder` and yield its function; leaving gives its memory back.

    Inputs and outputs are the contract's, rows first. Raises ArtifactError when there is no engine,
    EngineError when it cannot be loaded, or does not take the inputs.
    """
    manifest = require(folder, "make engines")
    if manifest.kind != "engine":
        raise ArtifactError(f"{folder} holds a {manifest.kind}, expected an engine: run `make engines` again")
    if manifest.settings["runtime"] == "tensorrt":
        with _tensorrt(folder / PLAN, manifest) as run:
            yield run
    else:
        with _onnxruntime(folder / MODEL, manifest) as run:
            yield run


@contextlib.contextmanager
def _onnxruntime(file: Path, manifest: Manifest) -> Iterator[Run]:
    component = manifest.settings["component"]

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


@contextlib.contextmanager
def _tensorrt(plan: Path, manifest: Manifest) -> Iterator[Run]:
    component, profiles = manifest.settings["component"], manifest.settings["profiles"]
    options = manifest.settings.get("options", {})
    if options.get("strip"):
        raise EngineError(f"{component}: {plan} has no weights: run `python -m engines refit` first")
    automatic = -1 if options.get("weight_streaming") else None  # as much on the GPU as it has room for
    # CUDA numbers GPUs by speed unless told otherwise, NVML (which chose the GPU) by bus.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with contextlib.ExitStack() as stack:
        with explained(component, f"cannot load {plan}"):
            from polygraphy.backend.common import BytesFromPath
            from polygraphy.backend.trt import EngineFromBytes, TrtRunner

            loaded = EngineFromBytes(BytesFromPath(str(plan)))
            active = stack.enter_context(TrtRunner(loaded, weight_streaming_budget=automatic))
        chosen = 0

        def run(inputs: dict[str, Array]) -> dict[str, Array]:
            nonlocal chosen
            profile = _profile_for(inputs, profiles, component)
            with explained(component, f"cannot run {plan}"):
                if profile != chosen:
                    active.set_profile(profile)
                    chosen = profile
                # The runner writes the next call's outputs into the same buffers.
                return {name: np.array(value) for name, value in active.infer(inputs).items()}

        yield run


def _profile_for(inputs: dict[str, Array], profiles: list[dict[str, Any]], component: str) -> int:
    """The number of the first optimization profile that takes the inputs' shapes."""
    for number, profile in enumerate(profiles):
        if all(
            len(array.shape) == len(profile[name][0])
            and all(
                low <= size <= high
                for low, size, high in zip(profile[name][0], array.shape, profile[name][2], strict=True)
            )
            for name, array in inputs.items()
        ):
            return number
    shapes = {name: list(array.shape) for name, array in inputs.items()}
    raise EngineError(f"{component}: no optimization profile of the engine takes {shapes}: it has {profiles}")
