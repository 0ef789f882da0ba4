"""A package called `tensorrt` for child processes: the real bindings, over stand-ins that build CLIP-L.

$PRETENDED says what goes wrong in the middle of the build, $PRETENDED_BUILD where the build's folder is.
"""

import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tensorrt_stand_in import Stage, real_bindings

_WHAT = os.environ["PRETENDED"]
_PLAN = b"plan" * 2**18  # 1 MiB


def _partial() -> Path:
    return next(Path(os.environ["PRETENDED_BUILD"]).rglob(".*.partial"))


def _during() -> bytes | None:
    from polygraphy.backend.trt import get_trt_logger

    monitor: Any = _stage.config.progress_monitor
    monitor.phase_start("Building Engine", None, 4)
    monitor.step_complete("Building Engine", 0)
    if _WHAT == "killed":
        (_partial() / "model.plan").write_bytes(b"half a plan")
        os.kill(os.getpid(), signal.SIGKILL)
    if _WHAT == "crashed":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
    if _WHAT == "refused":
        get_trt_logger().log(
            _trt.Logger.ERROR,
            "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error "
            "(Could not find any implementation for node {ForeignNode[/cast.../add]}.)",
        )
        return None
    if _WHAT == "disk full":
        (_partial() / "model.plan").symlink_to("/dev/full")
    if _WHAT in ("file too large", "killed while it writes"):
        if _WHAT == "killed while it writes":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    if _WHAT == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
        return _PLAN if monitor.step_complete("Building Engine", 1) else None
    return _PLAN


def _loaded(serialized_engine: bytes) -> Any:
    assert serialized_engine == _PLAN
    if _WHAT == "truncated afterwards":
        os.truncate(_partial() / "model.plan", 7)
    return _stage.engine


_trt = real_bindings(Path(tempfile.mkdtemp()))
_stage = Stage(_trt, "clip_l", _during)
_stage.runtime.deserialize_cuda_engine.side_effect = _loaded
