"""What reads a request, before tensors by the thousand: a request as it should be, or an error that names
what is wrong with it; never another exception, and never long at it.
"""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set
from serve.inside.admission import (
    LARGEST_FP16,
    PRIORITY_LEVELS,
    deadline_in,
    guided_steps,
    priority_of,
    request_from,
)
from serve.inside.errors import RequestError
from serve.inside.limits import Limits
from serve.inside.pixels import pixels_from
from serve.inside.reports import Reports, passed_on
from serve.inside.text import prompt_text

TOKENS, WIDTH, POOLED = 3, 4, 2
# Those of the contract, and what a client might send in their place.
DTYPES = ("float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint64", "bool", "O")
WHOLE = ("seed", "steps", "height", "width", "begin", "end", "arrival", "deadline")
NUMBERS = ("guidance_scale", "guidance_start", "guidance_end")
EXTREME = [0, 1, -1, 2, 16, 64, 120, 128, 200, 256, 257, 2**31 - 1, -(2**31), 2**62, -(2**63)]
STRANGE = [0.0, -0.0, 0.5, 1.0, 4.5, 100.0, 101.0, 1e-40, 3e38, float("nan"), float("inf"), float("-inf")]

derandomized = hypothesis.settings(
    derandomize=True, deadline=2000, database=None, max_examples=500, print_blob=False
)


@pytest.fixture(scope="module")
def limits(miniature):
    """The miniature's."""
    family = family_from_checkpoint(miniature)
    shapes = shape_set(family)
    settings = {"family": family.model_dump(mode="json"), "shapes": shapes.model_dump(mode="json")}
    return Limits.from_settings(settings | {"pixels_per_latent": 8}, max_steps=200)


def anything():
    """An array of any dtype and of any shape up to four dims, empty ones too."""
    shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
    return st.one_of(
        st.sampled_from(DTYPES[:-1]).flatmap(lambda dtype: arrays.arrays(np.dtype(dtype), shapes)),
        shapes.map(lambda shape: np.full(shape, b"text", np.object_)),
    )


def scalar(name):
    """Mostly of the right dtype and shape, and of an extreme value."""
    if name in NUMBERS:
        values = st.sampled_from(STRANGE) | st.floats(width=32)
        right = values.map(lambda value: np.array([value], np.float32))
    else:
        values = st.sampled_from(EXTREME) | st.integers(-(2**63), 2**63 - 1)
        right = values.map(lambda value: np.array([value], np.int64))
    return right | anything()


def text(width):
    """Rows of text as the encoders give them, or none, too many, not finite, of another rank or dtype."""
    shape = st.integers(0, 4).map(lambda rows: (rows, *width))
    values = st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
    right = st.builds(lambda shape, value: np.full(shape, value, np.float16), shape, values)
    return right | st.just(np.zeros((2, *width), np.float16)) | anything()


def latents():
    """Of sizes that are served and others, with values that FP16 holds and others."""
    shape = st.tuples(st.sampled_from([16, 16, 16, 4, 0]), *[st.sampled_from([0, 1, 7, 8, 16, 32, 33])] * 2)
    values = st.sampled_from([0.0, 1.0, LARGEST_FP16, 7e4, float("nan"), float("-inf")])
    right = st.builds(lambda shape, value: np.full(shape, value, np.float32), shape, values)
    return right | shape.map(lambda shape: np.zeros(shape, np.int32)) | anything()


@st.composite
def denoiser_inputs(draw):
    """A request to the denoiser with some of its inputs, each of which may be anything."""
    right = {
        "context": np.zeros((2, TOKENS, WIDTH), np.float16),
        "pooled": np.zeros((2, POOLED), np.float16),
    }
    wrong = {"context": text((TOKENS, WIDTH)), "pooled": text((POOLED,)), "latents": latents()}
    wrong |= {name: scalar(name) for name in (*WHOLE, *NUMBERS)}
    names = draw(st.lists(st.sampled_from(sorted(wrong)), max_size=4, unique=True))
    given = right | {name: draw(wrong[name]) for name in names}
    if draw(st.integers(0, 20)) == 0:
        del given[draw(st.sampled_from(sorted(right)))]
    return given


