"""Requests through tritonclient itself, whose errors tell Triton's code, and what the server has run."""

import contextlib
import queue
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

KINDS = ("unary", "stream")


def connect(server: Any) -> triton.InferenceServerClient:
    """A connection to a running server."""
    return triton.InferenceServerClient(f"localhost:{server.ports.grpc}")


def tensors(**given: Any) -> list[triton.InferInput]:
    """A request's tensors: a prompt's and whole numbers', as the contract has them; arrays as they are."""
    inputs = []
    for name, value in given.items():
        if isinstance(value, str):
            value = np.array([value.encode()], np.object_)
        elif isinstance(value, int):
            value = np.array([value], np.int64 if name == "seed" else np.int32)
        inputs.append(triton.InferInput(name, value.shape, np_to_triton_dtype(value.dtype)))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def picture(
    connection: triton.InferenceServerClient, kind: str, *, timeout: int | None = None, **request: Any
) -> Any:
    """The picture of a request, unary or streamed; `timeout` in microseconds, which Triton is told.

    Raises InferenceServerException with the server's error, or when it does not answer for a minute.
    """
    inputs = tensors(**request)
    if kind == "unary":
        answer = connection.infer("text_to_image", inputs, timeout=timeout, client_timeout=60)
        return answer.as_numpy("image")
    with streamed(connection, inputs, timeout) as answers:
        while True:
            answer, error = answers.get(timeout=60)
            if error is not None:
                raise error
            if answer.as_numpy("image") is not None:
                return answer.as_numpy("image")


@contextlib.contextmanager
def streamed(
    connection: triton.InferenceServerClient, inputs: list[triton.InferInput], timeout: int | None = None
) -> Iterator[queue.Queue]:
    """A stream's queue of (answer, error); the block's end waits for the rest of them."""
    answers: queue.Queue = queue.Queue()
    connection.start_stream(lambda result, error: answers.put((result, error)))
    try:
        connection.async_stream_infer("text_to_image_stream", inputs, timeout=timeout)
        yield answers
    finally:
        connection.stop_stream()


def executions(server: Any, model: str = "mmdit") -> float:
    """How often a model has run, cache hits not counted."""
    return metric(server, f'nv_inference_exec_count{{model="{model}"')


def metric(server: Any, name: str) -> float:
    """The sum of the metrics whose lines begin so."""
    with urllib.request.urlopen(f"http://localhost:{server.ports.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def until(condition: Callable[[], Any], within: float = 30) -> None:
    """Wait until the condition holds; fails the test when it does not within so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def rests(server: Any, within: float) -> bool:
    """Whether the engine makes no more steps, after so many seconds at most.

    A step of a few pictures takes a tenth of a second on two cores: none in a whole one is rest.
    """
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        before = executions(server)
        time.sleep(1)
        if executions(server) == before:
            return True
    return False
