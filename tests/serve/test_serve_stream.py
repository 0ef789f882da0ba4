"""Pictures streamed from a real Triton server: reports, previews, time-outs, cancelling."""

import gc
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from engine_runs import executions
from skimage.metrics import peak_signal_noise_ratio

from mmdit.errors import ServerError
from quality.metrics import similarity
from serve.client import Picture, Progress

SCENE = "a large red circle on the left and a small blue cross on the right on a white background"


def raw_stream(server, tensors, **options):
    """The responses of one request, (tensors by name, error) each, that the client library would not send."""
    inputs = []
    for name, (kind, values) in tensors.items():
        inputs.append(triton.InferInput(name, values.shape, kind))
        inputs[-1].set_data_from_numpy(values)
    answers = queue.Queue()
    with triton.InferenceServerClient(f"localhost:{server.ports.grpc}") as connection:
        connection.start_stream(lambda result, error: answers.put((result, error)))
        connection.async_stream_infer("text_to_image_stream", inputs, **options)
        connection.stop_stream()  # waits for the answers
    return [answers.get_nowait() for _ in range(answers.qsize())]


def prompt(steps):
    return {
        "prompt": ("BYTES", np.array([b"a circle"], np.object_)),
        "steps": ("INT32", np.array([steps], np.int32)),
    }


def test_a_stream_tells_each_step_and_ends_with_the_same_picture(client):
    """Progress for every step, falling sigmas, then what `generate` gives."""
    updates = list(client.stream("a circle", seed=3, steps=5))
    steps = [(update.step, update.steps) for update in updates[:-1]]
    assert steps == [(step, 5) for step in range(1, 6)]
    sigmas = [update.sigma for update in updates[:-1]]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == 0
    np.testing.assert_array_equal(updates[-1].image, client.generate("a circle", seed=3, steps=5).image)
    assert updates[-1].seed == 3


def test_a_stream_reports_in_segments(client):
    """Every third step of seven: 3, 6, 7; without previews there are none."""
    updates = list(client.stream("a circle", steps=7, progress_every=3))
    assert [update.step for update in updates if isinstance(update, Progress)] == [3, 6, 7]
    assert all(update.preview is None for update in updates[:-1])
    assert isinstance(updates[-1], Picture)


def test_previews_come_at_a_rhythm_of_their_own(client):
    """At every second step, between the reports of every third; the last step has the picture instead."""
    *updates, picture = client.stream("a circle", steps=6, progress_every=3, preview_every=2)
    previews = {update.step: update.preview for update in updates}
    assert [step for step, preview in previews.items() if preview is not None] == [2, 4]
    assert list(previews) == [2, 3, 4, 6]
    assert all(preview is None or preview.shape == (16, 16, 3) for preview in previews.values())
    assert picture.image.shape == (128, 128, 3)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (80, 112)])
