"""The client library: values to tensors, time-outs, tries, errors, PNG files."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from PIL import Image
from triton_requests import connect, rests, tensors
from tritonclient.grpc import model_config_pb2

from bench.server_usage import requests_in_the_loop
from mmdit.contract import Dtype, served_models
from mmdit.errors import DeadlineError, ServerError, UnavailableError
from mmdit.family import family_from_checkpoint
from serve.client import Client
from serve.model_config import ensemble_config
from serve.patience import Patience
from serve.request import ServedModel, converted


@pytest.fixture(scope="module")
def served(miniature):
    """Whether whole pictures are cached to what the ensemble's config tells a client."""
    family = family_from_checkpoint(miniature)

    def model(cache_pictures: bool = False) -> ServedModel:
        signature = served_models(family, cache_pictures=cache_pictures)["text_to_image"]
        config = model_config_pb2.ModelConfig(name="text_to_image")
        ensemble_config(config, signature, family, cache_pictures=cache_pictures)
        return ServedModel.from_config(config)

    return model


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (7, Dtype.INT64, [7]),
        (np.uint8(7), Dtype.INT32, [7]),
        (3, Dtype.FP32, [3.0]),
        (1e300, Dtype.FP32, [np.inf]),  # which the server refuses by its name
        (True, Dtype.BOOL, [True]),
        ([[1, 2]], Dtype.FP32, [[1, 2]]),
        ("ü", Dtype.BYTES, [b"\xc3\xbc"]),
        (b"\xff\0", Dtype.BYTES, [b"\xff\0"]),
        ("", Dtype.BYTES, [b""]),
    ],
)
def test_a_value_becomes_a_tensor_of_the_inputs_dtype(value, dtype, expected):
    array = converted("x", value, dtype)
    assert array.dtype == dtype.numpy
    assert array.tolist() == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 2**70}, "seed is 1180591620717411303424: expected INT64"),
        ({"seed": np.uint64(2**63)}, "seed is .*: expected INT64"),
        ({"steps": 2.9}, "steps is 2.9: expected INT32"),
        ({"steps": 2**40}, "steps is 1099511627776: expected INT32"),
        ({"guidance_scale": "much"}, "guidance_scale is 'much': expected FP32"),
        ({"prompt": "a\udcff"}, "prompt is 'a.*: expected BYTES"),
        ({"prompt": 3}, "prompt is 3: expected BYTES"),
        ({"latents": [[1], [2, 3]]}, "latents is .*: expected FP32"),
        ({"latents": np.zeros((16, 8, 8), complex)}, r"latents is complex128 \[16, 8, 8\]: expected FP32"),
        ({"sed": 1}, "text_to_image has no input sed: expected guidance_end, guidance_scale"),
    ],
)
def test_a_value_that_the_input_cannot_take_is_named(served, given, message):
    with pytest.raises(ServerError, match=message):
        served().message({"prompt": "a circle"} | given)


def test_what_is_none_is_left_to_the_model_and_told_with_its_default(served):
    values = {"prompt": "a circle", "steps": None, "guidance_scale": 3.0}
    assert [tensor.name for tensor in served().message(values).inputs] == ["prompt", "guidance_scale"]
    assert served().told(values) == {
        **{"model": "miniature", "steps": 20},
        **{"prompt": "a circle", "guidance_scale": 3.0},
    }


def test_a_model_that_caches_pictures_gets_another_seed_each_time_unless_one_is_given(served):
    """Without one, every unseeded client would get the same picture."""

    def seed(values):
        message = served(cache_pictures=True).message(values)
        (number,) = [i for i, tensor in enumerate(message.inputs) if tensor.name == "seed"]
        return int.from_bytes(message.raw_input_contents[number], "little", signed=True)

    drawn = {seed({"prompt": "a circle"}) for _ in range(4)}
    assert len(drawn) == 4 and min(drawn) >= 0
    assert seed({"prompt": "a circle", "seed": 7}) == 7
    assert "seed" not in {tensor.name for tensor in served().message({"prompt": "a circle"}).inputs}


