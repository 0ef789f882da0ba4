"""The same prompts and noise in FP32, FP16 and FP8: pictures, and the MMDiT's velocities on equal latents."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdit.contract import Precision
from quality import metrics, trajectory
from quality.prompts import Task
from quality.subject import Subject
from quality.trajectory import Picture, Settings
from serve.inside.text import PromptTokenizers

KEPT = 4  # tasks whose latents at every step the other precisions see too

PAIRS = {"fp8": ("fp8", "fp16"), "floor": ("fp16", "fp32")}  # what is compared with what


@dataclass(frozen=True)
class Measurement:
    """Pictures by executor (None: not finite), and per step what the velocities differ by."""

    pictures: dict[str, list[Picture | None]]
    steps: list[dict[str, Any]]
    cosines: dict[str, list[float]]  # "fp8" and "floor": of every state


def measured(subject: Subject, tasks: list[Task], settings: Settings) -> Measurement:
    """Make every task's picture three times. One MMDiT is loaded at a time.

    The text encoders and the VAE of FP8 are the FP16 ones: their answers are shared.
    """
    tokenizers = PromptTokenizers(subject.layout.tokenizers, trajectory.TEXT_ENCODERS)
    fp16, fp8 = subject.engines(Precision.FP16), subject.engines(Precision.FP8)
    fp32 = subject.reference()
    latents = {}
    texts = trajectory.encode(fp16, tokenizers, tasks, settings)
    with fp16.open("mmdit") as run:
        latents["fp16"], states = trajectory.denoise(fp16, run, texts, tasks, settings, keep=KEPT)
    with fp8.open("mmdit") as run:
        latents["fp8"], _ = trajectory.denoise(fp8, run, texts, tasks, settings)
        of_fp8 = trajectory.velocities(fp8, run, states)
    texts = trajectory.encode(fp32, tokenizers, tasks, settings)
    with fp32.open("mmdit") as run:
        latents["fp32"], _ = trajectory.denoise(fp32, run, texts, tasks, settings)
        of_fp32 = trajectory.velocities(fp32, run, states)
    pictures = {}
    with fp16.open("vae_decoder") as run:
        for executor in (fp16, fp8):
            decoded = trajectory.decode(executor, run, latents[executor.name], settings.limits)
            pictures[executor.name] = list(decoded)
    with fp32.open("vae_decoder") as run:
        pictures["fp32"] = list(trajectory.decode(fp32, run, latents["fp32"], settings.limits))

    of_fp16 = [state.velocity for state in states]
    compared = {
        "fp8": list(zip(of_fp8, of_fp16, strict=True)),
        "floor": list(zip(of_fp16, of_fp32, strict=True)),
    }
    cosines = {name: [metrics.cosine(*pair) for pair in pairs] for name, pairs in compared.items()}
    errors = {name: [metrics.relative_error(*pair) for pair in pairs] for name, pairs in compared.items()}
    steps = []
    for step in range(settings.steps):
        at = [number for number, state in enumerate(states) if state.step == step]
        timestep = float(states[at[0]].inputs["timestep"][0, 0])
        steps.append(
            {"step": step, "timestep": timestep}
            | {
                name: {
                    "cosine": float(np.mean([cosines[name][number] for number in at])),
                    "error": float(np.mean([errors[name][number] for number in at])),
                }
                for name in compared
            }
        )
    return Measurement(pictures, steps, cosines)