def test_previews_show_what_the_picture_will_be(client, height, width):
    """From half of the steps on: correlated with the picture's block means by over 0.7.

    Measured with three seeds: 0.78 to 0.91 at these sizes, 0.69 to 0.87 in the first half.

    The same noise, given as latents, has the same previews.
    """
    from serve.inside.noise import noise_from_seed

    size = {"height": height, "width": width, "steps": 12, "preview_every": 1}
    *updates, picture = client.stream(SCENE, seed=4, **size)
    assert [update.preview is None for update in updates] == [False] * 11 + [True]
    means = picture.image.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    alike = [np.corrcoef(update.preview.ravel(), means.ravel())[0, 1] for update in updates[:-1]]
    print(" ".join(f"{each:.2f}" for each in alike))
    assert min(alike[5:]) >= 0.7

    latents = noise_from_seed(4, (16, height // 8, width // 8))
    del size["height"], size["width"]
    again = next(client.stream(SCENE, latents=latents, **size))
    np.testing.assert_array_equal(again.preview, updates[0].preview)


def test_previews_by_the_vae_are_pictures_and_near_the_last(client):
    """Half-way SSIM above 0.85 (measured: 0.94), and the picture itself is the one without previews."""
    request = {"seed": 4, "steps": 12}
    *updates, picture = client.stream(SCENE, preview_every=6, preview_with_vae=True, **request)
    (preview,) = [update.preview for update in updates if update.preview is not None]
    found = similarity(preview, picture.image)
    print(f"SSIM {found:.3f}, PSNR {peak_signal_noise_ratio(picture.image, preview):.1f} dB")
    assert found >= 0.85
    np.testing.assert_array_equal(picture.image, client.generate(SCENE, **request).image)


def test_a_preview_by_projection_runs_no_engine(server, client):
    """The VAE decodes one picture, the last."""
    before = executions(server, "vae_decoder")
    list(client.stream("a circle", steps=6, preview_every=1))
    assert executions(server, "vae_decoder") - before == 1


def test_guidance_in_a_part_of_the_steps_is_passed_on(client):
    """The same picture as unary, and another than with guidance in all."""
    request = {"seed": 2, "steps": 6}
    part = {"guidance_start": 0.2, "guidance_end": 0.7}
    *_, streamed = client.stream(SCENE, **request, **part)
    np.testing.assert_array_equal(streamed.image, client.generate(SCENE, **request, **part).image)
    assert (streamed.image != client.generate(SCENE, **request).image).any()


def test_leaving_a_stream_cancels_the_request(server, client):
    """The engine rests soon after the client has left."""
    stream = client.stream("a circle", steps=200, seed=1)
    assert next(stream).step == 1
    stream.close()
    time.sleep(1)
    before = executions(server, "mmdit")
    time.sleep(1)
    assert executions(server, "mmdit") == before


def test_a_stream_ends_when_its_time_out_has_passed(server):
    """With the seconds and the step, before it is half done; the loop works for it no longer."""
    began = time.monotonic()
    *_, (_, error) = raw_stream(server, prompt(200), timeout=1_000_000)
    assert time.monotonic() - began < 3
    assert "time-out of 1 seconds has passed before step" in error.message()
    assert error.message().endswith("of 200")
    before = executions(server, "mmdit")
    time.sleep(0.5)
    assert executions(server, "mmdit") == before


def test_a_stream_that_is_in_time_ends_with_its_picture(server):
    """A time-out that does not pass changes nothing; neither does a priority."""
    answers = raw_stream(server, prompt(2), timeout=60_000_000, parameters={"priority_level": 1})
    assert [error for _, error in answers] == [None] * 2
    assert answers[-1][0].as_numpy("image").shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("name", "value"), [("progress_every", 0), ("progress_every", -1), ("preview_every", -2)]
)
def test_a_bad_rhythm_is_refused_before_an_engine_runs(server, client, name, value):
    """The error names it; not even the text is encoded."""
    counted = [executions(server, model) for model in ("t5", "mmdit")]
    with pytest.raises(ServerError, match=f"{name} is {value}: expected 1 or more"):
        list(client.stream(f"a new prompt for {name} {value}", steps=2, **{name: value}))
    assert [executions(server, model) for model in ("t5", "mmdit")] == counted


def test_a_bad_priority_is_refused_before_an_engine_runs(server):
    """In a stream as in a unary request."""
    before = executions(server, "mmdit")
    ((_, error),) = raw_stream(server, prompt(2), parameters={"priority_level": 9})
    assert "priority_level is 9: expected 1 (first), 2 or 3" in error.message()
    assert executions(server, "mmdit") == before


def test_streams_and_unary_requests_share_the_loop(client):
    """A stream's picture does not depend on what else is in flight."""
    expected = client.generate("a circle", seed=9, steps=6).image
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(client.generate, "other", seed=seed, steps=9) for seed in range(3)]
        *_, streamed = client.stream("a circle", seed=9, steps=6)
        for other in others:
            other.result()
    assert np.mean(np.abs(streamed.image.astype(int) - expected.astype(int)) <= 2) >= 0.999


def test_abandoned_clients_leave_no_threads(client):
    """A stream that is left early ends its reader."""
    before = threading.active_count()
    for _ in range(3):
        stream = client.stream("a circle", steps=20)
        next(stream)
        stream.close()
    gc.collect()
    time.sleep(0.5)
    assert threading.active_count() <= before + 1
