"""Start a Triton server over a packaged repository, wait until every model is ready, stop it cleanly."""

import contextlib
import ctypes
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tritonclient.grpc as triton

from engines.runtimes import runtime
from mmdit.artifact import read_manifest, shown
from mmdit.errors import ServerError, first_line
from mmdit.progress import Progress
from serve import processes
from serve.control import SERVED, ModelControl
from serve.installation import Installation, find_installation
from serve.ports import Ports
from serve.response_cache import LOCAL, ResponseCache

EXIT_TIMEOUT = 10  # seconds that Triton gets to end after a stop
START_TIMEOUT = 600  # seconds; engines of several GB are read from disk


class Server:
    """A running Triton server; `drain` and `stop` it, or use `running`."""

    def __init__(self, repository: Path, ports: Ports, log: Path, cache: ResponseCache = LOCAL) -> None:
        """Start the process; see `wait_until_ready`.

        Raises ServerError when no server can run here, a port is taken, or the server cannot load the
        plans; ArtifactError for a plan that is not what was packaged.
        """
        if not (repository / "manifest.json").is_file():
            raise ServerError(
                f"there is no packaged repository at {shown(repository)}: run `make repository` with this "
                "MODEL, TARGET and PRECISION first"
            )
        ports.check_free()
        self.repository = repository
        self.ports = ports
        self._address = "127.0.0.1" if ports.host == "0.0.0.0" else ports.host
        self.log = log
        self._models: dict[int, str] = {}
        self._regions: set[Path] = set()
        self._control = ModelControl()
        log.parent.mkdir(parents=True, exist_ok=True)
        installation = find_installation(log.parent)
        options, environment = _settings(repository, installation)
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [
                    *installation.command,
                    f"--model-repository={repository}",
                    *(f"--{service}-address={ports.host}" for service in ("grpc", "http", "metrics")),
                    f"--grpc-port={ports.grpc}",
                    f"--http-port={ports.http}",
                    f"--metrics-port={ports.metrics}",
                    *cache.options(installation),
                    *self._control.options,
                    f"--exit-timeout-secs={EXIT_TIMEOUT}",
                    *options,
                ],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=installation.environment | environment,
                start_new_session=True,  # Ctrl-C reaches this process alone; it stops the server
                preexec_fn=_die_with_parent,
            )

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until every model of the repository answers; raises ServerError with the log's reason."""
        models = sorted(path.parent.name for path in self.repository.glob("*/config.pbtxt"))
        deadline = time.monotonic() + timeout
        waiting = list(models)
        with (
            triton.InferenceServerClient(f"{self._address}:{self.ports.grpc}") as client,
            Progress("starting Triton", total=len(models), unit="models") as progress,
        ):
            while waiting:
                if self._process.poll() is not None:
                    raise ServerError(f"{self.failure()} (log: {shown(self.log)})")
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"{', '.join(waiting)} not ready after {timeout:.0f} s (log: {shown(self.log)})"
                    )
                with contextlib.suppress(triton.InferenceServerException):
                    waiting = [name for name in waiting if not client.is_model_ready(name)]
                progress.update(len(models) - len(waiting))
                if waiting:
                    time.sleep(0.1)
        self._models = processes.model_processes(self._process.pid)
        self._regions = processes.regions(self._process.pid)

    def failure(self) -> str | None:
        """What has died: the server itself, or the process of one of its Python models; None if all live.

        Triton 2.51 neither restarts a model's process nor calls the model unready: it would refuse every
        request from then on.
        """
        status = self._process.poll()
        if status is not None and status < 0:
            return f"the Triton server was killed by signal {-status}"
        if status is not None:
            return f"the Triton server ended with status {status}: {self._reason()}"
        dead = self._models.keys() - processes.model_processes(self._process.pid).keys()
        names = sorted({self._models[process] for process in dead})
        return f"the process of model {', '.join(names)} died" if names else None

    def drain(self, grace: float) -> str | None:
        """Refuse new requests and let those that run finish, for at most `grace` seconds.

        From then on the server is not ready. Returns None when all have finished, or why they could not.
        """
        if not self._models:  # it never was ready
            return None
        deadline = time.monotonic() + grace
        url = f"{self._address}:{self.ports.grpc}"
        reason = f"they were still running after {grace:g} s"
        asked = False
        while time.monotonic() <= deadline:
            if failure := self.failure():
                return failure
            try:
                if not asked:
                    self._control.unload(url)
                    asked = True
                    self._models = {key: name for key, name in self._models.items() if name not in SERVED}
                if self._control.unloaded(url):
                    return None
            except triton.InferenceServerException as error:  # a slow answer is no reason to cut them off
                reason = first_line(error)
            time.sleep(0.1)
        return reason

    def stop(self) -> None:
        """End the server, with what it still does; kills it when it does not obey."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_TIMEOUT + 5)
        self.kill()

    def kill(self) -> None:
        """End the server at once, with every process and the shared memory that a Triton may leave behind."""
        left = self._regions
        if self._process.poll() is None:
            left |= processes.regions(self._process.pid)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for process in processes.model_processes(self._process.pid):  # that wait for a server which is gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for path in left:
            path.unlink(missing_ok=True)

    def _reason(self) -> str:
        """The first line of the log that tells of a model that failed, else of an error, else the last."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"E\d{4} |error:", line) and "Cuda" not in line]
        chosen = (
            [line for line in errors if "failed to load" in line] or errors or lines[-1:] or ["no output"]
        )
        return chosen[0].split("\\n")[0].strip()


