"""What quantizing does to the MMDiT: its velocity on reference trajectories, the pictures at their end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from export.modules import VaeDecoder, load_module
from export.trajectories import Batch, Denoiser, device, dtype
from mmdit.errors import QuantizationError
from mmdit.family import Family
from mmdit.progress import Progress

Picture = NDArray[np.uint8]
_TIMESTEPS = 5  # at which the velocity is compared: in the middle of as many parts of the trajectory
_BATCH = 8  # prompts at a time
_ROWS = ("negative prompt", "prompt")  # the pipeline's order with guidance


class Damage(BaseModel):
    """The difference from the reference.

    `velocity_error`: ‖v − v₀‖ / ‖v₀‖, root mean square over timesteps and rows; `cosine_distance`:
    1 − cos(v, v₀), mean over the same; `by_timestep`: the velocity's error by timestep and kind of row;
    `ssim` of each picture.
    """

    model_config = ConfigDict(frozen=True)

    velocity_error: float
    cosine_distance: float
    by_timestep: dict[str, dict[str, float]]
    ssim: tuple[float, ...]

    @property
    def mean_ssim(self) -> float:
        """Over the pictures."""
        return float(np.mean(self.ssim))

    def figures(self) -> dict[str, Any]:
        """For `sensitivity.json`."""
        return {**self.model_dump(), "mean_ssim": self.mean_ssim, "minimum_ssim": min(self.ssim)}


@dataclass(frozen=True)
class _Call:
    """One call of the transformer on a reference trajectory, and its velocity [rows, C, h, w]."""

    timestep: float
    arguments: dict[str, Any]
    velocity: Tensor


class Comparison:
    """Reference trajectories and pictures; `measure` runs the transformer as it is then, from the same noise.

    The reference is the transformer as it was when this was made. `steps` is the number of denoising
    steps; both kinds of rows are compared when the family uses guidance. Raises QuantizationError for a
    velocity that is not finite.
    """

    def __init__(
        self,
        family: Family,
        checkpoint: Path,
        transformer: torch.nn.Module,
        prompts: Sequence[tuple[str, str]],
        steps: int,
        seed: int,
    ) -> None:
        self._family = family
        self._work = _work(family, checkpoint, prompts, steps, seed)
        self._denoiser = Denoiser(checkpoint, transformer, family.guidance_scale)
        self._transformer = self._denoiser.pipeline.transformer
        self._guided = family.guidance_scale > 1
        vae = load_module("vae_decoder", checkpoint, torch.float32)  # FP16 may not hold its activations
        assert isinstance(vae, VaeDecoder)
        self._vae: AutoencoderKL = vae.model.to(device())
        count = min(_TIMESTEPS, steps)
        chosen = [int((part + 0.5) * steps / count) for part in range(count)]
        self._calls: list[_Call] = []
        self._pictures: list[Picture] = []
        with Progress("reference", len(self._work) * steps, "steps of a batch") as progress:
            for batch in self._work:
                self._calls += self._recorded(batch, chosen, progress.advance)

    @property
    def calls(self) -> int:
        """The transformer's calls in one measurement."""
        return len(self._calls) + sum(len(batch.timesteps) for batch in self._work)

    @property
    def timesteps(self) -> list[float]:
        """Where the velocity is compared."""
        return sorted({call.timestep for call in self._calls}, reverse=True)

    @torch.no_grad()
    def measure(self, after_call: Callable[[], None] = lambda: None) -> Damage:
        """The damage of what the transformer's quantizers do now."""
        errors: dict[tuple[float, str], list[float]] = {}
        distances = []
        for call in self._calls:
            velocity = _finite(self._transformer(**call.arguments)[0])
            kinds = _ROWS if self._guided else _ROWS[1:]
            rows = zip(
                kinds,
                velocity.double().chunk(len(kinds)),
                call.velocity.double().chunk(len(kinds)),
                strict=True,
            )
            for kind, found, expected in rows:
                found, expected = found.flatten(1), expected.flatten(1)
                relative = (found - expected).norm(dim=1) / expected.norm(dim=1)
                errors.setdefault((call.timestep, kind), []).extend(relative.tolist())
                distances += (1 - torch.cosine_similarity(found, expected, dim=1)).tolist()
            after_call()
        by_timestep: dict[str, dict[str, float]] = {}
        for (timestep, kind), values in sorted(errors.items(), reverse=True):
            by_timestep.setdefault(f"{timestep:.1f}", {})[kind] = _rms(values)
        pictures = [
            picture for batch in self._work for picture in self._decoded(self._denoiser(batch, after_call))
        ]
        return Damage(
            velocity_error=_rms([value for values in errors.values() for value in values]),
            cosine_distance=max(float(np.mean(distances)), 0.0),
            by_timestep=by_timestep,
            ssim=tuple(similarity(a, b) for a, b in zip(pictures, self._pictures, strict=True)),
        )

    def _recorded(self, batch: Batch, chosen: list[int], after_step: Callable[[], None]) -> list[_Call]:
        """Run a batch for the reference; the calls of the chosen steps."""
        calls: list[_Call] = []
        step = 0

        def record(_: Any, __: Any, arguments: dict[str, Any], output: tuple[Tensor, ...]) -> None:
            nonlocal step
            if step in chosen:
                calls.append(_Call(round(batch.timesteps[step], 3), arguments, _finite(output[0])))
            step += 1

        handle = self._transformer.register_forward_hook(record, with_kwargs=True)
        try:
            latents = self._denoiser(batch, after_step)
        finally:
            handle.remove()
        self._pictures += self._decoded(latents)
        return calls

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> list[Picture]:
        """Latents [prompts, C, h, w] → pictures [8h, 8w, 3], one after the other."""
        pictures = []
        for latent in latents.split(1):
            scaled = latent / self._family.vae_scaling_factor + self._family.vae_shift_factor
            image = self._vae.decode(scaled.float(), return_dict=False)[0][0]
            values = (image.float() / 2 + 0.5).clamp(0, 1) * 255
            pictures.append(values.round().byte().permute(1, 2, 0).cpu().numpy())
        return pictures