def check(request, limits):
    """What the step scheduler takes for granted."""
    denoising, ticket = request.state, request.ticket
    context, pooled = denoising.conditions["context"], denoising.conditions["pooled"]
    channels, height, width = denoising.latents.shape
    assert channels == limits.channels
    limits.max_rows(height * limits.pixels_per_latent, width * limits.pixels_per_latent)
    assert denoising.latents.dtype == np.float32
    assert np.isfinite(denoising.latents).all()
    assert 0 <= denoising.step < denoising.end <= len(denoising.sigmas) - 1 <= limits.max_steps
    assert denoising.end - denoising.step >= 1
    assert len(context) == len(pooled) == (2 if denoising.guidance_scale > 1 else 1)
    assert context.ndim == 3 and pooled.ndim == 2
    assert 0 <= denoising.guidance_scale <= 100
    first, last = denoising.guided
    assert 0 <= first <= last <= len(denoising.sigmas) - 1
    assert 0 <= request.seed < 2**63
    assert ticket.arrival >= 0
    assert ticket.deadline >= 0
    assert 1 <= denoising.rows <= request.max_rows


@pytest.mark.slow
@hypothesis.settings(derandomized, max_examples=2000)
@hypothesis.given(inputs=denoiser_inputs())
def test_tensors_make_a_request_that_can_be_denoised_or_an_error_that_names_one_of_them(limits, inputs):
    try:
        denoising = request_from(inputs, limits)
    except RequestError as error:
        names = {*inputs, "context", "pooled", "size"}  # height and width, which latents have too
        names |= {"height", "width"} if "latents" in inputs else set()
        assert any(name in str(error) for name in names), str(error)
        assert len(str(error)) < 300
    else:
        check(denoising, limits)


@derandomized
@hypothesis.given(value=st.binary(max_size=40) | st.text(max_size=40) | st.integers() | st.none())
def test_a_prompt_is_text_or_an_error_that_names_it(value):
    try:
        assert isinstance(prompt_text(value, "negative_prompt", 30), str)
    except ValueError as error:
        assert str(error).startswith("negative_prompt ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@derandomized
@hypothesis.given(level=JSON, others=st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_a_priority_level_is_one_of_three_or_an_error_that_names_it(level, others):
    parameters = json.dumps(others | {"priority_level": level})
    try:
        assert priority_of(parameters, default=2) in PRIORITY_LEVELS
        assert passed_on(parameters)["priority_level"] in PRIORITY_LEVELS
    except RequestError as error:
        assert str(error).startswith("priority_level ")


@derandomized
@hypothesis.given(start=st.floats(), end=st.floats(), steps=st.integers(1, 200))
def test_guided_steps_are_steps_or_an_error_that_names_the_interval(start, end, steps):
    try:
        first, last = guided_steps(start, end, steps)
    except RequestError as error:
        assert str(error).startswith(("guidance_start ", "guidance_end "))
    else:
        assert 0 <= first <= last <= steps


@derandomized
@hypothesis.given(
    inputs=st.fixed_dictionaries(
        {},
        optional={
            "progress_every": scalar("progress_every"),
            "preview_every": scalar("preview_every"),
            "preview_with_vae": anything(),
        },
    )
)
def test_reports_are_of_some_steps_or_an_error_that_names_the_input(inputs):
    try:
        reports = Reports.from_inputs(inputs)
    except RequestError as error:
        assert str(error).startswith(("progress_every ", "preview_"))
    else:
        assert reports.progress_every >= 1
        assert reports.preview_every >= 0
        assert reports.due(200, 200)


@derandomized
@hypothesis.given(decoded=anything() | st.just(np.full((1, 3, 2, 2), np.nan, np.float16)))
def test_a_decoded_picture_has_pixels_or_an_error_says_why_not(decoded):
    try:
        pixels = pixels_from(decoded)
    except (RequestError, ArithmeticError) as error:
        assert "decoded" in str(error) or "picture" in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size and pixels.shape[2] == 3


@derandomized
@hypothesis.given(timeout=st.integers(0, 2**64 - 1))
def test_any_time_out_has_a_deadline(timeout):
    assert 0 <= deadline_in(timeout) < 2**63
