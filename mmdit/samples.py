"""Random inputs of a component, for what needs some and no meaning in them: traces, checks, comparisons."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmdit.contract import Dtype, Signature, dims_at
from mmdit.shapes import Size

VOCABULARY = 64  # token ids are below it: every vocabulary has as many
TIMESTEPS = 1000  # of every Stable Diffusion 3 checkpoint


def random_inputs(
    signature: Signature, rows: int, size: Size, generator: np.random.Generator
) -> dict[str, npt.NDArray[Any]]:
    """Input → [rows, …] in its dtype, for pictures of `size` = (height, width) in pixels.

    Integers are token ids below `VOCABULARY`; timesteps are uniform in [0, `TIMESTEPS`); the rest is normal.
    """
    inputs = {}
    for tensor in signature.inputs:
        shape = (rows, *dims_at(tensor, size))
        if tensor.dtype is Dtype.INT64:
            values: Any = generator.integers(0, VOCABULARY, shape)
        elif tensor.name == "timestep":
            values = generator.uniform(0, TIMESTEPS, shape)
        else:
            values = generator.standard_normal(shape)
        inputs[tensor.name] = values.astype(tensor.dtype.numpy)
    return inputs
