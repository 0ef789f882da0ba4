"""The denoise loop without a server: noise, sigmas, Euler steps, and the step scheduler that batches them."""

import threading

import numpy as np
import pytest

from mmdit.contract import components, served_models
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set
from serve.inside.denoise import Denoising, Limits, RequestError, denoising_from, sigmas_for, vae_latent
from serve.inside.noise import noise_from_seed
from serve.inside.pixels import pixels_from
from serve.inside.schedule import Cancelled, Full, StepScheduler

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
    request = denoising_from(inputs(steps=7, seed=3, guidance_scale=4.5), limits)
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
        request = denoising_from(inputs(steps=8, seed=5, **given), limits)
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
        denoising_from(inputs(**given), limits)


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


# The step scheduler, with an engine whose velocity tells whose row it was.


def request(size=(4, 4), steps=3, rows=2, max_rows=8, mark=1.0, **given):
    """A request whose context marks its rows."""
    return Denoising(
        latents=np.zeros((1, *size), np.float32),
        context=np.full((rows, 1, 1), mark, np.float16),
        pooled=np.zeros((rows, 1), np.float16),
        sigmas=sigmas_for(steps, 3.0, 1000),
        guidance_scale=1.0,
        train_timesteps=1000,
        seed=0,
        max_rows=max_rows,
        step=0,
        end=steps,
        **given,
    )


class Engine:
    """A stand-in: the velocity of a row is its context's mark; remembers each call's rows and size."""

    def __init__(self):
        self.calls = []
        self.contexts = []

    def __call__(self, latent, timestep, context, pooled):
        self.calls.append((len(latent), latent.shape[2:]))
        self.contexts.append(context)
        return np.broadcast_to(context[:, :, :, None], latent.shape).astype(np.float16)


def test_requests_share_calls_up_to_the_sizes_rows():
    """Five requests of two rows and at most eight rows a call: eight, then the two that waited."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for _ in range(5):
        scheduler.submit(request(steps=2))
    while scheduler.step():
        pass
    assert [rows for rows, _ in engine.calls] == [8, 8, 4]


def test_a_new_request_joins_at_the_next_step():
    """It does not wait until those in flight have finished."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(steps=3))
    scheduler.step()
    scheduler.submit(request(steps=3))
    while scheduler.step():
        pass
    assert [rows for rows, _ in engine.calls] == [2, 4, 4, 2]


def test_sizes_take_turns():
    """Two sizes alternate; neither starves, whichever has more requests."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for _ in range(3):
        scheduler.submit(request(size=(4, 4), steps=3))
    scheduler.submit(request(size=(6, 4), steps=3))
    while scheduler.step():
        pass
    assert [size for _, size in engine.calls] == [(4, 4), (6, 4)] * 3


def test_each_request_gets_its_own_rows():
    """With one row and with two, at different steps, velocities go to their requests."""
    ended = []
    scheduler = StepScheduler(Engine(), 64)
    for mark, rows, steps in ((1.0, 2, 2), (2.0, 1, 4), (3.0, 2, 3)):
        on_end = lambda done, error, mark=mark: ended.append((mark, float(done.latents[0, 0, 0]), error))  # noqa: E731
        scheduler.submit(request(mark=mark, rows=rows, steps=steps, on_end=on_end))
    while scheduler.step():
        pass
    # From sigma 1 to 0 along a constant velocity v the latents move by -v.
    assert sorted((mark, round(value, 5), error) for mark, value, error in ended) == [
        (1.0, -1.0, None),
        (2.0, -2.0, None),
        (3.0, -3.0, None),
    ]


def test_constant_tensors_are_joined_once():
    """While the same requests stay together, the engine gets the same context array."""
    engine = Engine()
    scheduler = StepScheduler(engine, 64)
    for _ in range(2):
        scheduler.submit(request(steps=3))
    for _ in range(3):
        scheduler.step()
    assert engine.contexts[0] is engine.contexts[1] is engine.contexts[2]


def test_a_cancelled_request_leaves_before_its_next_step():
    """Its place is free at the next call, and it ends with Cancelled."""
    engine, ended, cancelled = Engine(), [], threading.Event()
    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(is_cancelled=cancelled.is_set, on_end=lambda _, error: ended.append(error)))
    scheduler.step()
    cancelled.set()
    assert scheduler.step() == 0
    assert isinstance(ended[0], Cancelled)
    assert len(engine.calls) == 1


def test_an_engines_failure_is_that_of_its_call():
    """Requests of another size go on; those in the call get the error."""
    ended = []

    def engine(latent, timestep, context, pooled):
        if latent.shape[2:] == (4, 4):
            raise RuntimeError("out of memory")
        return latent

    scheduler = StepScheduler(engine, 64)
    scheduler.submit(request(size=(4, 4), on_end=lambda _, error: ended.append(str(error))))
    scheduler.submit(request(size=(6, 4), on_end=lambda _, error: ended.append(error)))
    for _ in range(4):
        scheduler.step()
    assert ended == ["out of memory", None]


def test_a_velocity_of_the_wrong_shape_is_an_error_of_its_call():
    """The loop lives on."""
    ended = []
    scheduler = StepScheduler(lambda latent, *_: latent[:, :, :1, :3], 64)
    scheduler.submit(request(on_end=lambda _, error: ended.append(error)))
    assert scheduler.step() == 0
    assert isinstance(ended[0], ValueError)


def test_an_answer_that_cannot_be_sent_does_not_stop_the_loop(capsys):
    """The client is gone; the others get their pictures, and the log tells."""
    ended = []

    def gone(*_):
        raise BrokenPipeError("the client is gone")

    scheduler = StepScheduler(Engine(), 64)
    scheduler.submit(request(steps=1, on_end=gone))
    scheduler.submit(request(steps=1, on_end=lambda _, error: ended.append(error)))
    while scheduler.step():
        pass
    assert ended == [None]
    assert "the client is gone" in capsys.readouterr().err


def test_a_full_scheduler_refuses_at_once():
    """One request more than it holds raises Full; when one has ended there is room again."""
    scheduler = StepScheduler(Engine(), 2)
    for _ in range(2):
        scheduler.submit(request(steps=1))
    with pytest.raises(Full, match="try again"):
        scheduler.submit(request())
    scheduler.step()
    scheduler.submit(request())


def test_closing_ends_what_is_unfinished():
    """`run` returns after `close`, and nobody waits for ever."""
    ended = []
    started, go_on = threading.Event(), threading.Event()

    def engine(latent, timestep, context, pooled):
        started.set()
        go_on.wait(10)
        return latent

    scheduler = StepScheduler(engine, 64)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    scheduler.submit(request(steps=50, on_end=lambda _, error: ended.append(error)))
    assert started.wait(10)
    scheduler.close()
    go_on.set()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(ended[0], Cancelled)
    with pytest.raises(Full, match="stopping"):
        scheduler.submit(request())


def test_the_inputs_that_the_loop_reads_are_the_contracts(settings):
    """Every input of `denoising_from` and every engine input is a name of the contract."""
    family = family_from_checkpoint_settings(settings)
    denoiser = {tensor.name for tensor in served_models(family)["denoiser"].inputs}
    assert denoiser == {
        *("context", "pooled", "seed", "steps", "guidance_scale"),
        *("height", "width", "latents", "begin", "end"),
    }
    mmdit = [tensor.name for tensor in components(family, shape_set(family))["mmdit"].inputs]
    assert mmdit == ["latent", "timestep", "context", "pooled"]


def family_from_checkpoint_settings(settings):
    """The family that packaged settings hold."""
    from mmdit.family import Family

    return Family.model_validate(settings["family"])
