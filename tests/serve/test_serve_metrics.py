"""The metrics of the denoise loop and of streams: what is added up, and what a real server publishes."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from prometheus_scrape import scrape, value
from stand_in_engine import Engine, request
from triton_requests import tensors

from mmdit.errors import ServerError
from serve.inside.errors import Cancelled, Expired, Full, RequestError
from serve.inside.limits import Limits
from serve.inside.metrics import (
    DURATION,
    ENDED,
    MOST_SIZES,
    OTHER_SIZES,
    REQUESTS,
    STEPS,
    LoopMetrics,
    Readings,
    outcome_of,
    row_buckets,
)
from serve.inside.schedule import StepScheduler

PUBLISHED = 2.5  # seconds after which what has happened is in the scrape; it is published every second


def limits(sizes: tuple[tuple[int, int], ...] = ()) -> Limits:
    """Of which the metrics need the sizes, their rows and the pixels of a latent."""
    others = dict.fromkeys(set(Limits.__dataclass_fields__), 0)
    ranges = (((8, 8), (512, 512), 8),)
    return Limits(**others | {"pixels_per_latent": 8, "ranges": ranges, "sizes": sizes})


def total(readings: Readings, family, **labels: str) -> float:
    return readings.totals.get((family, tuple(labels.items())), 0)


def test_the_scheduler_tells_of_each_step_and_row():
    """Three requests of four steps: twelve steps, and each step's two rows in some call."""
    metrics = LoopMetrics(limits())
    scheduler = StepScheduler(Engine(), 64, observer=metrics)
    for _ in range(3):
        scheduler.submit(request(size=(4, 6), steps=4))
    while scheduler.step():
        pass
    readings = metrics.read(scheduler.held())
    assert total(readings, STEPS, size="32x48") == 12
    assert [rows for (family, _), rows in readings.observed if family.name == "denoiser_call_rows"] == [6] * 4
    assert total(readings, ENDED, outcome="finished") == 3
    assert [each for each in readings.observed if each[0][0] is DURATION and each[1] >= 0]
    assert metrics.read(scheduler.held()).observed == []


def test_every_request_ends_with_one_outcome():
    def broken(latent):
        raise RuntimeError("the engine is broken")

    metrics = LoopMetrics(limits())
    scheduler = StepScheduler(Engine(broken), 3, observer=metrics)
    scheduler.submit(request())
    scheduler.submit(request(is_cancelled=lambda: True))
    scheduler.submit(request(deadline=time.monotonic_ns()))
    with pytest.raises(Full):
        scheduler.submit(request())
    scheduler.poll_cancellations()
    scheduler.step()
    readings = metrics.read(scheduler.held())
    counted = {
        dict(labels)["outcome"]: n for (family, labels), n in readings.totals.items() if family is ENDED
    }
    assert counted == dict.fromkeys(("failed", "cancelled", "expired", "refused"), 1) | {
        "finished": 0,
        "invalid": 0,
    }


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "finished"),
        (Cancelled(), "cancelled"),
        (Expired(), "expired"),
        (Full(), "refused"),
        (RequestError(), "invalid"),
        (ArithmeticError(), "failed"),
    ],
)
def test_an_outcome_follows_from_the_error(error, outcome):
    assert outcome_of(error) == outcome


def test_a_picture_made_step_by_step_is_one_request():
    """A stream asks for one step after the other; only the last finishes, after the whole time."""
    metrics = LoopMetrics(limits())
    scheduler = StepScheduler(Engine(), 64, observer=metrics)
    arrival = time.monotonic_ns() - 5 * 10**9
    for step in range(3):
        segment = request(steps=3, arrival=arrival)
        segment.state.step, segment.state.end = step, step + 1
        scheduler.submit(segment)
        scheduler.step()
    readings = metrics.read({})
    assert total(readings, STEPS, size="32x32") == 3
    assert total(readings, ENDED, outcome="finished") == 1
    assert [seconds for (family, _), seconds in readings.observed if family is DURATION] == pytest.approx(
        [5], abs=1
    )


def test_sizes_beyond_the_first_share_a_label():
    """However many sizes a shape set has."""
    metrics = LoopMetrics(limits())
    for height in range(1, 2 * MOST_SIZES):
        metrics.called([request(size=(height, 4))], 2, 0.0, 0.0, 0.0)
    readings = metrics.read({(1, 4): (1, 0), (100, 4): (0, 2), (101, 4): (0, 3)})
    sizes = {dict(labels)["size"] for family, labels in readings.totals if family is STEPS}
    assert len(sizes) == MOST_SIZES + 1
    assert total(readings, STEPS, size=OTHER_SIZES) == MOST_SIZES - 1
    assert readings.values[REQUESTS, (("size", OTHER_SIZES), ("state", "active"))] == 5
    assert readings.values[REQUESTS, (("size", "8x32"), ("state", "waiting"))] == 1


