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

from .errors import Cancelled, Expired, Full, RequestError

Array = npt.NDArray[Any]


# What a model of ours says of a request, and Triton's code for it. Triton 2.51 hands every error over as
# INTERNAL to a model that called another: a caller of ours asks for its kind in the message and takes it off.
_CODES = {RequestError: "INVALID_ARG", Full: "UNAVAILABLE", Expired: "CANCELLED", Cancelled: "CANCELLED"}
_KINDS = {kind.__name__: kind for kind in _CODES}
_ASKED = "error_kind_in_message"


class ModelError(Exception):
    """Another model's error; `code` is Triton's."""

    def __init__(self, message: str, code: Any) -> None:
        super().__init__(message)
        self.code = code


class NoAnswer(ModelError):
    """Another model answered without an error and without outputs that it was asked for."""


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
    Raises what a model of ours raised about the request, or ModelError with another's message and code:
    NoAnswer when an output is missing.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=[*tensors(inputs), *constants],
        requested_output_names=outputs,
        timeout=timeout,
        parameters={_ASKED: True, **(parameters or {})},
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    answer = request.exec()
    if answer.has_error():
        error = answer.error()
        message, _, kind = error.message().rpartition(" ")
        if kind[1:-1] in _KINDS:
            raise _KINDS[kind[1:-1]](message)
        raise ModelError(error.message(), error.code())
    found = {name: pb_utils.get_output_tensor_by_name(answer, name) for name in outputs}
    missing = [name for name, tensor in found.items() if tensor is None]
    if missing:
        raise NoAnswer(f"{model} answered without {', '.join(missing)}", pb_utils.TritonError.INTERNAL)
    return {name: tensor.as_numpy() for name, tensor in found.items()}


def response(outputs: dict[str, Array], request: Any) -> Any:
    """A response with the outputs, by name, that the request asks for.

    What it does not ask for must not be in it: Triton 2.51 drops such tensors from a response sender's
    response without holding Python's lock, which crashes the process on Python 3.12.
    """
    wanted = request.requested_output_names()
    return pb_utils.InferenceResponse(tensors({k: v for k, v in outputs.items() if k in wanted}))


def error_response(error: Exception, request: Any) -> Any:
    """The response that tells a client what was wrong with its request, or with the server."""
    message, kind = str(error), type(error)
    if isinstance(error, ModelError):
        code = error.code
    else:
        code = getattr(pb_utils.TritonError, _CODES.get(kind, "INTERNAL"))
    if kind in _CODES and json.loads(request.parameters() or "{}").get(_ASKED):
        message = f"{message} [{kind.__name__}]"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def answer(request: Any, sender: Any, result: dict[str, Array] | Exception) -> Exception | None:
    """Send a request's last response, with outputs by name or an error, and return the error.

    Outputs that cannot be handed over are an error too.
    """
    error = None
    try:
        if isinstance(result, Exception):
            raise result
        last = response(result, request)
    except Exception as failure:
        error, last = failure, error_response(failure, request)
    sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    return error


def one(value: Any, dtype: type) -> Array:
    """A tensor of shape [1]."""
    return np.array([value], dtype)
