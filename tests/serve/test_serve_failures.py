"""A step that fails or refuses ends its requests at once, with the reason, and the server goes on.

One server over a repository with short queues, whose models fail when they are told to.
"""

import contextlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from failing_repository import FAILURES, SLOW, FailingRepository
from triton_requests import KINDS, connect, executions, metric, picture, rests, tensors, until

from serve.client import Client
from serve.launcher import running
from serve.ports import Ports

SOON = 5.0  # seconds; measured: 0.05, on a machine that may pause
TEXT = ("clip_l", "clip_g", "t5", "prompt_encoder", "text_encoder")
MODELS = (*TEXT, "denoiser", "mmdit", "vae_decoder", "picture")
STEPS = ("text_encoder", "denoiser", "vae_decoder", "picture")
MAX_REQUESTS, MAX_STREAMS = 3, 2
numbers = itertools.count()


@pytest.fixture(scope="module")
def repository(fp16_repository, tmp_path_factory):
    """What the server serves."""
    copy = FailingRepository(fp16_repository, tmp_path_factory.mktemp("failing") / "repository")
    copy.set_parameter("denoiser", "max_requests", MAX_REQUESTS)
    copy.set_parameter("text_to_image_stream", "max_streams", MAX_STREAMS)
    return copy


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    """A real Triton server."""
    log = tmp_path_factory.mktemp("triton") / "server.log"
    with running(repository.folder, Ports.free(), log) as running_server:
        yield running_server


@pytest.fixture
def connection(server, repository):
    """A connection; whatever the test tells the models, they work in the next."""
    with connect(server) as client:
        yield client
    repository.recover()


def new_prompt():
    """A prompt that no encoder has seen, so that no answer comes from the cache."""
    return f"a circle, number {next(numbers)}"


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_that_fails_ends_its_request_at_once_with_the_reason(
    repository, connection, model, kind, failure
):
    """And when it works again, the same request is served by the same server."""
    request = {"prompt": new_prompt(), "steps": 2}
    repository.fail(model, failure)
    begin = time.monotonic()
    with pytest.raises(triton.InferenceServerException, match=f"{model} was told to fail") as caught:
        picture(connection, kind, **request)
    assert time.monotonic() - begin < SOON
    # The code comes through from a step of the ensemble; not from a model called over BLS, nor in a stream.
    if kind == "unary" and failure == "unavailable" and model in STEPS:
        assert caught.value.status() == str(grpc.StatusCode.UNAVAILABLE)
    repository.recover()
    assert picture(connection, kind, **request).shape == (128, 128, 3)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("model", MODELS)
def test_requests_that_a_failing_step_does_not_touch_are_served(
    repository, server, connection, model, failure
):
    """A known prompt needs no encoder; what is being denoised has its text, and is in the loop; while a step
    behind the text fails, text is encoded."""
    known = new_prompt()
    picture(connection, "unary", prompt=known, steps=1)

    def bystander():
        with connect(server) as another:
            if model in ("mmdit", "vae_decoder", "picture"):
                return another.infer("text_encoder", tensors(prompt=new_prompt())).as_numpy("context")
            return picture(another, "unary", prompt=known, steps=8)

    with ThreadPoolExecutor(1) as thread:
        before = executions(server)
        if model in ("text_encoder", "denoiser"):
            served = thread.submit(bystander)
            until(lambda: executions(server) > before)
            repository.fail(model, failure)
        else:
            repository.fail(model, failure)
            served = thread.submit(bystander)
        with pytest.raises(triton.InferenceServerException, match=f"{model} was told to fail"):
            picture(connection, "unary", prompt=new_prompt(), steps=1)
        assert served.result().any()


