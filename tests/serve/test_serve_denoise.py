"""The denoise loop without a server: noise, sigmas, guidance, Euler steps, bad requests, pixels."""

import time

import numpy as np
import pytest

from mmdit.contract import components, served_models
from mmdit.family import Family, family_from_checkpoint
from mmdit.shapes import shape_set
from serve.inside.admission import request_from
from serve.inside.denoise import sigmas_for, vae_latent
from serve.inside.errors import RequestError
from serve.inside.limits import Limits
from serve.inside.noise import noise_from_seed
from serve.inside.pixels import pixels_from

# The first two and the last two values of torch 2.13 for shape (16, 16, 16) and a seed, on its CPU generator,
# so that a change in numpy's or torch's generator is noticed.
STORED_NOISE = {
    0: [-1.125839829, -1.152360201, -1.728847146, 0.601982117],
    42: [1.926915288, 1.487284064, 0.941619456, -0.011842877],
}


@pytest.fixture(scope="module")
def settings(miniature):
    """What the packager writes for the Python models, as `Limits` reads it."""
    family = family_from_checkpoint(miniature)
    return {
        "family": family.model_dump(mode="json"),
        "shapes": shape_set(family).model_dump(mode="json"),
        "pixels_per_latent": 8,
    }


@pytest.fixture(scope="module")
def limits(settings):
    """The miniature's limits."""
    return Limits.from_settings(settings, max_steps=200)


def inputs(rows=2, **given):
    """A denoiser request with small embeddings; a value makes a tensor of shape [1]."""
    tensors = {"context": np.zeros((rows, 3, 4), np.float16), "pooled": np.zeros((rows, 2), np.float16)}
    for name, value in given.items():
        tensors[name] = value if isinstance(value, np.ndarray) else np.array([value])
    return tensors


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 + 5, 2**62 + 17])
@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 10, 14), (16, 128, 128), (3, 7), (17,)])
def test_noise_equals_torchs_cpu_generator(seed, shape):
    """A seed means what it means in diffusers, to 1e-6 (measured: 1.2e-7)."""
    import torch

    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    np.testing.assert_allclose(noise_from_seed(seed, shape), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", STORED_NOISE)
def test_noise_equals_stored_values(seed):
    """The stream does not change with numpy's or torch's version."""
    noise = noise_from_seed(seed, (16, 16, 16)).reshape(-1)
    np.testing.assert_allclose(noise[[0, 1, -2, -1]], STORED_NOISE[seed], rtol=0, atol=1e-6)


def test_too_little_noise_is_refused():
    """torch draws fewer than 16 values in another way."""
    with pytest.raises(ValueError, match="16 or more"):
        noise_from_seed(0, (3, 5))


@pytest.mark.parametrize("shift", [3.0, 1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 28, 40, 200])
def test_sigmas_equal_diffusers(steps, shift):
    """The schedule is FlowMatchEulerDiscreteScheduler's, bit for bit, and so are its timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = sigmas_for(steps, shift, 1000)
    np.testing.assert_array_equal(sigmas, scheduler.sigmas.numpy())
    np.testing.assert_array_equal(sigmas[:-1] * np.float32(1000), scheduler.timesteps.numpy())


def test_the_loop_equals_diffusers_scheduler(limits):
    """Guidance and Euler steps over a stand-in velocity give diffusers' latents."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=limits.shift)
    scheduler.set_timesteps(7)
    request = request_from(inputs(steps=7, seed=3, guidance_scale=4.5), limits).state
    expected = torch.from_numpy(request.latents)
    for timestep in scheduler.timesteps:
        latent, timesteps = request.engine_inputs()
        assert timesteps.tolist() == [[timestep], [timestep]]
        velocity = np.stack([np.sin(latent[0]), np.cos(latent[1])])
        negative, positive = torch.from_numpy(velocity).float()
        guided = negative + 4.5 * (positive - negative)
        expected = scheduler.step(guided, timestep, expected, return_dict=False)[0]
        request.advance(velocity)
    assert request.finished
    np.testing.assert_allclose(request.latents, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_segments_of_steps_equal_the_whole(limits):
    """Steps 0 to 3 and then 3 to 8 from their latents are steps 0 to 8."""

    def run(**given):
        request = request_from(inputs(steps=8, seed=5, **given), limits).state
        while not request.finished:
            latent, _ = request.engine_inputs()
            request.advance(np.sin(latent))
        return request.latents

    halfway = run(end=3)
    np.testing.assert_array_equal(run(begin=3, latents=halfway), run())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 120}, "height is 120: expected a multiple of 16"),
        ({"width": 0}, "width is 0"),
        ({"width": -16}, "width is -16"),
        ({"height": 512}, "size 512x128 .* is not served: expected 64x64 to 256x256"),
        ({"steps": 0}, "steps is 0: expected 1 to 200"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 100000}, "steps is 100000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"seed": -1}, "seed is -1: expected 0 or more"),
        ({"guidance_scale": 1.0}, "have 2 and 2 rows: expected 1"),
        ({"begin": 3}, "without latents"),
        ({"begin": 5, "end": 5}, "0 <= begin < end"),
        ({"end": 99}, "0 <= begin < end"),
        ({"latents": np.zeros((4, 16, 16), np.float32)}, "4 channels: expected 16"),
        ({"latents": np.zeros((16, 16, 15), np.float32)}, "width is 120"),
        (
            {"latents": np.zeros((16, 16, 16), np.float32), "width": 64},
            "width is 64, but the latents are for 128",
        ),
        ({"latents": np.full((16, 16, 16), np.nan, np.float32)}, "values that FP16 does not"),
        ({"latents": np.full((16, 16, 16), -1e6, np.float32)}, "expected up to 65504"),
    ],
)
def test_a_bad_request_is_named(limits, given, message):
    """Each bad input gets an error with its name, its value and what was expected."""
    with pytest.raises(RequestError, match=message):
        request_from(inputs(**given), limits)


