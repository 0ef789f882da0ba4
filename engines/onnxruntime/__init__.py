"""ONNX Runtime: the ONNX file itself, run on the CPU, served as a Python model of Triton's."""

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
    """Copy the ONNX files, and run them at the bounds of every profile."""
    from engines.onnxruntime.onnxruntime_from_onnx import onnxruntime_from_onnx

    return onnxruntime_from_onnx(source, folder, job)


def open(folder: Path, manifest: "Manifest") -> "AbstractContextManager[Run]":
    """Run an ONNX file on the CPU."""
    from engines.onnxruntime.session import opened

    return opened(folder, manifest)


def check(found: "Sequence[Source]", job: "Build") -> dict[str, dict[str, Any]]:
    """Check each graph's inputs and outputs against the contract; there is nothing to record."""
    from engines.onnxruntime.onnxruntime_from_onnx import check_graphs

    check_graphs(found, job)
    return {}


def triton_config(
    configs: Mapping[str, Any], folders: Mapping[str, Mapping[str, Path]], model: str
) -> "ModelFiles":
    """A Python model with its ONNX files, on the CPU."""
    from engines.onnxruntime.model_files import model_files

    return model_files(configs, folders, model)


def loadable(
    repository: Path, manifest: "Manifest", version: Callable[[], str]
) -> tuple[list[str], dict[str, str]]:
    """Any machine loads an ONNX file: no options, no environment."""
    return [], {}