def test_a_part_of_an_answer_in_the_cache_does_no_harm(connection):
    """The cache's key knows nothing of the outputs that were asked for: who asks for one leaves it there."""
    prompt = new_prompt()
    given = tensors(prompt=prompt, generation=np.zeros(1, np.int64))
    for _ in range(2):
        part = connection.infer("prompt_encoder", given, outputs=[triton.InferRequestedOutput("pooled")])
        assert part.as_numpy("context") is None
    assert picture(connection, "unary", prompt=prompt, steps=1, guidance_scale=np.ones(1, np.float32)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_engine_ends_every_request_of_the_call(repository, server, connection, kind):
    """All that were on their way when it began to fail."""

    def ask(_):
        with connect(server) as another:
            with pytest.raises(triton.InferenceServerException, match="mmdit was told to fail"):
                picture(another, kind, prompt="a circle", steps=200)
            return time.monotonic()

    with ThreadPoolExecutor(MAX_STREAMS) as threads:
        before = executions(server)
        ends = threads.map(ask, range(MAX_STREAMS))
        until(lambda: executions(server) >= before + 3)
        repository.fail("mmdit", "exception")
        failed = time.monotonic()
        assert max(ends) - failed < SOON


@contextlib.contextmanager
def full_loop(server, connection):
    """As many requests in the denoiser as it takes, until the end of the block."""
    answer = connection.infer("text_encoder", tensors(prompt="a circle"))
    given = {name: answer.as_numpy(name) for name in ("context", "pooled")}
    inputs = tensors(**given, steps=200)
    before = executions(server)
    calls = [
        connection.async_infer("denoiser", inputs, lambda result, error: None) for _ in range(MAX_REQUESTS)
    ]
    try:
        until(lambda: executions(server) >= before + 2)
        yield
    finally:
        for call in calls:
            call.cancel()
        assert rests(server, SOON)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_loop_refuses_at_once(server, connection, kind):
    """UNAVAILABLE, which a client may try again; when there is room, it is served."""
    with full_loop(server, connection), connect(server) as another:
        begin = time.monotonic()
        with pytest.raises(triton.InferenceServerException, match="3 requests are being denoised") as caught:
            picture(another, kind, prompt="a circle", steps=1)
        assert time.monotonic() - begin < SOON
        assert kind == "stream" or caught.value.status() == str(grpc.StatusCode.UNAVAILABLE)
    assert picture(connection, kind, prompt="a circle", steps=1).any()


def test_a_stream_too_many_is_refused_at_once(server, connection):
    """The streams that are there go on; a place that is left is free at once."""
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(connect(server)) for _ in range(MAX_STREAMS)]
        before = executions(server)
        for other in others:
            other.start_stream(lambda result, error: None)
            other.async_stream_infer("text_to_image_stream", tensors(prompt="a circle", steps=200))
        until(lambda: executions(server) >= before + 2 * MAX_STREAMS)
        with pytest.raises(triton.InferenceServerException, match="2 pictures are being streamed already"):
            picture(connection, "stream", prompt="a circle", steps=1)
        for other in others:
            other.stop_stream(cancel_requests=True)
        assert rests(server, SOON)
    assert picture(connection, "stream", prompt="a circle", steps=1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_out_of_a_request_ends_its_work(server, connection, kind):
    """The client is told, and the engine rests: 200 steps take far longer than half a second."""
    begin = time.monotonic()
    with pytest.raises(triton.InferenceServerException, match="time-out .*has passed before step"):
        picture(connection, kind, prompt="a circle", steps=200, timeout=500_000)
    assert 0.4 < time.monotonic() - begin < SOON
    assert rests(server, SOON)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_within_its_time_out_is_served(connection, kind):
    assert picture(connection, kind, prompt="a circle", steps=2, timeout=60_000_000).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_out_passes_while_the_text_is_encoded(repository, server, connection, kind):
    """No step is made then; Triton would give the denoiser the whole time-out again."""
    repository.fail("t5", SLOW)
    before = executions(server)
    begin = time.monotonic()
    with pytest.raises(triton.InferenceServerException, match="time-out .*has passed before step"):
        picture(connection, kind, prompt=new_prompt(), guidance_scale=np.ones(1, np.float32), timeout=500_000)
    assert time.monotonic() - begin < SOON
    assert executions(server) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_out_passes_while_others_texts_are_encoded(repository, server, connection, kind):
    """Its own is not encoded then, and who was before it has a picture."""
    with ThreadPoolExecutor(1) as thread, connect(server) as another:
        repository.fail("t5", SLOW)
        before = executions(server, "clip_l")
        counted = metric(server, 'text_encoder_requests_ended_total{outcome="expired"}')
        alone = np.ones(1, np.float32)  # guidance, without which the prompt's is the only row
        first = thread.submit(picture, another, "unary", prompt=new_prompt(), steps=1, guidance_scale=alone)
        until(lambda: executions(server, "clip_l") > before)
        with pytest.raises(triton.InferenceServerException, match="time-out has passed before text_encoder"):
            begin = time.monotonic()
            picture(connection, kind, prompt=new_prompt(), timeout=300_000)
        assert time.monotonic() - begin < 0.9  # the first's text takes a second
        assert first.result().any()
    assert executions(server, "clip_l") == before + 1
    expired = 'text_encoder_requests_ended_total{outcome="expired"}'
    until(lambda: metric(server, expired) > counted, within=5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_priority_goes_first_to_the_text(repository, server, connection, kind):
    """While one text is encoded, for a second, two more come."""
    ended = []

    def ask(level: int) -> None:
        with Client(f"localhost:{server.ports.grpc}") as client:
            request = {"steps": 1, "guidance_scale": 1.0, "priority_level": level}
            if kind == "stream" and level != 2:  # which has so many places
                list(client.stream(new_prompt(), **request))
            else:
                client.generate(new_prompt(), **request)
            ended.append(level)

    repository.fail("t5", SLOW)
    with ThreadPoolExecutor(3) as threads:
        asked = []
        for level in (2, 3, 1):
            before = executions(server, "text_encoder")
            asked.append(threads.submit(ask, level))
            until(lambda before=before: executions(server, "text_encoder") > before)
        for each in asked:
            each.result()
    assert ended == [2, 1, 3]
