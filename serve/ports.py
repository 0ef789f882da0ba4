"""The ports that a Triton server listens on."""

import contextlib
import socket
from dataclasses import dataclass

from mmdit.errors import ServerError


@dataclass(frozen=True)
class Ports:
    """The server's three ports, and the address that it listens on."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002
    host: str = "127.0.0.1"

    @classmethod
    def free(cls) -> "Ports":
        """Three ports that nothing listens on at this moment."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return cls(*(each.getsockname()[1] for each in sockets))

    def check_free(self) -> None:
        """Raise ServerError naming the port that another process listens on."""
        ports = {"GRPC_PORT": self.grpc, "HTTP_PORT": self.http, "METRICS_PORT": self.metrics}
        if len(set(ports.values())) != len(ports):
            raise ServerError(f"the three ports must differ, not {ports}")
        for name, port in ports.items():
            if not 0 < port < 65536:
                raise ServerError(f"{name}={port} is no port: expected 1 to 65535")
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise ServerError(
                        f"port {port} cannot be used ({error.strerror}): stop what listens there, or "
                        f"choose another with {name}=…"
                    ) from None
