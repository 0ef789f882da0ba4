"""Trains the 16-channel VAE: on small random crops first, then on whole pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor
from torch.nn import functional

from miniature.configs import VAE
from miniature.scenes import Scene, draw, scenes

LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-5
MOMENT_WEIGHT = 0.02
FIRST_LOG_VARIANCE = -4.6
# until which part of the training, side of the crops (None: the whole picture), pictures a step
PHASES = ((0.3, 32, 48), (0.6, 64, 16), (1.0, None, 8))


class VaeStage:
    """The VAE's training; `steps` is its length, `seed` draws weights and data."""

    name = "vae"
    sample_every = 250

    def __init__(self, *, seed: int, steps: int, device: str = "cpu") -> None:
        self.seed, self.steps, self.device = seed, steps, device
        self.settings: dict[str, Any] = {
            "adam": LEARNING_RATE,
            "loss": [KL_WEIGHT, MOMENT_WEIGHT],
            "schedule": [list(row) for row in PHASES],
        }
        torch.manual_seed(seed)
        self.vae = AutoencoderKL.from_config(VAE).to(memory_format=torch.channels_last)
        channels = VAE["latent_channels"]
        with torch.no_grad():
            # The posterior starts narrow, or its noise drowns what the encoder has to say.
            self.vae.encoder.conv_out.bias[channels:] = FIRST_LOG_VARIANCE
            self.vae.encoder.conv_out.weight[channels:] *= 0.1
        self.vae.to(device)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
        self.seen = [scene for scene in scenes() if not scene.held_out]
        self.unseen = [scene for scene in scenes() if scene.held_out]

    def step(self, number: int) -> float:
        """One step of Adam on L1 + MSE + a little KL; the rate falls as a cosine."""
        part = number / self.steps
        side, count = next((side, count) for end, side, count in PHASES if part < end)
        rate = (
            LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part))) * min(1, (number + 1) / 50)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng([self.seed, number])
        pictures = to_tensor([crop(self._scene(rng), side, rng) for _ in range(count)]).to(self.device)
        posterior = self.vae.encode(pictures).latent_dist
        output = self.vae.decode(posterior.sample()).sample
        error = output - pictures
        loss = error.abs().mean() + error.square().mean()
        loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        loss = loss + MOMENT_WEIGHT * moments(posterior.mean)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _scene(self, rng: np.random.Generator) -> Scene:
        return self.seen[rng.integers(len(self.seen))]

    def state(self) -> dict[str, Any]:
        """Weights and Adam's moments."""
        return {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def sample(self, path: Path) -> dict[str, float]:
        """Held-out scenes above their reconstructions; the PSNR in dB over 64 of them."""
        rng = np.random.default_rng(0)
        pictures = [draw(self.unseen[rng.integers(len(self.unseen))], 128, 128, rng) for _ in range(64)]
        made = reconstruct(self.vae, pictures)
        rows = [np.concatenate(row[:8], axis=1) for row in (pictures, made)]
        Image.fromarray(np.concatenate(rows)).save(path)
        return {
            "PSNR (dB)": float(
                np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(pictures, made, strict=True)])
            )
        }


def crop(scene: Scene, side: int | None, rng: np.random.Generator) -> np.ndarray:
    """A scene's picture, or a random square of it, uint8 [side, side, 3]."""
    picture = draw(scene, 128, 128, rng)
    if side is None:
        return picture
    y, x = rng.integers(0, 128 - side + 1, 2)
    return picture[y : y + side, x : x + side]


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [h, w, 3] pictures to FP32 [N, 3, h, w] between -1 and 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(output: Tensor) -> list[np.ndarray]:
    """[N, 3, h, w] between -1 and 1 to uint8 [h, w, 3] pictures."""
    return list(((output + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures after the VAE's encoder and decoder, eight at a time."""
    made: list[np.ndarray] = []
    for start in range(0, len(pictures), 8):
        latents = vae.encode(to_tensor(pictures[start : start + 8]).to(vae.device)).latent_dist.mode()
        made += to_pictures(vae.decode(latents).sample)
    return made


def moments(latents: Tensor) -> Tensor:
    """How far each channel's mean and deviation are from what the real scale and shift expect.

    latents: [N, 16, h, w]. With both right, (latents - shift_factor) * scaling_factor has mean 0 and
    deviation 1 in every channel: the MMDiT sees no channel that is too faint to learn.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    return functional.mse_loss(mean, torch.full_like(mean, VAE["shift_factor"])) + functional.mse_loss(
        deviation, torch.full_like(deviation, 1 / VAE["scaling_factor"])
    )
