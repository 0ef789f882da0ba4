"""The client for asyncio programs: as serve.client's, awaited.

from serve.aio import AsyncClient
async with AsyncClient("localhost:8001") as client:
    async for update in client.stream("a large red circle", seed=7):
        print(update)
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serve.patience import Patience
from serve.picture import Picture, Progress, picture_from, progress_from
from serve.request import CHANNEL_OPTIONS, MODEL, STREAM, ServedModel

__all__ = ["AsyncClient", "Picture", "Progress"]


class AsyncClient:
    """A connection to a server, made inside the event loop that it serves; close it, or use `async with`.

    Tasks may share it: it holds any number of requests and streams at once. Options and errors are those of
    `serve.client.Client`.
    """

    def __init__(self, url: str = "localhost:8001") -> None:
        asyncio.get_running_loop()  # gRPC would take another one, and fail at the first request
        self.url = url
        self._channel = grpc.aio.insecure_channel(url, options=CHANNEL_OPTIONS)
        self._server = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._models: dict[str, ServedModel] = {}

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        retries: int = 0,
        priority_level: int | None = None,
        **options: Any,
    ) -> Picture:
        """Make one picture; see `serve.client.Client.generate`.

        A task that is cancelled waits no longer, but the server makes the picture to its end, or its
        `timeout`: where that matters use `stream`. Raises ServerError.
        """
        patience = Patience(self.url, timeout, retries)
        values = {"prompt": prompt} | options
        while True:
            try:
                model = await self._model(MODEL, patience)
                message = model.message(values, seconds=patience.seconds, priority_level=priority_level)
                answer = await self._server.ModelInfer(message, timeout=patience.wait)
                return picture_from(answer, model.told(values))
            except grpc.RpcError as error:
                pause = patience.pause(patience.error(error))
            await asyncio.sleep(pause)

    async def stream(
        self,
        prompt: str,
        *,
        progress_every: int = 1,
        preview_every: int = 0,
        preview_with_vae: bool = False,
        timeout: float | None = None,
        priority_level: int | None = None,
        **options: Any,
    ) -> AsyncIterator[Progress | Picture]:
        """Make one picture and tell of it on the way; see `serve.client.Client.stream`.

        To leave the loop early, or to cancel the task, cancels the request. Raises ServerError.
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
            told = (await self._model(MODEL, patience)).told(values)
            message = (await self._model(STREAM, patience)).message(
                values | reports, seconds=patience.seconds, priority_level=priority_level
            )
            call = self._server.ModelStreamInfer([message], timeout=patience.wait)
            answer, error = service_pb2.ModelStreamInferResponse(), ""
            async for answer in call:
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

    async def _model(self, name: str, patience: Patience) -> ServedModel:
        if name not in self._models:
            request = service_pb2.ModelConfigRequest(name=name)
            answer = await self._server.ModelConfig(request, timeout=patience.wait)
            self._models[name] = ServedModel.from_config(answer.config)
        return self._models[name]
