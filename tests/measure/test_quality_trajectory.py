"""The three trajectories, over functions that stand in for engines: what is shared, what is loaded when."""

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.runtimes import Run
from mmdit.contract import Precision
from quality import measurement, trajectory
from quality.comparison import compared
from quality.measurement import measured
from quality.prompts import Task
from quality.trajectory import Executor, Settings
from serve.inside.limits import Limits

TASKS = [Task(f"prompt {number}", "" if number % 2 else "not this", number) for number in range(3)]
LIMITS = Limits(
    **{"channels": 16, "pixels_per_latent": 8, "multiple": 16, "ranges": (((64, 64), (64, 64), 4),)},
    sizes=(),
    step_times=(),
    **{"default_size": 64, "default_steps": 4, "default_guidance_scale": 4.5, "max_steps": 50, "shift": 3.0},
    **{"train_timesteps": 1000, "scaling_factor": 1.5, "shift_factor": 0.1},
)
SETTINGS = Settings(limits=LIMITS, context_dim=12, steps=4, guidance_scale=4.5, size=(64, 64))


class Components:
    """Functions with the components' names; counts what is loaded and remembers what was given."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.opened: list[str] = []
        self.rows: list[int] = []
        self.given: dict[str, list[dict[str, Any]]] = {}

    def executor(self, name: str, dtype: type, error: float) -> Executor:
        @contextlib.contextmanager
        def opened(component: str) -> Iterator[Run]:
            self.loaded.append(f"{name} {component}")
            self.opened.append(f"{name} {component}")
            assert len(self.loaded) == 1, self.loaded

            def run(inputs: dict[str, Any]) -> dict[str, Any]:
                self.given.setdefault(f"{name} {component}", []).append(inputs)
                if component in ("clip_l", "clip_g"):
                    width = 4 if component == "clip_l" else 6
                    return {"hidden": np.ones((1, 77, width), dtype), "pooled": np.ones((1, width), dtype)}
                if component == "t5":
                    return {"hidden": np.full((1, 7, 12), inputs["input_ids"][0, 0], dtype)}
                if component == "vae_decoder":
                    wide = inputs["latent"][:, :3].repeat(8, axis=2).repeat(8, axis=3)
                    return {"image": np.clip(wide, -1, 1).astype(dtype)}
                self.rows.append(len(inputs["latent"]))
                return {"velocity": (inputs["latent"] * dtype(1 + error)).astype(dtype)}

            yield run
            self.loaded.remove(f"{name} {component}")

        return Executor(name, dtype, opened, 4)


class Ids:
    """Prompt → token ids, without a vocabulary."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, prompt: str) -> tuple[dict[str, Any], bool]:
        ids = np.array([[len(prompt)]], np.int64)
        return {name: ids for name in trajectory.TEXT_ENCODERS}, False


@pytest.fixture
def components() -> Components:
    return Components()


def subject(components: Components, fp8: float) -> Any:
    """What is judged: FP32 is right, FP16 off by a thousandth, FP8 by `fp8`."""
    errors = {Precision.FP16: 1e-3, Precision.FP8: fp8}
    return SimpleNamespace(
        layout=SimpleNamespace(tokenizers=None),
        engines=lambda precision: components.executor(precision.value, np.float16, errors[precision]),
        reference=lambda: components.executor("fp32", np.float32, 0.0),
    )


@pytest.fixture(autouse=True)
def without_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "PromptTokenizers", Ids)


def test_one_component_is_loaded_at_a_time_and_fp8_shares_the_encoders_and_the_vae(components):
    """A card of 24 GB does it; FP8 opens nothing but its MMDiT."""
    measured(subject(components, 0.05), TASKS, SETTINGS)
    assert components.loaded == []
    assert [name for name in components.opened if name.startswith("fp8")] == ["fp8 mmdit"]
    assert len(components.opened) == len(set(components.opened)) == 11


def test_each_text_is_encoded_once(components):
    """Three prompts, and two negative prompts for them."""
    measured(subject(components, 0.05), TASKS, SETTINGS)
    assert len(components.given["fp16 t5"]) == len(components.given["fp32 clip_l"]) == 5


def test_calls_are_filled_up_to_the_rows_that_fit(components):
    """Two requests of two rows in a call of four, as in the server; a third one alone."""
    texts = {task.prompt: (np.ones((84, 12), np.float16), np.ones(10, np.float16)) for task in TASKS}
    texts |= {task.negative_prompt: texts["prompt 0"] for task in TASKS}
    executor = components.executor("fp16", np.float16, 0.0)
    with executor.open("mmdit") as run:
        trajectory.denoise(executor, run, texts, TASKS, SETTINGS)
    assert components.rows == [4] * 4 + [2] * 4


def test_the_precisions_start_from_the_same_noise_and_fp32_never_rounds_it(components):
    """The FP16 engine gets the noise rounded, the reference as it was drawn."""
    from serve.inside.noise import noise_from_seed

    measured(subject(components, 0.05), TASKS, SETTINGS)
    noise = noise_from_seed(0, (16, 8, 8))
    first = {name: components.given[f"{name} mmdit"][0]["latent"][0] for name in ("fp32", "fp16", "fp8")}
    assert first["fp32"].dtype == np.float32
    np.testing.assert_array_equal(first["fp32"], noise)
    np.testing.assert_array_equal(first["fp16"], noise.astype(np.float16))
    np.testing.assert_array_equal(first["fp8"], first["fp16"])


def test_velocities_are_compared_on_the_fp16_trajectorys_latents(components):
    """An error of 5 % in each step stays 5 %, less FP16's 0.1 %: it is not carried from step to step."""
    found = measured(subject(components, 0.05), TASKS, SETTINGS)
    assert [step["fp8"]["error"] for step in found.steps] == pytest.approx([0.04895] * 4, rel=5e-3)
    assert [step["floor"]["error"] for step in found.steps] == pytest.approx([1e-3] * 4, rel=0.1)
    assert [step["timestep"] for step in found.steps][0] == 1000


def test_an_fp8_engine_that_overflows_is_told_as_such_and_every_figure_is_a_number(components):
    """NaN makes no picture: it is counted, compared as black, and JSON can hold the figures."""
    with np.errstate(all="ignore"):
        found = measured(subject(components, float("nan")), TASKS, SETTINGS)
    assert found.pictures["fp8"] == [None] * 3
    assert all(picture is not None for picture in found.pictures["fp16"])
    figures, each = compared(found, TASKS)
    known = {figure.name: figure for figure in figures}
    assert known["flawed_pictures"].fp8 == 3 and known["flawed_pictures"].floor == 0
    assert [entry["flaws"]["fp8"] for entry in each] == ["not finite"] * 3
    assert known["velocity_cosine_mean"].fp8 == 0 and known["ssim_mean"].fp8 < 0.5
    json.dumps([figure.model_dump() for figure in figures], allow_nan=False)


def test_what_cannot_be_measured_here_is_said_in_words(components):
    """LPIPS and CLIP without weights, the reader without scenes: absent, with a reason, no download."""
    figures, _ = compared(measured(subject(components, 0.05), TASKS, SETTINGS), TASKS)
    absent = {figure.name: figure.absent for figure in figures if figure.fp8 is None}
    assert absent.keys() >= {"reader_points_lost"}
    assert all(len(reason) > 10 for reason in absent.values())