def similarity(one: Picture, other: Picture) -> float:
    """SSIM of two pictures, with the Gaussian window of 11 pixels of Wang et al. (2004)."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            one,
            other,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def _finite(velocity: Tensor) -> Tensor:
    if not torch.isfinite(velocity).all():
        raise QuantizationError(
            "the MMDiT's velocity is not finite, expected numbers that its dtype holds: scan the checkpoint "
            "for overflow (`make onnx`), and study it with the remedies"
        )
    return velocity


def _work(
    family: Family, checkpoint: Path, prompts: Sequence[tuple[str, str]], steps: int, seed: int
) -> list[Batch]:
    """The prompts encoded, at the family's default size and on the scheduler's own timesteps."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint / "scheduler")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        checkpoint, transformer=None, vae=None, dtype=dtype(), local_files_only=True
    )
    if device().type == "cuda":
        pipeline.enable_model_cpu_offload()
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    work = []
    starts = range(0, len(prompts), _BATCH)
    with torch.no_grad(), Progress("encoding prompts", len(starts), "batches") as progress:
        for index, start in enumerate(starts):
            part = prompts[start : start + _BATCH]
            texts = pipeline.encode_prompt(
                [prompt for prompt, _ in part],
                None,
                None,
                negative_prompt=[negative for _, negative in part],
                max_sequence_length=family.t5_tokens,
            )
            encoded = {name: text.half().cpu() for name, text in zip(names, texts, strict=True)}
            size = (family.default_size, family.default_size)
            work.append(Batch(texts=encoded, seed=seed + index, size=size, timesteps=timesteps))
            progress.advance()
    return work


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
