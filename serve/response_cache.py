"""Triton's response cache: in the server's own memory, or in a Redis that outlives it.

It holds the text encoders' answers for each prompt, and whole pictures where the repository was packaged so.
Triton's key is a model's name, version and inputs: it does not tell weights apart, so one Redis is for one
packaged repository, and is emptied when that changes.
"""

from dataclasses import dataclass
from urllib.parse import urlsplit

from mmdit.errors import ServerError
from serve.installation import CONTAINER, Installation

_TIMEOUT = 1000  # milliseconds; redis_cache would wait for ever, and requests with it


@dataclass(frozen=True)
class ResponseCache:
    """`redis` as (host, port), or else `mebibytes` of the server's memory."""

    mebibytes: int = 256
    redis: tuple[str, int] | None = None

    @classmethod
    def parse(cls, text: str) -> "ResponseCache":
        """From `local`, `local:MIB` or `redis://HOST[:PORT]`; raises ServerError for anything else."""
        kind, _, size = text.partition(":")
        if kind == "local" and (text == kind or (size.isdecimal() and int(size) > 0)):
            return cls(int(size)) if size else cls()
        try:
            url = urlsplit(text)
            if url.scheme == "redis" and url.hostname and text.count("/") == 2 and "@" not in text:
                return cls(redis=(url.hostname, url.port or 6379))
        except ValueError:  # of the port
            pass
        raise ServerError(
            f"the cache {text!r} is unknown: expected local, local:MIB or redis://HOST:PORT; Triton takes "
            "Redis's user and password from TRITONCACHE_REDIS_USERNAME and TRITONCACHE_REDIS_PASSWORD"
        )

    def options(self, installation: Installation) -> list[str]:
        """Triton's options; raises ServerError where the installation has no library for it.

        (github.com/triton-inference-server/redis_cache, README: configuration options)
        """
        if self.redis is None:
            return [f"--cache-config=local,size={self.mebibytes << 20}"]
        library = installation.caches / "redis/libtritoncache_redis.so"
        if not library.is_file():
            raise ServerError(
                f"{installation.command[0]} has no Redis cache (expected {library}; the nvidia-pytriton "
                f"wheel carries none): serve in NVIDIA's container, {CONTAINER}, or with --cache local"
            )
        host, port = self.redis
        settings = {"host": host, "port": port, "connect_timeout": _TIMEOUT, "socket_timeout": _TIMEOUT}
        return [f"--cache-config=redis,{name}={value}" for name, value in settings.items()]


LOCAL = ResponseCache()
