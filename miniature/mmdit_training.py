"""Trains the MMDiT together with its three text encoders, by rectified flow on the VAE's latents."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from miniature.configs import SCHEDULER, TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, TRANSFORMER, VAE
from miniature.grammar import caption
from miniature.latents import SIZES, digest, latent_pools
from miniature.muon import Muon
from miniature.reader import read, score
from miniature.scenes import scenes
from miniature.vae_training import to_pictures

MUON_RATE = 0.02
MUON_DECAY = 0.1
ADAM_RATE = 2e-3
WARM_UP = 100  # steps
DECAY = 0.3  # of the training: the rates fall to 0
EMA = 0.998
DROPPED = 0.1  # captions replaced by "", for guidance
GUIDANCE = 4.0
CLIP_TOKENS, T5_TOKENS = 77, 256  # what is served
SHORT = 32  # tokens of each that hold every caption
# until which part of the training, how many of the steps have the context that is served
SERVED = ((0.75, 0.15), (1.0, 0.5))


class TextToVelocity(torch.nn.Module):
    """The four networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER))
        self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2))
        self.text_encoder_3 = T5EncoderModel(T5Config(**TEXT_ENCODER_3 | {"dropout_rate": 0.0}))
        self.transformer = SD3Transformer2DModel.from_config(TRANSFORMER)
        self.float()  # the configurations say float16, for the files
        initialize(self)

    def encode(self, clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [N, T], [N, T], [N, S] to context [N, T+S, 192] and pooled text [N, 160]."""
        one = self.text_encoder(clip_l, output_hidden_states=True)
        two = self.text_encoder_2(clip_g, output_hidden_states=True)
        clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        long = self.text_encoder_3(t5).last_hidden_state
        clip = torch.nn.functional.pad(clip, (0, long.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, long], dim=1), torch.cat([one.text_embeds, two.text_embeds], dim=-1)

    def forward(self, latents: Tensor, sigmas: Tensor, ids: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The velocity, as `latents` [N, 16, h, w]; sigmas [N] between 0 and 1."""
        context, pooled = self.encode(*ids)
        return self.transformer(latents, context, pooled, sigmas * 1000, return_dict=False)[0]


def initialize(model: TextToVelocity) -> None:
    """Weights to start from, where the libraries' defaults learn slowly."""
    transformer = model.transformer
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)  # every block begins as the identity (DiT's adaLN-Zero)
            torch.nn.init.zeros_(module.bias)
    for encoder in (model.text_encoder, model.text_encoder_2):
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 2:
                embedding = "embedding" in name
                deviation = (0.3 if "position" in name else 1.0) if embedding else parameter.shape[1] ** -0.5
                torch.nn.init.normal_(parameter, std=deviation)
    # T5 reads neighbours first, as if with ALiBi; otherwise 200 tokens of padding drown a caption.
    first = model.text_encoder_3.encoder.block[0].layer[0].SelfAttention
    bias = first.relative_attention_bias.weight
    distances = torch.arange(bias.shape[0]) % (bias.shape[0] // 2)
    with torch.no_grad():
        for head, slope in enumerate((0.25, 0.5, 1.0)):
            bias[:, head] = -slope * distances


def is_muons(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: the matrices inside the layers of all four networks."""
    inside = any(word in name for word in ("transformer_blocks.", ".layers.", ".block."))
    return inside and parameter.ndim == 2 and "norm" not in name and "bias" not in name


class MmditStage:
    """The training of the MMDiT and its text encoders on a trained VAE."""

    name = "mmdit"
    sample_every = 500

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizers: tuple[Any, Any, Any],
        folder: Path,
        *,
        seed: int,
        steps: int,
        start: dict[str, Tensor] | None = None,
        started: dict[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.seed, self.steps, self.tokenizers, self.device = seed, steps, tokenizers, device
        self.vae = vae.eval().to(device)
        self.settings: dict[str, Any] = {
            "started_from": started,
            "muon": [MUON_RATE, MUON_DECAY],
            "adam": ADAM_RATE,
            "schedule": [WARM_UP, DECAY, EMA, DROPPED, [list(row) for row in SERVED]],
            "vae": digest(vae),
        }
        torch.manual_seed(seed)
        self.model = TextToVelocity()
        if start is not None:
            self.model.load_state_dict(start)
        self.model.to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        named = list(self.model.named_parameters())
        matrices = [parameter for name, parameter in named if is_muons(name, parameter)]
        others = [parameter for name, parameter in named if not is_muons(name, parameter)]
        self.muon = Muon(matrices, MUON_RATE, weight_decay=MUON_DECAY)
        self.adam = torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.seen = [scene for scene in scenes() if not scene.held_out]
        self.unseen = [scene for scene in scenes() if scene.held_out]
        self.pools = latent_pools(self.vae, self.seen, folder, seed)

    def ids(self, captions: list[str], clip: int, t5: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [N, clip], [N, clip], [N, t5], padded as the pipeline pads them."""
        one, two, three = (
            tokenizer(
                captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids.to(self.device)
            for tokenizer, length in zip(self.tokenizers, (clip, clip, t5), strict=True)
        )
        return one, two, three

    def step(self, number: int) -> float:
        """One step, on many rows with a short context or on few with the served one."""
        part = number / self.steps
        rate = min(1.0, (number + 1) / WARM_UP) * min(1.0, (1 - part) / DECAY)
        for optimizer, full in ((self.muon, MUON_RATE), (self.adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
        rng = np.random.default_rng([self.seed, 8, number])
        served = rng.random() < next(share for end, share in SERVED if part < end)
        rows, clip, t5 = (16, CLIP_TOKENS, T5_TOKENS) if served else (48, SHORT, SHORT)
        size = rng.choice(len(SIZES), p=[weight for *_, weight in SIZES])
        latents, noise, sigmas, captions = self._batch(rng, size, rows)
        noisy = sigmas[:, None, None, None] * noise + (1 - sigmas[:, None, None, None]) * latents
        velocity = self.model(noisy, sigmas, self.ids(captions, clip, t5))
        loss = (velocity - (noise - latents)).square().mean()
        self.muon.zero_grad()
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.muon.step()
        self.adam.step()
        decay = min(EMA, (number + 1) / (number + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return float(loss.detach())

    def _batch(
        self, rng: np.random.Generator, size: int, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Latents and noise [rows, 16, h, w], sigmas [rows], captions."""
        pool, numbers = self.pools[size]
        chosen = rng.integers(len(pool), size=rows)
        latents = pool[torch.from_numpy(chosen)].float()
        # SD3's logit-normal timesteps, shifted like the scheduler's: more of them near the noise
        sigmas = torch.sigmoid(torch.randn(rows) + math.log(SCHEDULER["shift"]))
        captions = [
            "" if rng.random() < DROPPED else caption(self.seen[numbers[row]], rng, whole=False)
            for row in chosen
        ]
        noise = torch.randn_like(latents)  # on the CPU, as the pipeline draws it
        return latents.to(self.device), noise.to(self.device), sigmas.to(self.device), captions

    def state(self) -> dict[str, Any]:
        """Weights, their average, the optimizers' moments, and the VAE that it all rests on."""
        return {
            "vae": self.vae.state_dict(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])

    @torch.no_grad()
    def sample(self, path: Path) -> dict[str, float]:
        """Pictures of 32 held-out captions, and how many of their objects are right."""
        rng = np.random.default_rng(1)
        chosen = [self.unseen[n] for n in rng.choice(len(self.unseen), 32, replace=False)]
        captions = [caption(scene, rng) for scene in chosen]
        pictures = self.pictures(captions, 128, 128, steps=20, seed=1)
        rows = [np.concatenate(pictures[start : start + 8], axis=1) for start in range(0, 32, 8)]
        Image.fromarray(np.concatenate(rows)).save(path)
        scores = [score(read(picture), scene) for picture, scene in zip(pictures, chosen, strict=True)]
        count = sum(s.count for s in scores)
        return {
            field: sum(getattr(s, field) for s in scores) / count
            for field in ("colour", "shape", "size", "place")
        }

    @torch.no_grad()
    def pictures(
        self, captions: list[str], height: int, width: int, *, steps: int, seed: int
    ) -> list[np.ndarray]:
        """Pictures of the averaged weights, uint8 [height, width, 3], by Euler steps with guidance."""
        model = self.average
        context, pooled = model.encode(*self.ids(["", *captions], CLIP_TOKENS, T5_TOKENS))
        latents = torch.randn(
            len(captions),
            VAE["latent_channels"],
            height // 8,
            width // 8,
            generator=torch.Generator().manual_seed(seed),
        ).to(self.device)
        shift = SCHEDULER["shift"]
        times = torch.linspace(1, 1 / 1000, steps)
        times = shift * times / (1 + (shift - 1) * times)
        times = torch.cat([times, torch.zeros(1)]).to(self.device)
        made = []
        for start in range(0, len(captions), 8):
            part = latents[start : start + 8]
            n = len(part)
            texts = torch.cat([context[:1].expand(n, -1, -1), context[1 + start : 1 + start + n]])
            pools = torch.cat([pooled[:1].expand(n, -1), pooled[1 + start : 1 + start + n]])
            for now, then in zip(times[:-1], times[1:], strict=True):
                out = model.transformer(
                    torch.cat([part, part]), texts, pools, (now * 1000).expand(2 * n), return_dict=False
                )[0]
                without, with_text = out.chunk(2)
                part = part + (then - now) * (without + GUIDANCE * (with_text - without))
            output = self.vae.decode(part / VAE["scaling_factor"] + VAE["shift_factor"]).sample
            made += to_pictures(output)
        return made
