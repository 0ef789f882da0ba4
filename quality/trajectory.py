"""From prompts to pictures, as the server makes them, with engines or with the FP32 reference.

The arithmetic between the components is the server's own (serve/inside), so what is judged is what is
served; executors differ in the functions that they run and in the dtype between them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.runtimes import Array, Run
from mmdit.contract import TEXT_ENCODERS
from mmdit.errors import EngineError
from mmdit.progress import Progress
from quality.prompts import Task
from serve.inside.admission import request_from
from serve.inside.denoise import DenoiseState, rows_of, vae_latent
from serve.inside.limits import Limits, RequestError
from serve.inside.pixels import pixels_from
from serve.inside.text import PromptTokenizers, join

Texts = dict[str, tuple[Array, Array]]  # prompt → context [77 + S, D] and pooled [P]
Latents = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Executor:
    """A way to run components. `open` loads one and gives its memory back; `rows` fit into a call."""

    name: str
    dtype: type
    open: Callable[[str], contextlib.AbstractContextManager[Run]]
    rows: int


@dataclass(frozen=True)
class Settings:
    """What all trajectories share: `size` is height and width in pixels."""

    limits: Limits
    context_dim: int
    steps: int
    guidance_scale: float
    size: tuple[int, int]


@dataclass(frozen=True)
class State:
    """One request before one step: the MMDiT's inputs, rows first, and the FP16 engine's `velocity`."""

    task: int
    step: int
    inputs: dict[str, Array]
    velocity: Array


def encode(executor: Executor, tokenizers: PromptTokenizers, tasks: list[Task], settings: Settings) -> Texts:
    """Every prompt and negative prompt of the tasks to its context and pooled vector."""
    texts = dict.fromkeys(text for task in tasks for text in (task.prompt, task.negative_prompt))
    hidden: dict[str, dict[str, Array]] = {text: {} for text in texts}
    pooled: dict[str, dict[str, Array]] = {text: {} for text in texts}
    ids = {text: tokenizers(text)[0] for text in texts}
    with Progress(f"{executor.name}: encoding", len(texts) * len(TEXT_ENCODERS), "texts") as progress:
        for encoder in TEXT_ENCODERS:
            with executor.open(encoder) as run:
                for text in texts:
                    found = run({"input_ids": ids[text][encoder]})
                    hidden[text][encoder] = found["hidden"]
                    if "pooled" in found:
                        pooled[text][encoder] = found["pooled"]
                    progress.advance()
    return {text: join(hidden[text], pooled[text], settings.context_dim) for text in texts}


def denoise(
    executor: Executor, run: Run, texts: Texts, tasks: list[Task], settings: Settings, keep: int = 0
) -> tuple[list[Latents], list[State]]:
    """Every task's final latents, FP32 [C, h, w], and the states of the first `keep` tasks at each step.

    Requests share a call as far as its rows go, as in the server. Latents that are not finite stay so.
    """
    requests = [_request(task, texts, settings) for task in tasks]
    together = max(1, executor.rows // rows_of(settings.guidance_scale))
    states: list[State] = []
    work = len(requests) * settings.steps
    # What overflows is found out later, in the picture.
    with (
        np.errstate(over="ignore", invalid="ignore"),
        Progress(f"{executor.name}: denoising", work, "steps") as progress,
    ):
        for start in range(0, len(requests), together):
            group = requests[start : start + together]
            for _ in range(settings.steps):
                each = [_inputs(request, executor.dtype) for request in group]
                for number, velocity in enumerate(_velocities(run, each)):
                    request = group[number]
                    if start + number < keep:
                        states.append(State(start + number, request.step, each[number], velocity))
                    request.advance(velocity)
                progress.advance(len(group))
    return [request.latents for request in requests], states


def velocities(executor: Executor, run: Run, states: list[State]) -> list[Array]:
    """The velocity at each state: the same latents and texts for every executor."""
    found: list[Array] = []
    rows = len(states[0].velocity)
    together = max(1, executor.rows // rows)
    with Progress(f"{executor.name}: velocities", len(states), "steps") as progress:
        for start in range(0, len(states), together):
            group = states[start : start + together]
            inputs = [
                {
                    name: value if value.dtype == np.float32 else value.astype(executor.dtype)
                    for name, value in state.inputs.items()
                }
                for state in group
            ]
            found += _velocities(run, inputs)
            progress.advance(len(group))
    return found


def decode(executor: Executor, run: Run, latents: list[Latents], limits: Limits) -> Iterator[Picture | None]:
    """Each picture, UINT8 [H, W, 3]; None for one that is not finite."""
    with Progress(f"{executor.name}: decoding", len(latents), "pictures") as progress:
        for each in latents:
            picture = None
            with np.errstate(over="ignore", invalid="ignore"), contextlib.suppress(ArithmeticError):
                decoded = run({"latent": vae_latent(each, limits, executor.dtype)})["image"]
                picture = pixels_from(decoded)
            progress.advance()
            yield picture


def _request(task: Task, texts: Texts, settings: Settings) -> DenoiseState:
    prompts = [task.prompt]
    if rows_of(settings.guidance_scale) == 2:
        prompts.insert(0, task.negative_prompt)
    given: dict[str, Any] = {
        "seed": task.seed,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.size[0],
        "width": settings.size[1],
    }
    try:
        return request_from(
            {
                "context": np.stack([texts[prompt][0] for prompt in prompts]),
                "pooled": np.stack([texts[prompt][1] for prompt in prompts]),
                **{name: np.array([value]) for name, value in given.items()},
            },
            settings.limits,
        ).state
    except RequestError as error:
        raise EngineError(f"the engines cannot make the gate's pictures: {error}") from None


def _inputs(request: DenoiseState, dtype: type) -> dict[str, Array]:
    latent, timestep = request.engine_inputs(dtype)
    return {"latent": latent, "timestep": timestep, **request.conditions}


def _velocities(run: Run, requests: list[dict[str, Array]]) -> list[Array]:
    """One call for several requests' rows; each request's rows of the answer."""
    joined = {name: np.concatenate([inputs[name] for inputs in requests]) for name in requests[0]}
    found = run(joined)["velocity"]
    ends = np.cumsum([len(inputs["latent"]) for inputs in requests])[:-1]
    return [np.array(rows) for rows in np.split(found, ends)]
