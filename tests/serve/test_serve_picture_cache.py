"""Whole pictures from the response cache, as a packaging option; where the cache lies."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from stand_in_plans import packaged

from mmdit.artifact import read_manifest
from mmdit.contract import Precision
from mmdit.errors import RepositoryError, ServerError
from serve import model_config, repository
from serve.engine_set import Engines
from serve.installation import Installation
from serve.launcher import running
from serve.ports import Ports
from serve.repository import package
from serve.response_cache import ResponseCache


@pytest.fixture(scope="module")
def cached(build, fp16_repository, tmp_path_factory):
    """A connection to a server that keeps whole pictures."""
    folder = tmp_path_factory.mktemp("cached") / "repository"
    package([Engines(build, "cpu", Precision.FP16)], folder, cache_pictures=True)
    with (
        running(folder, Ports.free(), folder.parent / "server.log") as server,
        triton.InferenceServerClient(f"localhost:{server.ports.grpc}") as client,
    ):
        yield client


def ask(client, *, timeout: int | None = None, **values: int):
    """A picture of a circle in two steps, and how many rows the MMDiT ran for it."""
    before = rows(client)
    inputs = [
        ("prompt", "BYTES", np.array([b"a circle"], object)),
        ("steps", "INT32", np.array([2], "int32")),
    ]
    inputs += [(name, "INT64", np.array([value], "int64")) for name, value in values.items()]
    tensors = []
    for name, dtype, array in inputs:
        tensors.append(triton.InferInput(name, [1], dtype))
        tensors[-1].set_data_from_numpy(array)
    image = client.infer("text_to_image", tensors, timeout=timeout).as_numpy("image")
    return image, rows(client) - before


def rows(client) -> int:
    return client.get_inference_statistics("mmdit").model_stats[0].inference_count


def test_the_same_request_is_answered_from_the_cache(cached):
    """Byte for byte, without a call of the MMDiT; a parameter, such as a time-out, is no part of it."""
    first, ran = ask(cached, seed=1)
    assert ran == 4  # two steps, with guidance
    for timeout in (None, 60_000_000):
        again, ran = ask(cached, seed=1, timeout=timeout)
        assert ran == 0
        assert np.array_equal(first, again)


def test_another_seed_is_another_picture(cached):
    first, _ = ask(cached, seed=2)
    other, ran = ask(cached, seed=3)
    assert ran == 4
    assert not np.array_equal(first, other)


def test_a_request_without_a_seed_is_refused(cached):
    """Else all of them would get the first one's picture. (Triton counts inputs and names none.)"""
    with pytest.raises(triton.InferenceServerException, match="at least one output is not set") as refused:
        ask(cached)
    assert "INVALID_ARGUMENT" in refused.value.status()


def test_the_option_is_part_of_the_repository(hopper, tmp_path):
    """In its manifest, so that it is packaged anew with it and without."""
    engines, output = [Engines(hopper, "hopper", Precision.FP8)], tmp_path / "repository"
    for wanted in (True, False):
        reason = package(engines, output, accept_quality=True, cache_pictures=wanted)
        assert wanted or "cache_pictures" in str(reason)
        assert read_manifest(output).settings["cache_pictures"] == wanted
        for name in ("text_to_image", "text_to_image_stream", "denoiser"):
            config = model_config.written(output / name / "config.pbtxt")
            kept = wanted and name == "text_to_image"
            assert config.response_cache.enable == kept
            (seed,) = (tensor for tensor in config.input if tensor.name == "seed")
            assert seed.optional != kept


def test_a_policy_that_caches_pictures_of_any_seed_is_refused(hopper, tmp_path, monkeypatch):
    """A `response_cache` written by hand leaves the seed optional."""
    policies = tmp_path / "model_repository"
    shutil.copytree(repository.POLICIES, policies)
    (policies / "text_to_image/config.pbtxt").write_text("response_cache { enable: true }")
    monkeypatch.setattr(repository, "POLICIES", policies)
    with pytest.raises(RepositoryError, match="--cache-pictures"):
        packaged(hopper)


def installation(folder: Path, *libraries: str) -> Installation:
    """One with these caches."""
    for name in libraries:
        (folder / name).mkdir()
        (folder / name / f"libtritoncache_{name}.so").touch()
    return Installation(["tritonserver"], {}, folder, folder)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("local", ["local,size=268435456"]),
        ("local:1024", ["local,size=1073741824"]),
        (
            "redis://cache.example:6380",
            [
                *("redis,host=cache.example", "redis,port=6380"),
                *("redis,connect_timeout=1000", "redis,socket_timeout=1000"),
            ],
        ),
    ],
)
def test_a_cache_becomes_tritons_options(tmp_path, text, options):
    """The size in bytes; a Redis that does not answer does not hold up requests."""
    found = ResponseCache.parse(text).options(installation(tmp_path, "local", "redis"))
    assert found == [f"--cache-config={option}" for option in options]


def test_redis_without_a_port_has_its_usual_one():
    assert ResponseCache.parse("redis://redis").redis == ("redis", 6379)


def test_redis_is_refused_where_triton_has_no_library_for_it(tmp_path):
    """As the wheel: with the container that has one."""
    with pytest.raises(ServerError, match=r"no Redis cache .*libtritoncache_redis\.so.* container, nvcr"):
        ResponseCache.parse("redis://redis").options(installation(tmp_path, "local"))


@pytest.mark.parametrize(
    "text",
    ["", "locally", "local:", "local:0", "local:1g", "redis", "redis://", "redis://host:port", "redis://a/1"]
    + ["redis://user:secret@host:6379", "http://host"],
)
def test_an_unknown_cache_is_refused(text):
    """With what is known; a password would stand on a command line."""
    with pytest.raises(ServerError, match=r"local:MIB or redis://HOST:PORT.*TRITONCACHE_REDIS_PASSWORD"):
        ResponseCache.parse(text)
