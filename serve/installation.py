"""The Triton server that this machine has: its command, its backends, and the TensorRT that they load.

The server is the `tritonserver` on PATH, as in NVIDIA's container; without one, the server that the
`nvidia-pytriton` wheel carries (Linux x86-64, CPU, Python and ensemble backends).
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mmdit.errors import ServerError

CONTAINER = "nvcr.io/nvidia/tritonserver:<XX.YY>-py3"
_CONTAINER = Path("/opt/tritonserver")
# In a process of its own: a library of hundreds of megabytes, which may abort, stays out of the launcher.
_ASK_VERSION = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).getInferLibVersion())"


@dataclass(frozen=True)
class Installation:
    """A Triton server; `environment` is what it runs in, `backends` and `caches` the folders that it loads
    them from.
    """

    command: list[str]
    environment: dict[str, str]
    backends: Path
    caches: Path

    def tensorrt_version(self) -> str:
        """major.minor.patch of the libnvinfer that the TensorRT backend loads, asked of the library itself.

        Raises ServerError where there is no such backend, or no library that it could load.
        """
        backend = self.backends / "tensorrt/libtriton_tensorrt.so"
        if not backend.is_file():
            raise ServerError(
                f"{self.command[0]} has no TensorRT backend (expected {backend}; the nvidia-pytriton wheel "
                f"carries none): serve this repository in NVIDIA's container, {CONTAINER}, of the release "
                "whose TensorRT built the plans (deploy/README.md), or package engines for TARGET=cpu"
            )
        needed = re.search(rb"\0(libnvinfer\.so\.[\d.]+)\0", backend.read_bytes())
        if needed is None:
            raise ServerError(f"{backend} names no libnvinfer that it needs: it is damaged, install it again")
        library = needed[1].decode()
        beside = backend.with_name(library)  # the backend's RUNPATH is $ORIGIN
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_VERSION, str(beside) if beside.is_file() else library],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode != 0:
            reason = (asked.stderr.strip().splitlines() or [f"status {asked.returncode}"])[-1]
            raise ServerError(
                f"Triton's TensorRT backend needs {library}, which cannot be loaded ({reason}): install "
                f"TensorRT where the dynamic loader finds it, or serve in {CONTAINER}"
            )
        # NvInferRuntimeBase.h: major * 10000 + minor * 100 + patch, since TensorRT 10.
        number = int(asked.stdout)
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def find_installation(work: Path) -> Installation:
    """The server to start; `work` gets the wheel's backends. Raises ServerError when none can run here."""
    on_path = shutil.which("tritonserver")
    if on_path:
        beside = Path(on_path).resolve().parent.parent
        root = beside if (beside / "backends").is_dir() else _CONTAINER
        return Installation([on_path], dict(os.environ), root / "backends", root / "caches")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    spec = importlib.util.find_spec("pytriton")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not spec:
        raise ServerError(
            "no Triton server here: expected `tritonserver` on PATH (as in NVIDIA's container) or the "
            f"nvidia-pytriton wheel on Linux x86-64, found {platform.system()} {platform.machine()}, "
            f"Python {version}"
        )
    assert spec.origin
    package = Path(spec.origin).parent
    stub = package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(f"the nvidia-pytriton wheel has no Python backend for Python {version}")
    # The wheel's own folder may be read-only, and its Python backend lacks the stub for this Python.
    folder = work / f"triton-{importlib.metadata.version('nvidia-pytriton')}-py{version}"
    if not folder.is_dir():
        partial = work / f"{folder.name}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(package / "tritonserver/backends", partial / "backends")
        shutil.copy2(stub, partial / "backends/python" / stub.name)
        with contextlib.suppress(OSError):  # another process was first
            partial.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
    libraries = [str(package.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    environment = dict(os.environ)
    environment["LD_LIBRARY_PATH"] = ":".join(
        [*libraries, *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    )
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    caches = package / "tritonserver/caches"
    command = [
        str(package / "tritonserver/bin/tritonserver"),
        f"--backend-directory={folder}/backends",
        f"--cache-directory={caches}",
    ]
    return Installation(command, environment, folder / "backends", caches)
