"""A step of several models: what each is given, and that a model added to the list reaches the latents."""

import numpy as np
import pytest
from stand_in_engine import request

from serve.inside.schedule import StepScheduler
from serve.inside.step_models import StepModel, StepModels

MMDIT = StepModel("mmdit", ["latent", "timestep", "context", "pooled"], ["velocity"])
CONTROLNET = StepModel("controlnet", ["latent", "timestep", "control"], ["residual"])
CONTROLLED = StepModel("mmdit", ["latent", "timestep", "context", "pooled", "residual"], ["velocity"])


class Models:
    """Served models: remembers what each call was given; every output is the sum of the inputs' means."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], list[str]]] = []
        self.made = 0

    def tensors(self, arrays):
        self.made += 1
        return list(arrays.items())

    def call(self, name, inputs, outputs, *, constants):
        self.calls.append((name, list(inputs), [constant for constant, _ in constants]))
        rows = len(inputs["latent"])
        total = sum(float(values.mean()) for values in (*inputs.values(), *dict(constants).values()))
        total -= float(inputs["timestep"].mean()) + float(inputs["latent"].mean())
        return {output: np.full((rows, 1, 4, 4), total, np.float16) for output in outputs}


def denoised(models: list[StepModel], **conditions: np.ndarray) -> tuple[Models, float]:
    """Three steps of one request of two rows: what was called, and where its latents have come."""
    served = Models()
    scheduler = StepScheduler(StepModels(models, served.call, served.tensors), 64)
    one = request(steps=3)
    one.state.conditions |= conditions
    scheduler.submit(one)
    while scheduler.step():
        pass
    return served, float(one.state.latents[0, 0, 0])


def test_the_mmdit_alone_takes_latents_and_conditions():
    served, latent = denoised([MMDIT])
    assert served.calls == [("mmdit", ["latent", "timestep"], ["context", "pooled"])] * 3
    assert latent == pytest.approx(-1.0)


def test_a_model_takes_what_one_before_it_hands_on():
    """The ControlNet's residual of 2 is added to the context's 1."""
    control = np.full((2, 1, 1), 2.0, np.float16)
    served, latent = denoised([CONTROLNET, CONTROLLED], control=control)
    assert served.calls[:2] == [
        ("controlnet", ["latent", "timestep"], ["control"]),
        ("mmdit", ["latent", "timestep", "residual"], ["context", "pooled"]),
    ]
    assert len(served.calls) == 6
    assert latent == pytest.approx(-3.0)


def test_conditions_become_tensors_once_for_all_models_and_steps():
    served, _ = denoised([CONTROLNET, CONTROLLED], control=np.zeros((2, 1, 1), np.float16))
    assert served.made == 1


def test_the_list_is_read_from_the_packaged_settings():
    served = Models()
    settings = {"step_models": [MMDIT._asdict()]}
    engine = StepModels.from_settings(settings, call=served.call, tensors=served.tensors)
    ones = {name: np.ones((2, 1), np.float16) for name in ("context", "pooled")}
    latent, timestep = np.zeros((2, 1, 4, 4), np.float16), np.zeros((2, 1), np.float32)
    assert engine(latent, timestep, engine.constants(ones)).mean() == 2
