"""A request for a picture as Triton's message: values become tensors, or an error that names the value."""

import json
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import serialize_byte_tensor

from mmdit.contract import Dtype
from mmdit.errors import ServerError

MODEL = "text_to_image"
STREAM = "text_to_image_stream"
# Pictures and latents are larger than gRPC's 4 MB.
CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
# A stream's errors have a message and no code: the server is asked to end it with the error's kind. Not with
# gRPC's codes (the header triton_grpc_error): Triton 2.51 crashes when such a stream is cancelled or refused.
_KIND_IN_MESSAGE = "error_kind_in_message"

_DTYPES = {dtype.triton: dtype for dtype in Dtype}
_DEFAULTS = ("model", "steps", "guidance_scale")  # of the parameters in the ensemble's config


@dataclass(frozen=True)
class ServedModel:
    """A served model's inputs, which of them it must be given, and the values of what it is not given."""

    name: str
    inputs: dict[str, Dtype]
    required: frozenset[str]
    defaults: dict[str, Any]

    @classmethod
    def from_config(cls, config: model_config_pb2.ModelConfig) -> "ServedModel":
        """From the config that the server tells."""
        names = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in config.input}
        parameters = {name: item.string_value for name, item in config.parameters.items()}
        return cls(
            name=config.name,
            inputs={name: _DTYPES[dtype] for name, dtype in names.items()},
            required=frozenset(tensor.name for tensor in config.input if not tensor.optional),
            defaults={name: json.loads(parameters[name]) for name in _DEFAULTS if name in parameters},
        )

    def message(
        self, values: dict[str, Any], *, seconds: float | None = None, priority_level: int | None = None
    ) -> service_pb2.ModelInferRequest:
        """The request with these inputs; what is None is left to the model.

        A model whose pictures are cached must be given a seed: one is drawn where there is none. The server
        gives up after `seconds`. Raises ServerError naming an input that the model does not have, needs, or
        whose value it does not take.
        """
        given = {name: value for name, value in values.items() if value is not None}
        unknown = sorted(given.keys() - self.inputs.keys())
        if unknown:
            raise ServerError(
                f"{self.name} has no input {', '.join(unknown)}: expected {', '.join(sorted(self.inputs))}"
            )
        if "seed" in self.required:
            given.setdefault("seed", secrets.randbits(63))
        for name in sorted(self.required - given.keys()):
            raise ServerError(f"{name} is missing: {self.name} needs it")
        message = service_pb2.ModelInferRequest(model_name=self.name)
        for name, value in given.items():
            dtype = self.inputs[name]
            array = converted(name, value, dtype)
            content = serialize_byte_tensor(array).item() if dtype is Dtype.BYTES else array.tobytes()
            message.inputs.add(name=name, datatype=dtype.value, shape=array.shape)
            message.raw_input_contents.append(content)
        if self.name == STREAM:
            message.parameters[_KIND_IN_MESSAGE].bool_param = True
        if seconds is not None:
            message.parameters["timeout"].int64_param = max(1, round(seconds * 1e6))
        if priority_level is not None:
            if isinstance(priority_level, bool) or not isinstance(priority_level, int):
                raise ServerError(f"priority_level is {priority_level!r}: expected 1, 2 or 3")
            message.parameters["priority_level"].int64_param = priority_level
        return message

    def told(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values, and the defaults of what is None or not there."""
        return self.defaults | {name: value for name, value in values.items() if value is not None}


def converted(name: str, value: Any, dtype: Dtype) -> npt.NDArray[Any]:
    """The value as an array of the dtype, [1] for a scalar.

    Raises ServerError for another kind of value, and for a whole number that the dtype does not hold.
    """
    try:
        if dtype is Dtype.BYTES:
            if not isinstance(value, str | bytes):
                raise TypeError
            return np.array([value.encode() if isinstance(value, str) else value], np.object_)
        array = np.atleast_1d(np.asarray(value))
        with np.errstate(over="ignore"):  # FP32's infinity, which the server refuses by name
            cast = array.astype(dtype.numpy, casting="same_kind")
        if dtype in (Dtype.INT32, Dtype.INT64) and not np.array_equal(array, cast):
            raise OverflowError
    except (ValueError, TypeError, OverflowError):
        told = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
        raise ServerError(f"{name} is {told}: expected {dtype.value}") from None
    return cast