def test_a_size_that_nobody_asks_for_any_more_has_no_requests():
    metrics = LoopMetrics(limits())
    metrics.read({(4, 4): (2, 1)})
    assert set(metrics.read({}).values.values()) == {0}


def test_listed_sizes_are_there_before_their_first_request():
    """To Prometheus, what a counter holds when it first appears did not happen."""
    readings = LoopMetrics(limits(sizes=((512, 512), (256, 512)))).read({})
    assert {labels for family, labels in readings.totals if family is STEPS} == {
        (("size", "512x512"),),
        (("size", "256x512"),),
    }


def test_buckets_end_with_the_most_rows():
    assert row_buckets([10, 2]) == (1, 2, 3, 4, 6, 8, 10)
    assert row_buckets([1]) == (1,)


def settled(server):
    time.sleep(PUBLISHED)
    return scrape(server.ports.metrics)


def test_a_server_counts_its_requests_steps_and_rows(server, client):
    """Three pictures of four steps with guidance and one of five without, two of them at once."""
    before = settled(server)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda seed: client.generate("a circle", steps=4, seed=seed), range(3)))
    client.generate("a circle", steps=5, guidance_scale=1.0)
    after = settled(server)

    def rose(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert rose("denoiser_steps_total", size="128x128") == 3 * 4 + 5
    assert rose("denoiser_call_rows_sum") == 2 * 3 * 4 + 5
    assert 4 + 5 <= rose("denoiser_call_rows_count") <= 3 * 4 + 5
    assert rose("denoiser_call_rows_bucket", le="1") == 5
    assert rose("denoiser_requests_ended_total", outcome="finished") == 4
    assert rose("denoiser_requests_ended_total") == 4
    assert rose("denoiser_request_seconds_count") == 4
    assert rose("denoiser_phase_seconds_total", phase="engine") > 0
    assert value(after, "denoiser_requests") == 0


def test_a_server_counts_how_requests_end(server, client, connection):
    """Malformed, expired, more than the loop holds, cancelled in it; a stream that its client leaves."""
    most = int(connection.get_model_config("denoiser").config.parameters["max_requests"].string_value)
    before = settled(server)
    with pytest.raises(ServerError, match="height is 100"):
        client.generate("a circle", height=100)
    with pytest.raises(ServerError, match="prompt has 9000 bytes"):
        client.generate("x" * 9000)
    with pytest.raises(triton.InferenceServerException):
        connection.infer("text_to_image", tensors(prompt="a circle", steps=200), timeout=300_000)
    assert len(list(client.stream("a circle", steps=3))) == 4
    for _ in client.stream("a circle", steps=30):
        break
    errors = flood(connection, most + 2)
    assert sum("try again later" in str(error) for error in errors) == 2
    after = settled(server)

    def rose(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert rose("denoiser_requests_ended_total", outcome="invalid") == 1
    assert rose("denoiser_requests_ended_total", outcome="expired") == 1
    assert rose("denoiser_requests_ended_total", outcome="finished") == 1
    assert rose("denoiser_requests_ended_total", outcome="refused") == 2
    assert rose("denoiser_requests_ended_total", outcome="cancelled") == most
    assert rose("denoiser_requests_ended_total", outcome="failed") == 0
    assert rose("text_encoder_requests_ended_total", outcome="invalid") == 1
    assert rose("text_encoder_requests_ended_total", outcome="finished") == 4
    assert rose("text_encoder_requests_ended_total") == 5
    assert rose("text_encoder_request_seconds_count") == 4
    assert value(after, "text_encoder_requests") == 0
    assert rose("text_to_image_stream_ended_total", outcome="finished") == 1
    assert rose("text_to_image_stream_ended_total", outcome="cancelled") == 1
    assert value(after, "denoiser_requests") == 0


@pytest.fixture
def connection(server):
    """A Triton client of the server."""
    with triton.InferenceServerClient(f"localhost:{server.ports.grpc}") as connected:
        yield connected


def flood(connection: triton.InferenceServerClient, count: int) -> list[Exception]:
    """Requests of more steps than there is time for, cancelled once all are answered or in the loop."""
    signature = connection.get_model_metadata("denoiser", as_json=True)
    dims = {each["name"]: [int(dim) for dim in each["shape"]] for each in signature["inputs"]}
    values = {name: np.zeros((2, *dims[name][1:]), np.float16) for name in ("context", "pooled")}
    inputs = tensors(**values, height=64, width=64, steps=200)
    errors: list[Exception] = []
    calls = [
        connection.async_infer("denoiser", inputs, lambda result, error: errors.append(error))
        for _ in range(count)
    ]
    deadline = time.monotonic() + 20
    while len(errors) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    for call in calls:
        call.cancel()
    return errors