def test_a_request_without_its_prompt_is_refused_before_it_is_sent(served):
    """Triton's own words would be of numbers of inputs."""
    with pytest.raises(ServerError, match="^prompt is missing: text_to_image needs it"):
        served().message({"prompt": None, "steps": 4})


def test_time_out_and_priority_go_as_parameters_in_microseconds_and_levels(served):
    message = served().message({"prompt": "a circle"}, seconds=1.5, priority_level=1)
    assert {name: value.int64_param for name, value in message.parameters.items()} == {
        "timeout": 1_500_000,
        "priority_level": 1,
    }
    assert not served().message({"prompt": "a circle"}).parameters


@pytest.mark.parametrize("level", ["1", 1.5, True])
def test_a_priority_level_is_a_whole_number(served, level):
    with pytest.raises(ServerError, match="priority_level is .*: expected 1, 2 or 3"):
        served().message({"prompt": "a circle"}, priority_level=level)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeout": 0}, "timeout is 0: expected seconds above 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"retries": -1}, "retries is -1: expected 0 or more"),
    ],
)
def test_a_time_out_or_a_number_of_tries_that_means_nothing_is_refused(given, message):
    with Client("localhost:9") as lonely, pytest.raises(ServerError, match=message):
        lonely.generate("a circle", **given)


def test_pauses_double_and_differ_by_chance_until_no_try_is_left():
    """Up to 16 seconds, of which at least a half."""
    for longest in (8, 1):  # two clients
        patience = Patience("server", retries=longest)
        pauses = [patience.pause(UnavailableError("full")) for _ in range(longest)]
        for pause, most in zip(pauses, (0.5, 1, 2, 4, 8, 16, 16, 16), strict=False):
            assert most / 2 <= pause <= most
        with pytest.raises(UnavailableError, match="full"):
            patience.pause(UnavailableError("full"))


def test_a_pause_that_would_outlast_the_time_out_is_not_made():
    with pytest.raises(UnavailableError, match="full"):
        Patience("server", timeout=0.2, retries=3).pause(UnavailableError("full"))


def test_only_a_refusal_is_tried_again():
    with pytest.raises(ServerError, match="height is 120"):
        Patience("server", retries=3).pause(ServerError("height is 120"))


def test_when_the_time_has_passed_nothing_more_is_asked():
    patience = Patience("server", timeout=0.01)
    time.sleep(0.02)
    with pytest.raises(DeadlineError, match="server has not answered within 0.01 seconds"):
        _ = patience.seconds


class Failed(grpc.RpcError):
    """What gRPC raises, without a call."""

    def __init__(self, code, details="why"):
        self.code, self.details = lambda: code, lambda: details


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.CANCELLED, ServerError),
        (grpc.StatusCode.INVALID_ARGUMENT, ServerError),
        (grpc.StatusCode.NOT_FOUND, ServerError),
    ],
)
def test_an_error_is_of_the_kind_that_says_what_to_do(code, kind):
    assert type(Patience("server", timeout=5).error(Failed(code))) is kind


