"""A denoising step's models, run in order: each takes the tensors that it names and hands its outputs on.

The packager lists them in `settings.json`: today the MMDiT alone. A ControlNet would come before it, take the
same latents and its own condition, and hand its residuals on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class StepModel(NamedTuple):
    """A served model that runs in each step, and its tensors' names."""

    name: str
    inputs: list[str]
    outputs: list[str]


class StepModels:
    """The step scheduler's engine. A model's inputs are `latent`, `timestep`, a request's conditions or
    earlier models' outputs, by name; one of the models gives `velocity`.

    `call` runs a model: its name, arrays by name, names of outputs, `constants` → outputs by name. `tensors`
    makes the constants of arrays by name, in their order, that several calls take.
    """

    def __init__(
        self,
        models: Sequence[StepModel],
        call: Callable[..., dict[str, Array]],
        tensors: Callable[[dict[str, Array]], list[Any]],
    ) -> None:
        self._models = models
        self._call = call
        self._tensors = tensors

    @classmethod
    def from_settings(cls, settings: dict[str, Any], **functions: Callable[..., Any]) -> "StepModels":
        """From the packaged `settings.json`."""
        return cls([StepModel(**model) for model in settings["step_models"]], **functions)

    def constants(self, conditions: dict[str, Array]) -> list[list[Any]]:
        """Each model's constants, of the conditions that it takes; [r, ...] by name."""
        made = dict(zip(conditions, self._tensors(conditions), strict=True))
        return [[made[name] for name in model.inputs if name in made] for model in self._models]

    def __call__(self, latent: Array, timestep: npt.NDArray[np.float32], constants: list[list[Any]]) -> Array:
        """Velocity [r, C, h, w] of latent [r, C, h, w] at timestep [r, 1]."""
        arrays = {"latent": latent, "timestep": timestep}
        for model, shared in zip(self._models, constants, strict=True):
            inputs = {name: arrays[name] for name in model.inputs if name in arrays}
            arrays.update(self._call(model.name, inputs, model.outputs, constants=shared))
        return arrays["velocity"]
