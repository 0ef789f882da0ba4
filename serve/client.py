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

from serve.patience import Patience
from serve.picture import Picture, Progress, picture_from, progress_from
from serve.request import CHANNEL_OPTIONS, MODEL, STREAM, ServedModel

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

        A request that was refused is sent again up to `retries` times, after a wait that grows, within
        `timeout`. Raises ServerError.
        """
        patience = Patience(self.url, timeout, retries)
        values = {"prompt": prompt} | options
        while True:
            try:
                model = self._model(MODEL, patience)
                message = model.message(values, seconds=patience.seconds, priority_level=priority_level)
                answer = self._server.ModelInfer(message, timeout=patience.wait)
                return picture_from(answer, model.told(values))
            except grpc.RpcError as error:
                pause = patience.pause(patience.error(error))
            time.sleep(pause)

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

        After every `preview_every` steps (0: none) the progress has a preview: a projection of the latents,
        which costs next to nothing, or `preview_with_vae` what the VAE makes of them. To leave the loop
        early cancels the request. Raises ServerError.
        """
        patience = Patience(self.url, timeout)
        values = {"prompt": prompt} | options
        reports = {
            "progress_every": progress_every,
            "preview_every": preview_every,
            "preview_with_vae": preview_with_vae,
        }
        call = None
        try:
            told = self._model(MODEL, patience).told(values)
            message = self._model(STREAM, patience).message(
                values | reports, seconds=patience.seconds, priority_level=priority_level
            )
            call = self._server.ModelStreamInfer(iter([message]), timeout=patience.wait)
            answer, error = service_pb2.ModelStreamInferResponse(), ""
            for answer in call:
                if error := error or answer.error_message:
                    continue  # to the end: Triton 2.51 keeps a stream that is cancelled while it ends
                yield progress_from(answer)
            if error:
                raise patience.stream_error(error)
            yield picture_from(answer.infer_response, told)
        except grpc.RpcError as error:
            raise patience.error(error) from None
        finally:
            if call is not None:
                call.cancel()  # what has ended stays as it is

    def _model(self, name: str, patience: Patience) -> ServedModel:
        if name not in self._models:
            request = service_pb2.ModelConfigRequest(name=name)
            answer = self._server.ModelConfig(request, timeout=patience.wait)
            self._models[name] = ServedModel.from_config(answer.config)
        return self._models[name]
