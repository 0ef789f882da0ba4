"""What several tests share: the miniature, its exported files, packaged repositories, a real server."""

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdit import artifact, target
from mmdit.artifact import Layout
from mmdit.contract import Precision
from mmdit.errors import run_command
from mmdit.family import Family, family_from_checkpoint
from mmdit.shapes import shape_set

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = {"server", "fp16_repository", "fp8_repository"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a server, or a repository for one, is slow; other slow tests are marked where they stand."""
    for item in items:
        if SLOW & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the miniature's checkpoint."""
    from export.checkpoint import MINIATURE

    folder = tmp_path_factory.mktemp("checkpoint") / "miniature"
    shutil.copytree(MINIATURE, folder)
    return folder


@pytest.fixture(scope="session")
def calibration() -> dict[str, int]:
    """How much `build` was calibrated: enough for the arithmetic, and seconds."""
    return {"prompts": 8, "steps": 4, "batch": 8}


@pytest.fixture(scope="session")
def scan() -> dict[str, int]:
    """How much `build` was scanned for overflow: enough to see every operation."""
    return {"prompts": 1, "steps": 2}


@pytest.fixture(scope="session")
def build(
    miniature: Path,
    scan: dict[str, int],
    calibration: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Layout:
    """The miniature's artifacts: a short scan, FP16 ONNX files, a short calibration, the FP8 MMDiT."""
    from export.stages import Export

    export = Export(str(miniature), tmp_path_factory.mktemp("build"))
    export.onnx(**scan)
    export.fp8(**calibration)
    return export.layout


def _repository(build: Layout, miniature: Path, precision: Precision) -> Path:
    from engines.__main__ import main
    from serve.engine_set import Engines
    from serve.repository import package

    folder = build.root.parent
    main(
        ["build", "--model", str(miniature), "--build", str(folder), "--target", "cpu"]
        + ["--precision", precision.value]
    )
    repository = build.repository("cpu", precision)
    package([Engines(build, "cpu", precision)], repository, accept_quality=True)
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
    from serve.launcher import running
    from serve.ports import Ports

    log = tmp_path_factory.mktemp("triton") / "server.log"
    with running(fp16_repository, Ports.free(), log) as running_server:
        yield running_server


@pytest.fixture(scope="session")
def client(server):
    """A client of the server."""
    from serve.client import Client

    with Client(f"localhost:{server.ports.grpc}") as connected:
        yield connected


@pytest.fixture(scope="session")
def denoising(miniature):
    """(timestep, height, width) to the MMDiT's inputs there, by name: two rows of one request with guidance.

    A scene's own latent with noise on it, and the encoders' answers to "" and to its caption: what a trained
    model meets. On random numbers it is far from anything that it, or a calibration, has seen.
    """
    import export.quiet  # noqa: F401  isort: skip
    import torch
    from diffusers import StableDiffusion3Pipeline

    from miniature.grammar import caption
    from miniature.scenes import Object, Scene, draw

    scene = Scene(
        "white", (Object("red", "circle", "large", "left"), Object("blue", "cross", "small", "right"))
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(miniature, dtype=torch.float32)
    with torch.no_grad():
        texts = pipeline.encode_prompt(caption(scene), None, None, negative_prompt="")
    context, pooled = torch.cat([texts[1], texts[0]]), torch.cat([texts[3], texts[2]])

    @torch.no_grad()
    def inputs(timestep: float, height: int, width: int) -> dict[str, np.ndarray]:
        picture = torch.from_numpy(draw(scene, height, width)).permute(2, 0, 1)[None] / 127.5 - 1
        vae = pipeline.vae
        latent = (
            vae.encode(picture).latent_dist.mode() - vae.config.shift_factor
        ) * vae.config.scaling_factor
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(int(timestep)))
        sigma = timestep / 1000
        return {
            "latent": (sigma * noise + (1 - sigma) * latent).expand(2, -1, -1, -1).half().numpy(),
            "timestep": np.full((2, 1), timestep, np.float32),
            "context": context.half().numpy(),
            "pooled": pooled.half().numpy(),
        }

    return inputs


@pytest.fixture
def tiny_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five tiny ONNX artifacts, and the MMDiT in FP8 too, in a build folder; no GPU is found."""
    from tiny_model import save_tiny_model

    monkeypatch.setattr(artifact, "_HASHES", tmp_path / "build" / ".sha256.json")
    monkeypatch.setattr(target, "find_gpu", lambda: None)
    (tmp_path / "build").mkdir()
    save_tiny_model(tmp_path / "build")
    return tmp_path / "build"


@pytest.fixture(scope="module")
def ranges(build) -> dict[str, float]:
    """The miniature's calibrated ranges."""
    from export.calibration import CALIBRATION_FILE, Calibration

    return Calibration.model_validate_json((build.calibration / CALIBRATION_FILE).read_text()).amax


@pytest.fixture(scope="module")
def quantized(miniature) -> Callable:
    """Ranges, and a type, to the module with ModelOpt's fake quantization."""
    import export.quiet  # noqa: F401  isort: skip
    import torch

    from export.checkpoint import linears
    from export.fp8_from_calibration import quantized_module
    from export.policy import AttentionPrecision, read_policy
    from export.remedies import Remedies

    decisions = read_policy().decide(linears(miniature))

    def module(ranges: dict[str, float], dtype: torch.dtype = torch.float16) -> torch.nn.Module:
        return quantized_module(miniature, decisions, AttentionPrecision.FP16, Remedies(), ranges, dtype)

    return module


@pytest.fixture(scope="module")
def fake_quantized(quantized, ranges):
    """ModelOpt's module in FP32, so that its own rounding to FP16 is no part of a comparison."""
    import torch

    return quantized(ranges, torch.float32)


@pytest.fixture
def run_export(monkeypatch, capfd) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; gives its exit status and what it wrote on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        from export.__main__ import main

        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_status:
            run_command(main)
        return int(exit_status.value.code or 0), capfd.readouterr().err

    return run


@pytest.fixture(scope="module")
def one_thread():
    """The miniature's tensors are so small that two threads wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def large(miniature: Path) -> Family:
    """A family with SD3.5 Large's sizes."""
    sizes = {
        **{"name": "large", "variant": "large", "layers": 38, "clip_l_dim": 768, "clip_l_pooled": 768},
        **{"clip_g_dim": 1280, "clip_g_pooled": 1280, "t5_dim": 4096, "context_dim": 4096},
        **{"pooled_dim": 2048, "max_latent": 384, "default_size": 1024},
    }
    return family_from_checkpoint(miniature).model_copy(update=sizes)


@pytest.fixture
def hopper(large: Family, tmp_path: Path) -> Layout:
    """SD3.5 Large's engines for Hopper."""
    from stand_in_plans import write_engines

    layout = Layout("large", tmp_path)
    write_engines(layout, large, shape_set(large, "square-1024"))
    return layout