def test_a_server_that_is_drained_may_be_asked_again():
    """Or another one of its kind."""
    drained = Failed(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'x' has no available versions")
    assert type(Patience("server", timeout=5).error(drained)) is UnavailableError


@pytest.mark.parametrize(
    ("message", "kind", "told"),
    [
        ("64 requests are held [Full]", UnavailableError, "64 requests are held"),
        ("the time-out has passed [Expired]", DeadlineError, "the time-out has passed"),
        ("steps is 0 [RequestError]", ServerError, "steps is 0"),
        ("'x' has no available versions", UnavailableError, "'x' has no available versions"),
        ("an overflow [sic]", ServerError, "an overflow [sic]"),
    ],
)
def test_a_streams_error_is_of_the_kind_that_its_message_ends_with(message, kind, told):
    """Triton gives it no code."""
    error = Patience("server").stream_error(message)
    assert type(error) is kind
    assert str(error) == told


def test_a_request_that_the_server_ended_in_time_is_a_deadline_error():
    """Triton has no code for it but CANCELLED."""
    patience = Patience("server", timeout=0.01)
    time.sleep(0.02)
    assert type(patience.error(Failed(grpc.StatusCode.CANCELLED))) is DeadlineError


def test_no_server_is_said_in_a_sentence_and_may_be_tried_again():
    """With the command that starts one."""
    start = time.monotonic()
    with Client("localhost:9") as lonely, pytest.raises(UnavailableError, match="make serve"):
        lonely.generate("a circle", retries=1)
    assert time.monotonic() - start >= 0.25  # half of the first pause


def test_the_server_works_no_longer_than_the_time_out(server, client):
    """It says so itself, and the engine rests."""
    start = time.monotonic()
    with pytest.raises(DeadlineError, match="time-out has passed before step"):
        client.generate("a circle", steps=200, timeout=1)
    assert time.monotonic() - start < 2
    assert rests(server, within=2)


def test_a_stream_ends_when_its_time_has_passed(client):
    """In the server's words, which come before the client has lost its own patience."""
    start = time.monotonic()
    with pytest.raises(DeadlineError, match="time-out of .* has passed before step"):
        list(client.stream("a circle", steps=200, timeout=0.5))
    assert time.monotonic() - start < 1.5


def test_a_refused_request_is_tried_again_until_there_is_room(server, client, monkeypatch):
    """The denoiser holds 64 requests; these leave it when they are cancelled, after the first refusal."""
    refused, pause = threading.Event(), Patience.pause
    text = {"context": np.zeros((1, 333, 192), np.float16), "pooled": np.zeros((1, 160), np.float16)}
    settings = {"steps": 200, "height": 64, "width": 64, "guidance_scale": np.zeros(1, np.float32)}
    held = tensors(**text, **settings)
    with connect(server) as connection, ThreadPoolExecutor(1) as thread:
        calls = [connection.async_infer("denoiser", held, lambda **_: None) for _ in range(64)]
        begin = time.monotonic()
        while requests_in_the_loop(server) < 64:  # published every second
            assert time.monotonic() - begin < 10
        with pytest.raises(UnavailableError, match="64 requests are being denoised already"):
            client.generate("a circle", steps=1)
        monkeypatch.setattr(Patience, "pause", lambda *given: (refused.set(), pause(*given))[1])
        waiting = thread.submit(client.generate, "a circle", steps=1, seed=7, retries=8)
        assert refused.wait(30)
        for call in calls:
            call.cancel()
        assert waiting.result().seed == 7


def test_a_priority_level_that_is_none_is_refused_by_the_server(client):
    with pytest.raises(ServerError, match="priority_level is 7: expected 1"):
        client.generate("a circle", steps=1, priority_level=7)
    assert client.generate("a circle", steps=1, seed=2, priority_level=1).seed == 2


def test_a_png_tells_what_made_it(client, tmp_path):
    """Model, prompt, seed and settings, given or by default, lie in the file's metadata."""
    picture = client.generate("ein Kreis 🙂", seed=4, steps=2, guidance_scale=3.0)
    picture.save(tmp_path / "pictures" / "circle.png")
    with Image.open(tmp_path / "pictures" / "circle.png") as saved:
        assert saved.text == {
            **{"model": "miniature", "prompt": "ein Kreis 🙂", "seed": "4", "steps": "2"},
            **{"guidance_scale": "3.0", "height": "128", "width": "128"},
        }
        np.testing.assert_array_equal(np.asarray(saved), picture.image)


def test_the_same_request_gives_the_same_file(client, tmp_path):
    """Byte for byte, metadata included."""
    for name in ("one.png", "two.png"):
        client.generate("a circle", steps=2, seed=4).save(tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
