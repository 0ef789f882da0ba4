"""Requests that tritonclient would not make: the protocol's own messages, whose dtypes, shapes and bytes need
not agree with one another."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

PATIENCE = 60  # seconds; a request that is not answered within them hangs
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Raw:
    """A tensor as a request tells it: Triton's name of a dtype, a shape, the bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes = field(repr=False)  # a third of a megabyte, of a context


def raw(values: np.ndarray) -> Raw:
    """What an honest client sends of an array."""
    if values.dtype == np.object_:
        content = b"" if values.size == 0 else serialize_byte_tensor(values).item()
        return Raw("BYTES", values.shape, content)
    return Raw(np_to_triton_dtype(values.dtype), values.shape, values.tobytes())


@dataclass(frozen=True)
class Answer:
    """How a request ended: the answers, or the error's code and message."""

    responses: int
    code: grpc.StatusCode | None
    message: str


class Connection:
    """A connection to a server that sends what it is given."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.insecure_channel(
            f"localhost:{port}", [("grpc.max_receive_message_length", _MOST_BYTES)]
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def send(self, model: str, inputs: dict[str, Raw], *, stream: bool = False) -> Answer:
        """Send a request and wait for its end."""
        request = service_pb2.ModelInferRequest(
            model_name=model,
            inputs=[
                service_pb2.ModelInferRequest.InferInputTensor(
                    name=name, datatype=tensor.dtype, shape=tensor.shape
                )
                for name, tensor in inputs.items()
            ],
            raw_input_contents=[tensor.content for tensor in inputs.values()],
        )
        try:
            if not stream:
                self._stub.ModelInfer(request, timeout=PATIENCE)
                return Answer(1, None, "")
            answers = list(self._stub.ModelStreamInfer(iter([request]), timeout=PATIENCE))
        except grpc.RpcError as error:
            return Answer(0, error.code(), error.details())
        messages = [answer.error_message for answer in answers if answer.error_message]
        code = grpc.StatusCode.UNKNOWN if messages else None  # a stream's errors have no code of their own
        return Answer(len(answers) - len(messages), code, " / ".join(messages))


@contextlib.contextmanager
def connected(port: int) -> Iterator[Connection]:
    """A connection, closed at the end of the block."""
    connection = Connection(port)
    try:
        yield connection
    finally:
        connection.close()
