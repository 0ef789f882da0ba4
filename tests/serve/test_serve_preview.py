"""Previews and reports of a stream, without a server: the predicted picture, what is told, and when."""

import json
import time

import numpy as np
import pytest

from serve.inside.denoise import sigmas_for
from serve.inside.errors import Expired, RequestError
from serve.inside.preview import PROJECTION, predicted, projected, read_projection
from serve.inside.reports import LOOK, Reports, TimeOut, passed_on

SIGMAS = sigmas_for(20, 3.0, 1000)


@pytest.mark.parametrize("step", [1, 2, 10, 19, 20])
def test_an_euler_step_towards_a_picture_predicts_that_picture(step):
    """A model that knows the picture has the velocity noise - picture; FP32 holds it to 1e-5."""
    random = np.random.default_rng(0)
    picture, noise = random.standard_normal((2, 16, 10, 14), np.float32)
    before, after = SIGMAS[step - 1], SIGMAS[step]
    latents = (1 - before) * picture + before * noise
    next_latents = latents + (after - before) * (noise - picture)
    np.testing.assert_allclose(
        predicted(latents, next_latents, before, after), picture, atol=1e-5 / abs(after - before)
    )


def test_the_last_step_predicts_its_own_latents():
    """At sigma 0 nothing is left to go."""
    before, after = np.random.default_rng(0).standard_normal((2, 16, 8, 8), np.float32)
    np.testing.assert_array_equal(predicted(before, after, SIGMAS[19], SIGMAS[20]), after)


def test_a_projection_is_a_line_for_each_channel_and_a_constant(tmp_path):
    """Colours from -1 to 1 are 0 to 255, others are clipped; height and width are the latents'."""
    matrix = [[0.5, 0, 0], [0, 1.0, 0], [0, 0.25, -2.0]]
    (tmp_path / PROJECTION).write_text(json.dumps(matrix))
    latents = np.zeros((2, 2, 3), np.float32)
    latents[0, 0, 1], latents[1, 1, 2] = 1, -1.25
    picture = projected(latents, read_projection(tmp_path))
    assert picture.dtype == np.uint8
    assert picture.shape == (2, 3, 3)
    np.testing.assert_array_equal(picture[0, 0], [128, 159, 0])
    np.testing.assert_array_equal(picture[0, 1], [191, 159, 0])
    np.testing.assert_array_equal(picture[1, 2], [128, 0, 0])


def test_reports_come_at_both_rhythms_and_at_the_end():
    """Every third step, a preview at every fourth, of ten; the last has the picture, no preview."""
    reports = Reports(progress_every=3, preview_every=4)
    assert [step for step in range(1, 11) if reports.due(step, 10)] == [3, 4, 6, 8, 9, 10]
    assert [step for step in range(1, 11) if reports.has_preview(step, 10)] == [4, 8]
    assert not Reports(preview_every=5).has_preview(10, 10)
    assert not any(Reports().has_preview(step, 10) for step in range(1, 11))


def test_what_is_not_asked_for_is_each_step_without_previews():
    """The contract's defaults."""
    assert Reports.from_inputs({}) == Reports(progress_every=1, preview_every=0, with_vae=False)
    asked = {"progress_every": 4, "preview_every": 2, "preview_with_vae": True}
    given = {name: np.array([value]) for name, value in asked.items()}
    assert Reports.from_inputs(given) == Reports(4, 2, True)


@pytest.mark.parametrize(
    ("name", "value"), [("progress_every", 0), ("progress_every", -3), ("preview_every", -1)]
)
def test_a_rhythm_that_is_none_is_refused(name, value):
    """With the name and the value."""
    with pytest.raises(RequestError, match=f"{name} is {value}: expected 1 or more"):
        Reports.from_inputs({name: np.array([value], np.int32)})


def test_only_a_priority_is_passed_on():
    """And refused when it is none, before anything runs."""
    assert passed_on("") == passed_on('{"other": 1}') == {}
    assert passed_on('{"priority_level": 1, "other": 1}') == {"priority_level": 1}
    with pytest.raises(RequestError, match="priority_level is 7"):
        passed_on('{"priority_level": 7}')


def test_a_time_out_says_what_is_left_and_when_it_has_passed():
    """In microseconds, as Triton gives and takes it; 0 is none, and never passes."""
    assert TimeOut(0).turn(1, 20) == TimeOut(5_000_000).turn(1, 20) == LOOK
    assert 0 < TimeOut(200_000).turn(1, 20) <= 200_000
    short = TimeOut(1500)
    time.sleep(0.002)
    with pytest.raises(Expired, match=r"time-out of 0\.0015 seconds has passed before step 3 of 20"):
        short.turn(3, 20)
