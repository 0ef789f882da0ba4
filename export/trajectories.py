"""Denoising trajectories over the calibration prompts: what calibration, scan and sensitivity study run.

The text encoders run first and are freed; the MMDiT then denoises alone, in diffusers' own pipeline with
guidance, so that both the prompt's and the negative prompt's rows are seen at every timestep.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from export.modules import fp32_linears
from export.prompts import CalibrationSettings, calibration_prompts
from mmdit.family import Family
from mmdit.progress import Progress


def device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """What trajectories compute in: FP16 on a GPU, FP32 on a CPU, which is slower in FP16."""
    return torch.float16 if torch.cuda.is_available() else torch.float32


@dataclass(frozen=True)
class Batch:
    """A batch of prompts: the encoders' answers in FP16, the seed of its noise, where it runs.

    `texts` are the pipeline's arguments: embeddings [prompts, tokens, D], pooled [prompts, P], and the
    negative prompts'. `timesteps` fall from 1000; `size` is (height, width) in pixels.
    """

    texts: dict[str, Tensor]
    seed: int
    size: tuple[int, int]
    timesteps: list[float]


def timesteps(steps: int, index: int, batches: int) -> list[float]:
    """The timesteps of batch `index` of `batches`: from 1000 down, evenly over the whole range.

    After the first, each lies in its own of `steps` - 1 equal parts of [0, 1000], further down from batch
    to batch, so that all batches together leave no gap that one schedule's few steps would.
    """
    phase = (index + 0.5) / batches
    return [1000.0, *(1000 * (1 - (step + phase) / (steps - 1)) for step in range(steps - 1))]


def batches(family: Family, checkpoint: Path, settings: CalibrationSettings) -> list[Batch]:
    """Encode the calibration prompts; the text encoders are freed afterwards."""
    prompts = calibration_prompts()[: settings.prompts]
    starts = range(0, len(prompts), settings.batch)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        checkpoint, transformer=None, vae=None, dtype=dtype(), local_files_only=True
    )
    if device().type == "cuda":
        pipeline.enable_model_cpu_offload()
    found = []
    with torch.no_grad(), Progress("encoding prompts", len(starts), "batches") as progress:
        for index, start in enumerate(starts):
            part = prompts[start : start + settings.batch]
            texts = pipeline.encode_prompt(
                [prompt for prompt, _ in part],
                None,
                None,
                negative_prompt=[negative for _, negative in part],
                max_sequence_length=family.t5_tokens,
            )
            names = (
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            )
            found.append(
                Batch(
                    texts={name: text.half().cpu() for name, text in zip(names, texts, strict=True)},
                    seed=settings.seed + index,
                    size=settings.sizes[index % len(settings.sizes)],
                    timesteps=timesteps(settings.steps, index, len(starts)),
                )
            )
            progress.advance()
    return found


class Denoiser:
    """Diffusers' pipeline around one transformer, without text encoders or VAE."""

    def __init__(self, checkpoint: Path, transformer: SD3Transformer2DModel, guidance_scale: float) -> None:
        absent = dict.fromkeys(
            f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")
        )
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(
            checkpoint, **absent, vae=None, transformer=transformer.to(device()), local_files_only=True
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.guidance_scale = guidance_scale
        # of its convolution and norms; the linears' weights may have fewer bits
        self.dtype = transformer.pos_embed.proj.weight.dtype

    @torch.no_grad()
    def __call__(self, batch: Batch, after_step: Callable[[], None] = lambda: None) -> Tensor:
        """Denoise a batch; returns its latents [prompts, C, h, w]."""
        shift = self.pipeline.scheduler.config.shift

        def step_ended(*_: Any) -> dict[str, Any]:
            after_step()
            return {}  # the pipeline's own tensors, unchanged

        texts = {name: text.to(device(), self.dtype) for name, text in batch.texts.items()}
        with fp32_linears():
            latents: Tensor = self.pipeline(
                **texts,
                height=batch.size[0],
                width=batch.size[1],
                # the scheduler shifts the sigmas that it is given; these come out as the timesteps asked for
                sigmas=[t / (1000 * shift - (shift - 1) * t) for t in batch.timesteps],
                guidance_scale=self.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(batch.seed),
                output_type="latent",
                callback_on_step_end=step_ended,
            ).images
        return latents


def denoised(denoiser: Denoiser, work: list[Batch], label: str) -> Iterator[Tensor]:
    """The latents of each batch, with progress."""
    with Progress(label, sum(len(batch.timesteps) for batch in work), "steps of a batch") as progress:
        for batch in work:
            yield denoiser(batch, progress.advance)
