"""A client of the served pictures, over gRPC. Needs numpy, tritonclient and pillow; no torch.

from serve.client import Client
picture = Client("localhost:8001").generate("a large red circle", seed=7)
picture.save("circle.png")
"""

import time
from collections.abc import Iterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mmdit.errors import ServerError, UnavailableError
from serve.patience import Patience
from serve.picture import Picture, Progress, picture_from, progress_from
from serve.request import CHANNEL_OPTIONS, MODEL, STREAM, STREAM_METADATA, ServedModel

__all__ = ["Client", "Picture", "Progress"]


class Client:
    """A connection to a server; close it, or use it as a context manager. Threads may share it.

    Options of `generate` and `stream` are the inputs of the served model: `negative_prompt`, `seed`,
    `steps`, `guidance_scale`, `guidance_start` and `guidance_end` (guidance from this fraction of the steps
    up to that), `height`, `width` (pixels) and `latents` (FP32 [C, h, w], initial noise). What is not given
    gets the model's default. `priority_level` 1 goes before 2 before 3.

    The server stops working on a request when its `timeout`, in seconds, has passed. Errors: ServerError
    with the server's message; of its kind UnavailableError, when the same may be asked again (a full queue,
    a server that stops or is not there), and DeadlineError.
    """

    def __init__(self, url: str = "localhost:8001") -> None:
        self.url = url
        self._channel = grpc.insecure_channel(url, options=CHANNEL_OPTIONS)
        self._server = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._models: dict[str, ServedModel] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        retries: int = 0,
        priority_level: int | None = None,
        **options: Any,
    ) -> Picture:
        """Make one picture.

        A request that was refused is tried again up to `retries` times, after a wait that grows, within
        `timeout`. Raises ServerError.
        """
        patience = Patience(self.url, timeout, retries)
        values = {"prompt": prompt} | options
        while True:
            try:
                message = self._model(MODEL, patience).message(
                    values, seconds=patience.seconds, priority_level=priority_level
                )
                try:
                    answer = self._server.ModelInfer(message, timeout=patience.wait)
                except grpc.RpcError as error:
                    raise patience.error(error) from None
                return picture_from(answer, self._told(values, patience))
            except UnavailableError as error:
                time.sleep(patience.pause(error))

    def stream(
        self,
        prompt: str,
        *,
        progress_every: int = 1,
        preview_every: int = 0,
        preview_with_vae: bool = False,
        timeout: float | None = None,
        priority_level: int | None = None,
        **options: Any,
    ) -> Iterator[Progress | Picture]:
        """Make one picture and tell of it on the way: Progress after every `progress_every` steps, then
        the Picture.

        Every `preview_every` steps the progress has a preview: a projection of the latents, which costs
        next to nothing, or with `preview_with_vae` what the VAE makes of them. To leave the loop early
        cancels the request. Raises ServerError.
        """
        patience = Patience(self.url, timeout)
        values = {"prompt": prompt} | options
        reports = {
            "progress_every": progress_every,
            "preview_every": preview_every or None,
            "preview_with_vae": preview_with_vae or None,
        }
        message = self._model(STREAM, patience).message(
            values | reports, seconds=patience.seconds, priority_level=priority_level
        )
        told = self._told(values, patience)
        call = self._server.ModelStreamInfer(iter([message]), timeout=patience.wait, metadata=STREAM_METADATA)
        picture = None
        try:
            for answer in call:
                progress = progress_from(answer.infer_response)
                if progress.step == progress.steps:
                    picture = picture_from(answer.infer_response, told)
                yield progress
        except grpc.RpcError as error:
            raise patience.error(error) from None
        finally:
            call.cancel()  # does nothing to a call that has ended
        if picture is None:
            raise ServerError("the stream ended without a picture")
        yield picture

    def _model(self, name: str, patience: Patience) -> ServedModel:
        if name not in self._models:
            request = service_pb2.ModelConfigRequest(name=name)
            try:
                answer = self._server.ModelConfig(request, timeout=patience.wait)
            except grpc.RpcError as error:
                raise patience.error(error) from None
            self._models[name] = ServedModel.from_config(answer.config)
        return self._models[name]

    def _told(self, values: dict[str, Any], patience: Patience) -> dict[str, Any]:
        given = {name: value for name, value in values.items() if value is not None}
        return self._model(MODEL, patience).defaults | given
