"""Triton's model control API, for the launcher alone: how a server is drained.

SIGTERM makes Triton refuse every call between models at once, so pictures in the making fail. Unloading what
clients ask for does not: the server is no longer ready, new requests are refused ("has no available
versions", NOT_FOUND in gRPC), and those that run finish. A key, random for each start, keeps clients from
loading and unloading. It stands on Triton's command line, where this machine's users may read it.
"""

import secrets

import tritonclient.grpc as triton

SERVED = ("text_to_image", "text_to_image_stream")
_KEY = "drain-key"
_ANSWER = 5.0  # seconds that the server may take to answer


class ModelControl:
    """The options that reserve the API, and what is done with it; `url` is the server's gRPC address."""

    def __init__(self) -> None:
        secret = secrets.token_hex(16)
        restricted = f"model-repository,logging,trace,shared-memory:{_KEY}={secret}"
        self._headers = {f"triton-grpc-protocol-{_KEY}": secret}
        self.options = [
            "--model-control-mode=explicit",
            "--load-model=*",
            f"--grpc-restricted-protocol={restricted}",
            f"--http-restricted-api={restricted}",
        ]

    def unload(self, url: str) -> None:
        """Take no more requests; returns at once. Raises InferenceServerException."""
        with triton.InferenceServerClient(url) as client:
            for name in SERVED:
                client.unload_model(name, headers=self._headers, client_timeout=_ANSWER)

    def unloaded(self, url: str) -> bool:
        """Whether what ran at `unload` has finished. Raises InferenceServerException."""
        with triton.InferenceServerClient(url) as client:
            index = client.get_model_repository_index(headers=self._headers, client_timeout=_ANSWER)
        return all(each.state == "UNAVAILABLE" for each in index.models if each.name in SERVED)
