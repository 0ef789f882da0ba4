"""ONNX files as Triton serves them: a Python model on the CPU, beside its ONNX file and settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.intact import check_whole
from engines.runtimes import ModelFiles
from mmdit.artifact import read_manifest
from mmdit.contract import Precision

_MODEL = Path(__file__).with_name("triton_model.py")


def model_files(
    configs: Mapping[str, Any], folders: Mapping[str, Mapping[str, Path]], model: str
) -> ModelFiles:
    """Set backend and instances of each config; raises ArtifactError for an ONNX file that is damaged.

    The engines are of one target: an ONNX file is the same for all.
    """
    files: dict[str, dict[str, Path]] = {}
    settings = {}
    for name in folders:
        config = configs[name]
        ((target, folder),) = folders[name].items()
        manifest = read_manifest(folder)
        precision = manifest.settings["precision"]
        make = f"make engines MODEL={model} TARGET={target} PRECISION={precision}"
        check_whole(folder, manifest.files, {}, f"run `{make}` again")
        config.backend = "python"
        for group in config.instance_group:
            group.kind = type(group).KIND_CPU
        files[name] = {file: folder / file for file in manifest.files} | {"model.py": _MODEL}
        # ONNX Runtime's optimizations are wrong about FP8 Q/DQ: see session.py.
        fp8 = precision == Precision.FP8.value
        settings[name] = {"graph_optimization_level": "ORT_DISABLE_ALL" if fp8 else "ORT_ENABLE_ALL"}
    return ModelFiles(files, settings)