def test_the_vae_latent_is_scaled_in_fp32(limits):
    """latents / scaling_factor + shift_factor, rounded to FP16 once."""
    latents = noise_from_seed(0, (16, 8, 8))
    expected = (latents / np.float32(1.5305) + np.float32(0.0609)).astype(np.float16)
    np.testing.assert_array_equal(vae_latent(latents, limits)[0], expected)


def test_pixels_are_rounded_and_clipped():
    """-1 is black, 1 is white, beyond is clipped; a picture that is not finite is an error."""
    row = np.array([-2, -1, 0, 0.5, 1, 3], np.float16)
    decoded = np.broadcast_to(row, (1, 3, 2, 6))
    assert pixels_from(decoded)[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]
    assert pixels_from(decoded).shape == (2, 6, 3)
    with pytest.raises(ArithmeticError, match="not finite"):
        pixels_from(np.where(decoded > 2, np.inf, decoded))


def test_the_inputs_that_the_loop_reads_are_the_contracts(settings):
    """Every input of `request_from` and every engine input is a name of the contract."""
    family = Family.model_validate(settings["family"])
    denoiser = {tensor.name for tensor in served_models(family)["denoiser"].inputs}
    assert denoiser == {
        *("context", "pooled", "seed", "steps", "guidance_scale", "guidance_start", "guidance_end"),
        *("height", "width", "latents", "begin", "end", "arrival", "deadline"),
    }
    mmdit = [tensor.name for tensor in components(family, shape_set(family))["mmdit"].inputs]
    assert mmdit == ["latent", "timestep", "context", "pooled"]


def test_measured_times_bound_the_rows_of_a_shared_call(settings):
    """Of the nearest size that was timed, within a quarter of its area; where another request costs its full
    price, none joins. Other sizes keep the shape set's rows.
    """
    times = [
        {"size": [64, 64], "milliseconds": {"2": 24.0, "4": 28.0, "8": 36.0, "16": 52.0}},
        {"size": [256, 256], "milliseconds": {"2": 38.8, "4": 77.6}},
    ]
    limits = Limits.from_settings(settings | {"step_times": times}, max_steps=200)
    assert limits.max_rows(64, 80) == Limits.from_settings(settings, max_steps=200).max_rows(64, 80) == 16
    assert limits.max_rows(256, 240) == 1
    assert limits.max_rows(192, 256) == 1
    alone = Limits.from_settings(settings | {"step_times": times[1:]}, max_steps=200)
    assert alone.max_rows(64, 64) == alone.max_rows(128, 128) == alone.max_rows(176, 256) == 16


@pytest.mark.parametrize(("seconds_ago", "kept"), [(0, True), (599, True), (601, False), (-60, False)])
def test_an_arrival_is_believed_when_it_is_of_the_last_ten_minutes(limits, monkeypatch, seconds_ago, kept):
    """A stream keeps its place; nobody overtakes all others with a stamp of 1."""
    now = 10**13
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    stamp = now - seconds_ago * 10**9
    assert request_from(inputs(arrival=stamp), limits).ticket.arrival == (stamp if kept else 0)
    assert request_from(inputs(arrival=1), limits).ticket.arrival == 0
