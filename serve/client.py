"""A client of the served pictures, over gRPC. Needs numpy, tritonclient and pillow; no torch.

from serve.client import Client
picture = Client("localhost:8001").generate("a large red circle", seed=7)
picture.save("circle.png")
"""

import json
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmdit.contract import Dtype
from mmdit.errors import ServerError

_MODEL = "text_to_image"
_STREAM = "text_to_image_stream"


@dataclass(frozen=True)
class Picture:
    """A picture, UINT8 [H, W, 3], with what made it: `request` holds the model's defaults too.

    `truncated`: the prompt was longer than an encoder reads.
    """

    image: npt.NDArray[np.uint8] = field(repr=False)
    seed: int
    truncated: bool
    request: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a PNG with the model, the prompt, the seed and the settings in its metadata."""
        information = PngInfo()
        height, width, _ = self.image.shape
        told = self.request | {"seed": self.seed, "height": height, "width": width}
        for name, value in sorted(told.items()):
            if not isinstance(value, np.ndarray):
                information.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.image).save(path, format="PNG", pnginfo=information)


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` is done, at noise level `sigma`; `preview` UINT8 [H, W, 3] if it was asked for."""

    step: int
    steps: int
    sigma: float
    preview: npt.NDArray[np.uint8] | None = field(repr=False)


class Client:
    """A connection to a server; close it, or use it as a context manager.

    Options of `generate` and `stream` are the inputs of the served model: `negative_prompt`, `seed`,
    `steps`, `guidance_scale`, `height`, `width` (pixels) and `latents` (FP32 [C, h, w], initial noise).
    What is not given gets the model's default.
    """

    def __init__(self, url: str = "localhost:8001") -> None:
        self.url = url
        self._client = triton.InferenceServerClient(url)
        self._inputs: dict[str, dict[str, Dtype]] = {}
        self._defaults: dict[str, Any] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def generate(self, prompt: str, *, timeout: float | None = None, **options: Any) -> Picture:
        """Make one picture; `timeout` in seconds.

        Raises ServerError with the server's message, or when it cannot be reached.
        """
        request = {"prompt": prompt} | {k: v for k, v in options.items() if v is not None}
        inputs = self._tensors(_MODEL, request)
        try:
            answer = self._client.infer(_MODEL, inputs, client_timeout=timeout)
        except triton.InferenceServerException as error:
            raise self._error(error) from None
        return self._picture(answer, request)

    def stream(
        self,
        prompt: str,
        *,
        progress_every: int = 1,
        preview_every: int = 0,
        preview_with_vae: bool = False,
        timeout: float | None = None,
        **options: Any,
    ) -> Iterator[Progress | Picture]:
        """Make one picture and tell of it on the way: Progress after every `progress_every` steps, with a
        preview after every `preview_every` (0: none), then the Picture.

        To leave the loop early cancels the request. `timeout` bounds the seconds between two answers.
        Raises ServerError.
        """
        request = {"prompt": prompt} | {k: v for k, v in options.items() if v is not None}
        told = {
            "progress_every": progress_every,
            "preview_every": preview_every,
            "preview_with_vae": preview_with_vae,
        }
        inputs = self._tensors(_STREAM, request | told)
        answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        # A stream belongs to one client object, so each has its own.
        client = triton.InferenceServerClient(self.url)
        finished = False
        try:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(_STREAM, inputs, enable_empty_final_response=True)
            picture = None
            while True:
                try:
                    answer, error = answers.get(timeout=timeout)
                except queue.Empty:
                    raise ServerError(f"{self.url} has not answered for {timeout} seconds") from None
                if error is not None:
                    finished = True
                    raise self._error(error)
                if answer.get_response().parameters["triton_final_response"].bool_param:
                    finished = True
                    break
                step, steps = int(answer.as_numpy("step")[0]), int(answer.as_numpy("steps")[0])
                sigma = float(answer.as_numpy("sigma")[0])
                yield Progress(step, steps, sigma, answer.as_numpy("preview"))
                if step == steps:
                    picture = self._picture(answer, request)
            if picture is None:
                raise ServerError("the stream ended without a picture")
            yield picture
        finally:
            # Cancel only what still runs: Triton 2.51 cannot unload a model whose stream was cancelled
            # while it ended, and the server's stop then waits for its time-out.
            if not finished and client._stream is not None:
                # tritonclient 2.73 forgets the thread that waits for more requests of a cancelled stream.
                client._stream._request_queue.put(None)
            client.stop_stream(cancel_requests=not finished)
            client.close()

    def _tensors(self, model: str, values: dict[str, Any]) -> list[triton.InferInput]:
        known = self._model_inputs(model)
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise ServerError(
                f"{model} has no input {', '.join(unknown)}: expected {', '.join(sorted(known))}"
            )
        tensors = []
        for name, value in values.items():
            dtype = known[name]
            try:
                array = np.atleast_1d(np.asarray(value.encode() if isinstance(value, str) else value))
                safe = "unsafe" if dtype is Dtype.BYTES else "same_kind"
                converted = array.astype(dtype.numpy, casting=safe)
                if dtype in (Dtype.INT32, Dtype.INT64) and not np.array_equal(array, converted):
                    raise OverflowError
            except (ValueError, TypeError, OverflowError):
                raise ServerError(f"{name} is {value!r}: expected {dtype.value}") from None
            tensor = triton.InferInput(name, converted.shape, dtype.value)
            tensor.set_data_from_numpy(converted)
            tensors.append(tensor)
        return tensors

    def _model_inputs(self, model: str) -> dict[str, Dtype]:
        if model not in self._inputs:
            try:
                metadata = self._client.get_model_metadata(model)
            except triton.InferenceServerException as error:
                raise self._error(error) from None
            self._inputs[model] = {tensor.name: Dtype(tensor.datatype) for tensor in metadata.inputs}
        return self._inputs[model]

    def _picture(self, answer: Any, request: dict[str, Any]) -> Picture:
        return Picture(
            image=answer.as_numpy("image"),
            seed=int(answer.as_numpy("used_seed")[0]),
            truncated=bool(answer.as_numpy("truncated")[0]),
            request=self._model_defaults() | request,
        )

    def _model_defaults(self) -> dict[str, Any]:
        if not self._defaults:
            try:
                config = self._client.get_model_config(_MODEL).config
            except triton.InferenceServerException as error:
                raise self._error(error) from None
            self._defaults = {name: json.loads(item.string_value) for name, item in config.parameters.items()}
        return self._defaults

    def _error(self, error: Exception) -> ServerError:
        message = str(error.message()) if hasattr(error, "message") else str(error)
        if "failed to connect" in message.lower() or "connection refused" in message.lower():
            message = f"no server answers at {self.url}: start one with `make serve`"
        return ServerError(message)
