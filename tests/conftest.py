"""What several tests share: the miniature, its exported files, packaged repositories, a real server."""

from pathlib import Path

import pytest

from mmdit.artifact import Layout
from mmdit.contract import Precision


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's checkpoint."""
    from miniature.checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "miniature"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def calibration() -> dict[str, int]:
    """How much `build` was calibrated: enough for the arithmetic, and seconds."""
    return {"prompts": 8, "steps": 4, "batch": 8}


@pytest.fixture(scope="session")
def build(miniature: Path, calibration: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The miniature's exported artifacts: FP16 ONNX files, a short calibration, the FP8 MMDiT."""
    from export.__main__ import Export

    export = Export(str(miniature), tmp_path_factory.mktemp("build"))
    export.onnx()
    export.fp8(**calibration)
    return export.layout


def _repository(build: Layout, miniature: Path, precision: Precision) -> Path:
    from engines.__main__ import main
    from serve.repository import Engines, package

    folder = build.root.parent
    main(
        ["--model", str(miniature), "--build", str(folder), "--target", "cpu", "--precision", precision.value]
    )
    repository = build.repository("cpu", precision)
    package(Engines(build, "cpu", precision), "cpu", precision, repository)
    return repository


@pytest.fixture(scope="session")
def fp16_repository(build, miniature) -> Path:
    """The miniature's Triton repository with the FP16 MMDiT, for ONNX Runtime."""
    return _repository(build, miniature, Precision.FP16)


@pytest.fixture(scope="session")
def fp8_repository(build, miniature) -> Path:
    """The miniature's Triton repository with the FP8 MMDiT, for ONNX Runtime."""
    return _repository(build, miniature, Precision.FP8)


@pytest.fixture(scope="session")
def server(fp16_repository, tmp_path_factory):
    """A real Triton server over the FP16 repository, on free ports."""
    from serve.launcher import Ports, running

    log = tmp_path_factory.mktemp("triton") / "server.log"
    with running(fp16_repository, Ports.free(), log) as running_server:
        yield running_server


@pytest.fixture(scope="session")
def client(server):
    """A client of the server."""
    from serve.client import Client

    with Client(f"localhost:{server.ports.grpc}") as connected:
        yield connected
