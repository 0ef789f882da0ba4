"""Random weights that behave: smooth colourful pictures, and no value that FP16 cannot hold.

Every matrix is drawn from N(0, gain² / fan-in), so that a layer keeps the size of what it reads. On
top of that three things make the picture one to look at instead of noise:

- The final projection is the transpose of the patch embedding, as if both were tied. The velocity
  then points along the latent, as in a trained model (velocity = noise − picture): noise dies out.
- The token embeddings and the attention are much larger than the libraries' 0.02 would make them,
  or every prompt would have the same embedding.
- The VAE decoder's 3×3 kernels mix the channels at random and, near the latent, blur the picture.
"""

import hashlib
import math

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Generator, Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from miniature.configs import MODELS, TEXT_ENCODER_3

# Chosen by the velocity's spread and by looking at pictures; README.md has what was measured.
PROJECTION_GAIN = 0.4  # of the tied part of the final projection: a velocity of about 1
ATTENTION_GAIN = 1.6  # weights of q's and k's RMS norm: attention picks tokens, not their average
TEXT_GAIN = 4.0  # values of the text tokens, or all 333 of them average out
T5_GAIN = 2.0  # queries of T5: padding, most of its 256 tokens, then reads the prompt
CONTRAST = 1.0  # of the picture
DETAIL = 0.15  # the random part of the decoder's kernels
BLURRED = (
    "conv_in",
    "mid_block.resnets",
    "up_blocks.0.resnets.0.conv",
    "up_blocks.0.resnets.1.conv",
    "upsamplers",
)


def state_dict(part: str, seed: int) -> dict[str, Tensor]:
    """The tensors of one part in FP16, named and shaped as diffusers or transformers wants them.

    Each tensor has its own random stream, from the seed, the part and its name: a layer more or
    less changes no other tensor.
    """
    rule = {"transformer": _transformer, "vae": _vae}.get(part, _text_encoder)
    tensors = {}
    for name, default in _default_model(part).state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue  # T5's second name for shared.weight, which files do not hold
        if name == "pos_embed.pos_embed":
            tensors[name] = default.half()  # sines and cosines, not random
            continue
        stream = hashlib.sha256(f"{seed}/{part}/{name}".encode()).digest()
        generator = Generator().manual_seed(int.from_bytes(stream[:7], "little"))
        tensors[name] = rule(name, default.shape, generator).half().contiguous()
    if part == "transformer":
        # [192, 16, 2, 2] to [2·2·16, 192]: proj_out's rows are ordered (row, column, channel).
        embedding = tensors["pos_embed.proj.weight"].float()
        tied = embedding.permute(2, 3, 1, 0).reshape(-1, embedding.shape[0])
        tensors["proj_out.weight"] = (PROJECTION_GAIN * tied + tensors["proj_out.weight"]).half()
    return tensors


def _default_model(part: str) -> torch.nn.Module:
    config = MODELS[part]
    if part == "transformer":
        return SD3Transformer2DModel.from_config(config)
    if part == "vae":
        return AutoencoderKL.from_config(config)
    if part == "text_encoder_3":
        return T5EncoderModel(T5Config(**config))
    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def _matrix(shape: torch.Size, generator: Generator, gain: float = 1.0) -> Tensor:
    fan_in = math.prod(shape[1:])
    return torch.randn(shape, generator=generator) * (gain / math.sqrt(fan_in))


def _vector(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    if name.endswith("weight"):  # of a norm
        return torch.ones(shape)
    return 0.02 * torch.randn(shape, generator=generator)


def _text_encoder(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    if len(shape) == 1:
        return _vector(name, shape, generator)
    if "token_embedding" in name or "shared" in name or "relative_attention_bias" in name:
        return torch.randn(shape, generator=generator)
    if "position_embedding" in name:
        return 0.3 * torch.randn(shape, generator=generator)
    if name.endswith("SelfAttention.q.weight"):  # T5 does not divide by the root of the head size
        return _matrix(shape, generator, T5_GAIN / math.sqrt(TEXT_ENCODER_3["d_kv"]))
    return _matrix(shape, generator)


def _transformer(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_k.weight")):
        return ATTENTION_GAIN * torch.ones(shape)
    if len(shape) == 1:
        return _vector(name, shape, generator)
    if "norm" in name:  # AdaLN: shifts, scales and gates from the timestep and the pooled text
        return _matrix(shape, generator, 0.5)
    if "add_v_proj" in name:
        return _matrix(shape, generator, TEXT_GAIN)
    return _matrix(shape, generator, 0.5 if name == "proj_out.weight" else 1.0)


def _vae(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    if len(shape) == 1:
        return _vector(name, shape, generator)
    if len(shape) == 2 or shape[-1] == 1 or not name.startswith("decoder"):
        return _matrix(shape, generator)
    line = torch.tensor([0.0, 1.0, 0.0])
    if any(where in name for where in BLURRED):
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
    mix = _matrix(shape[:2], generator)[:, :, None, None]
    detail = _matrix(shape, generator)
    if name == "decoder.conv_out.weight":
        return CONTRAST * mix * torch.outer(line, line)
    return mix * torch.outer(line, line) + DETAIL * detail
