"""Engines are warm before their server is ready: what the packager asks of Triton, and that it happens."""

import shutil
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from stand_in_plans import packaged, write_engines

from mmdit.artifact import Layout
from mmdit.contract import COMPONENTS, TEXT_ENCODERS, components, profiles
from mmdit.errors import ServerError
from mmdit.shapes import NAMES, ShapeSet, shape_set
from serve import model_config, repository
from serve.launcher import Server, running
from serve.ports import Ports

ROOT = Path(__file__).resolve().parents[2]


def samples(config) -> list[dict[str, tuple[int, ...]]]:
    """A config's warm-up calls as the shapes of their inputs, rows first."""
    return [
        {name: (sample.batch_size, *each.dims) for name, each in sample.inputs.items()}
        for sample in config.model_warmup
    ]


@pytest.fixture(params=NAMES)
def shapes(request, large) -> ShapeSet:
    return shape_set(large, request.param)


@pytest.fixture
def configs(shapes, large, tmp_path):
    """The engines' configs for TensorRT, with every shape set."""
    layout = Layout("large", tmp_path)
    write_engines(layout, large, shapes)
    folder = packaged(layout)
    return {name: model_config.written(folder / name / "config.pbtxt") for name in COMPONENTS}


def test_every_size_range_is_called_with_a_requests_rows_and_with_the_most(configs, shapes):
    """At its usual size, on zeros; ten calls at most, however many sizes are served."""
    found = [call["latent"] for call in samples(configs["mmdit"])]
    for each in shapes.ranges:
        height, width = (side // 8 for side in each.opt)
        assert {(2, 16, height, width), (each.max_rows, 16, height, width)} <= set(found)
    assert len(found) == len(set(found)) <= 10
    usual = {tuple(side // 8 for side in each.opt) for each in shapes.ranges}
    decoded = [call["latent"] for call in samples(configs["vae_decoder"])]
    assert sorted(decoded) == sorted((1, 16, *size) for size in usual)
    assert all(len(samples(configs[name])) == 1 for name in TEXT_ENCODERS)
    for config in configs.values():
        for sample in config.model_warmup:
            assert all(each.zero_data for each in sample.inputs.values())


def test_every_warm_up_call_is_one_that_a_profile_takes(configs, shapes, large):
    """All inputs, with their dtypes, within the bounds of one profile: else the server would not start."""
    for name, config in configs.items():
        tables = profiles(components(large, shapes)[name], shapes)
        types = {tensor.name: tensor.data_type for tensor in config.input}
        for sample in config.model_warmup:
            assert {key: each.data_type for key, each in sample.inputs.items()} == types
        for call in samples(config):
            assert any(
                all(
                    low <= side <= high
                    for key, (least, _, most) in table.items()
                    for low, side, high in zip(least, call[key], most, strict=True)
                )
                for table in tables
            ), f"{name}: {call}"


def test_an_operators_own_warm_up_is_kept(large, tmp_path, monkeypatch):
    """As it was written, and nothing beside it."""
    policies = tmp_path / "model_repository"
    shutil.copytree(ROOT / "model_repository", policies)
    with (policies / "t5/config.pbtxt").open("a") as file:
        file.write('model_warmup { name: "mine" batch_size: 0 }')
    monkeypatch.setattr(repository, "POLICIES", policies)
    layout = Layout("large", tmp_path)
    write_engines(layout, large, shape_set(large))
    config = model_config.written(packaged(layout) / "t5/config.pbtxt")
    assert [sample.name for sample in config.model_warmup] == ["mine"]


def test_a_ready_server_has_run_each_engine_and_cached_nothing(fp16_repository, tmp_path):
    """With ONNX Runtime each row is a call; a warm-up goes past the response cache."""
    with (
        running(fp16_repository, Ports.free(), tmp_path / "server.log") as server,
        triton.InferenceServerClient(f"localhost:{server.ports.grpc}") as client,
    ):
        for name in COMPONENTS:
            (counts,) = client.get_inference_statistics(name).model_stats
            assert counts.inference_count == (2 if name == "mmdit" else 1), name
            assert counts.inference_stats.cache_miss.count == 0


@pytest.mark.slow
def test_a_server_whose_warm_up_fails_is_never_ready(fp16_repository, tmp_path):
    """It ends, and the model is named with the reason."""
    broken = tmp_path / "repository"
    shutil.copytree(fp16_repository, broken)
    config = model_config.written(broken / "vae_decoder/config.pbtxt")
    config.model_warmup[0].inputs["latent"].dims[0] += 1  # channels
    (broken / "vae_decoder/config.pbtxt").write_text(model_config.to_text(config))
    server = Server(broken, Ports.free(), tmp_path / "server.log")
    try:
        with pytest.raises(ServerError, match="vae_decoder"):
            server.wait_until_ready()
    finally:
        server.stop()
