"""TensorRT: plans built in a process of their own, run through Polygraphy, served by Triton's own backend."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.engine import Build
    from engines.runtimes import ModelFiles, Run
    from engines.source import Source
    from mmdit.artifact import Manifest


def build(source: "Source", folder: Path, job: "Build") -> dict[str, Any]:
    """Build a plan on this machine's GPU, in a child process."""
    from engines.tensorrt.plan_from_onnx import plan_in_child

    return plan_in_child(source, folder, job)


def open(folder: Path, manifest: "Manifest") -> "AbstractContextManager[Run]":
    """Run a plan on this machine's GPU."""
    from engines.tensorrt.plan_runner import plan_runner

    return plan_runner(folder, manifest)


def check(found: "Sequence[Source]", job: "Build") -> dict[str, dict[str, Any]]:
    """Check the graphs, the profiles and the memory; print how to go on where no plan can be built."""
    from engines.tensorrt.preparation import prepare

    return prepare(found, job)


def triton_config(
    configs: Mapping[str, Any], folders: Mapping[str, Mapping[str, Path]], model: str
) -> "ModelFiles":
    """Plans by compute capability, one execution context for each profile, CUDA graphs."""
    from engines.tensorrt.model_files import model_files

    return model_files(configs, folders, model)


def loadable(
    repository: Path, manifest: "Manifest", version: Callable[[], str]
) -> tuple[list[str], dict[str, str]]:
    """The GPU that the plans were built for, Triton's CUDA memory pool, and version compatibility."""
    from engines.tensorrt.server_settings import server_settings

    return server_settings(repository, manifest, version)
