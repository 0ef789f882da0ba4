"""A plan to a function that runs it, through Polygraphy."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engines.runtimes import Array, Run
from engines.tensorrt.failures import explained
from engines.tensorrt.plan_from_onnx import PLAN
from mmdit.artifact import Manifest
from mmdit.errors import EngineError


@contextlib.contextmanager
def plan_runner(folder: Path, manifest: Manifest) -> Iterator[Run]:
    """Load the plan in `folder` on this machine's GPU; a call chooses the profile that takes its shapes.

    Raises EngineError, with TensorRT's own words, when it cannot be loaded or run.
    """
    plan = folder / PLAN
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
