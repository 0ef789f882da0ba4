"""What several tests share: the miniature's checkpoint, and the build folder of its exported files."""

from pathlib import Path

import pytest

from mmdit.artifact import Layout

CALIBRATION = {"prompts": 8, "steps": 4, "batch": 8}  # enough for the arithmetic, and seconds


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's checkpoint."""
    from miniature.checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "miniature"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def build(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The miniature's exported artifacts: FP16 ONNX files, a short calibration, the FP8 MMDiT."""
    from export.__main__ import Export

    export = Export(str(miniature), tmp_path_factory.mktemp("build"))
    export.onnx()
    export.fp8(**CALIBRATION)
    return export.layout