@contextlib.contextmanager
def running(repository: Path, ports: Ports, log: Path) -> Iterator[Server]:
    """A server that is ready, stopped at the end of the block."""
    server = Server(repository, ports, log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def serve(repository: Path, ports: Ports, log: Path, *, cache: ResponseCache, grace: float) -> int:
    """Serve until Ctrl-C, SIGTERM or the server's own end; returns the exit status.

    Requests that run get `grace` seconds to finish, unless a second signal ends them at once. When the
    process of a model has died nothing is waited for: requests in it would never finish. Raises ServerError
    then, so that who started this starts it again.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if not (math.isfinite(grace) and grace >= 0):
        raise ServerError(f"the grace time is {grace:g} s: expected seconds, 0 or more (GRACE_SECONDS=…)")
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell lets background jobs ignore SIGINT
        signal.signal(number, interrupt)
    server = Server(repository, ports, log, cache)
    try:
        server.wait_until_ready()
        print(
            f"serving {shown(repository)}\n  gRPC     {ports.host}:{ports.grpc}\n"
            f"  HTTP     {ports.host}:{ports.http}\n  metrics  {ports.host}:{ports.metrics}/metrics\n"
            f"  log      {shown(log)}\nCtrl-C stops it",
            flush=True,
        )
        while (failure := server.failure()) is None:
            time.sleep(0.5)
        server.kill()
        raise ServerError(f"{failure} (log: {shown(log)})")
    except KeyboardInterrupt:
        return _stop(server, grace)
    finally:
        server.stop()


def _stop(server: Server, grace: float) -> int:
    """Drain, then stop; returns the exit status. A second signal ends it."""
    try:
        print(
            f"stopping: new requests are refused, those that run get {grace:g} s; again to stop at once",
            flush=True,
        )
        if reason := server.drain(grace):
            print(f"requests are cut off: {reason}", flush=True)
            server.kill()
        server.stop()
    except KeyboardInterrupt:
        print("stopped at once", flush=True)
        server.kill()
    return 0


def _settings(repository: Path, installation: Installation) -> tuple[list[str], dict[str, str]]:
    """The server's options and environment for this repository, once it is sure that it can load it."""
    manifest = read_manifest(repository)
    needed = manifest.findings.get("shared_memory_bytes", 0)
    free = shutil.disk_usage(processes.SHARED_MEMORY).free
    if free < needed:
        print(
            f"warning: {processes.SHARED_MEMORY} has {free >> 20} MiB free, and this repository takes up to "
            f"{needed >> 20} MiB with as many requests as its policies admit: start the container with "
            f"--shm-size={needed >> 20}m",
            file=sys.stderr,
        )
    functions = runtime(manifest.settings["runtime"]).functions
    return functions.loadable(repository, manifest, installation.tensorrt_version)


def _die_with_parent() -> None:
    """Ask Linux to end the server when the process that started it dies (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
