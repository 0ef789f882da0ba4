"""What every Python model needs of Triton: inputs by name, calls to other models, errors.

The one place that makes inference requests: each asks for its outputs in CPU memory. Without that an
engine's output stays on the GPU, where numpy cannot read it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from .limits import RequestError
from .schedule import Cancelled, Full

Array = npt.NDArray[Any]


class ModelError(Exception):
    """Another model's error; `code` is Triton's."""

    def __init__(self, message: str, code: Any) -> None:
        super().__init__(message)
        self.code = code


class Model:
    """A Python model's configuration: its outputs, its `parameters`, the packaged settings."""

    def __init__(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self.parameters = {
            name: value["string_value"] for name, value in config.get("parameters", {}).items()
        }
        self.folder = Path(args["model_repository"]) / args["model_version"]
        self.settings: dict[str, Any] = json.loads((self.folder / "settings.json").read_text())

    def inputs(self, request: Any) -> dict[str, Array]:
        """The inputs that a request gives, by name."""
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}


def tensors(inputs: dict[str, Array]) -> list[Any]:
    """Triton's tensors of arrays, by name. One that several calls take lies in shared memory once."""
    return [pb_utils.Tensor(name, values) for name, values in inputs.items()]


def call(
    model: str,
    inputs: dict[str, Array],
    outputs: list[str],
    *,
    constants: Sequence[Any] = (),
    timeout: int = 0,
    parameters: dict[str, str | int | bool] | None = None,
) -> dict[str, Array]:
    """Run another model of this repository; returns its outputs by name.

    `constants` are inputs that `tensors` made; `timeout` (microseconds; 0: none) and `parameters` go along.
    Raises ModelError with that model's message and code.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=[*tensors(inputs), *constants],
        requested_output_names=outputs,
        timeout=timeout,
        parameters=parameters or {},
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    answer = request.exec()
    if answer.has_error():
        error = answer.error()
        raise ModelError(error.message(), error.code())
    found = {name: pb_utils.get_output_tensor_by_name(answer, name) for name in outputs}
    return {name: tensor.as_numpy() for name, tensor in found.items()}


def response(outputs: dict[str, Array], request: Any) -> Any:
    """A response with the outputs, by name, that the request asks for.

    What it does not ask for must not be in it: Triton 2.51 drops such tensors from a response sender's
    response without holding Python's lock, which crashes the process on Python 3.12.
    """
    wanted = request.requested_output_names()
    return pb_utils.InferenceResponse(tensors({k: v for k, v in outputs.items() if k in wanted}))


def error_response(error: Exception) -> Any:
    """The response that tells a client what was wrong with its request, or with the server."""
    if isinstance(error, ModelError):
        code = error.code
    elif isinstance(error, RequestError):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, Full):
        code = pb_utils.TritonError.UNAVAILABLE
    elif isinstance(error, Cancelled):
        code = pb_utils.TritonError.CANCELLED
    else:
        code = pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def one(value: Any, dtype: type) -> Array:
    """A tensor of shape [1]."""
    return np.array([value], dtype)
