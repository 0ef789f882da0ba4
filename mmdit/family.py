"""A model family: everything about a checkpoint that the stages need, read from its own config files.

SD3.5 Medium, Large, Large Turbo and the miniature differ only in what their `config.json` files say;
nothing about their sizes is written here. Only the defaults of a request (steps, guidance) are a table.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mmdit.errors import CheckpointError, ContractError

# The parts of a StableDiffusion3Pipeline checkpoint, and the components that are made from them.
PARTS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "mmdit": "transformer",
    "vae_decoder": "vae",
}
TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}

CLIP_TOKENS = 77
T5_MAX_TOKENS = 512  # diffusers' limit; T5 itself has none
VAE_SCALE = 8  # pixels per latent, of every SD3 VAE

# (steps, guidance scale) from the model cards; a guidance of 1 or less runs one row instead of two.
DEFAULTS = {"medium": (40, 4.5), "large": (28, 3.5), "large-turbo": (4, 1.0), "custom": (20, 4.5)}
_LAYERS = {24: "medium", 38: "large"}

# Scheduler settings that would change the sigmas in ways that `serve/denoise.py` does not implement.
_UNSUPPORTED_SCHEDULER = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


class Family(BaseModel):
    """What a checkpoint is. Sizes in elements; lengths in tokens; `max_latent` in latent pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    variant: str
    layers: int
    clip_l_dim: int
    clip_l_pooled: int
    clip_g_dim: int
    clip_g_pooled: int
    t5_dim: int
    t5_tokens: int
    context_dim: int
    pooled_dim: int
    latent_channels: int
    patch_size: int
    max_latent: int
    default_size: int  # height and width in pixels
    vae_scaling_factor: float
    vae_shift_factor: float
    train_timesteps: int
    shift: float
    steps: int
    guidance_scale: float

    @property
    def context_tokens(self) -> int:
        """Tokens of the joint context: CLIP's, then T5's."""
        return CLIP_TOKENS + self.t5_tokens

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return VAE_SCALE * self.patch_size


def family_from_checkpoint(
    folder: Path, *, name: str | None = None, variant: str | None = None, t5_tokens: int = 256
) -> Family:
    """Read the family of a checkpoint in diffusers format.

    `variant` overrides what the layer count and the name tell; `t5_tokens` is the one length to which
    T5 pads every prompt. Raises CheckpointError for a folder that is no SD3 checkpoint, lacks a part,
    or has parts that do not fit together; ContractError for a length that T5 is not used with.
    """
    index = _read(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise CheckpointError(
            f"{folder}/model_index.json says {index.get('_class_name')!r}, expected "
            "'StableDiffusion3Pipeline': give a Stable Diffusion 3.5 checkpoint in diffusers format"
        )
    missing = [
        part
        for part in [*PARTS.values(), *TOKENIZERS.values(), "scheduler"]
        if not (folder / part).is_dir() or index.get(part) in (None, [None, None])
    ]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: a checkpoint needs every part of "
            "StableDiffusion3Pipeline; download it again, or save it with save_pretrained"
        )
    clip_l = _read(folder / "text_encoder/config.json")
    clip_g = _read(folder / "text_encoder_2/config.json")
    t5 = _read(folder / "text_encoder_3/config.json")
    mmdit = _read(folder / "transformer/config.json")
    vae = _read(folder / "vae/config.json")
    scheduler = _read(folder / "scheduler/scheduler_config.json")

    unsupported = [key for key in _UNSUPPORTED_SCHEDULER if scheduler.get(key)]
    if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or unsupported:
        raise CheckpointError(
            f"{folder}/scheduler: {scheduler.get('_class_name')} with {unsupported or 'its settings'} "
            "is not served; expected FlowMatchEulerDiscreteScheduler with a static shift, as SD3.5 has"
        )
    if not 1 <= t5_tokens <= T5_MAX_TOKENS:
        raise ContractError(f"{t5_tokens} T5 tokens were asked for: expected 1 to {T5_MAX_TOKENS}")
    name = name or folder.resolve().name
    if variant is None:
        variant = _LAYERS.get(mmdit.get("num_layers", 0), "custom")
        if variant == "large" and "turbo" in f"{name} {mmdit.get('_name_or_path', '')}".lower():
            variant = "large-turbo"
    if variant not in DEFAULTS:
        raise CheckpointError(f"variant {variant!r} is unknown: expected one of {', '.join(DEFAULTS)}")
    steps, guidance_scale = DEFAULTS[variant]
    try:
        family = Family(
            name=name,
            variant=variant,
            layers=mmdit["num_layers"],
            clip_l_dim=clip_l["hidden_size"],
            clip_l_pooled=clip_l["projection_dim"],
            clip_g_dim=clip_g["hidden_size"],
            clip_g_pooled=clip_g["projection_dim"],
            t5_dim=t5["d_model"],
            t5_tokens=t5_tokens,
            context_dim=mmdit["joint_attention_dim"],
            pooled_dim=mmdit["pooled_projection_dim"],
            latent_channels=mmdit["in_channels"],
            patch_size=mmdit["patch_size"],
            max_latent=mmdit["pos_embed_max_size"] * mmdit["patch_size"],
            default_size=mmdit["sample_size"] * VAE_SCALE,
            vae_scaling_factor=vae["scaling_factor"],
            vae_shift_factor=vae["shift_factor"],
            train_timesteps=scheduler["num_train_timesteps"],
            shift=scheduler["shift"],
            steps=steps,
            guidance_scale=guidance_scale,
        )
        _check_parts_fit(folder, family, clip_l, clip_g, vae)
    except KeyError as error:
        raise CheckpointError(f"{folder}: a config.json lacks {error}: download it again") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        raise CheckpointError(
            f"{folder}: a config.json has {wrong['input']!r} where {wrong['loc'][0]} comes from "
            f"({wrong['msg']}): download it again"
        ) from None
    except TypeError as error:
        raise CheckpointError(
            f"{folder}: a config.json has a value of a wrong type ({error}): download it again"
        ) from None
    return family


def _check_parts_fit(
    folder: Path,
    family: Family,
    clip_l: dict[str, Any],
    clip_g: dict[str, Any],
    vae: dict[str, Any],
) -> None:
    widths = {
        "T5's d_model must equal the transformer's joint_attention_dim": (
            family.t5_dim,
            family.context_dim,
        ),
        "the CLIP projections must add up to pooled_projection_dim": (
            family.clip_l_pooled + family.clip_g_pooled,
            family.pooled_dim,
        ),
        "the VAE's latent_channels must equal the transformer's in_channels": (
            vae["latent_channels"],
            family.latent_channels,
        ),
        f"the VAE must scale by {VAE_SCALE}": (
            2 ** (len(vae["block_out_channels"]) - 1),
            VAE_SCALE,
        ),
        f"CLIP-L must read {CLIP_TOKENS} tokens": (clip_l["max_position_embeddings"], CLIP_TOKENS),
        f"CLIP-G must read {CLIP_TOKENS} tokens": (clip_g["max_position_embeddings"], CLIP_TOKENS),
    }
    for rule, (found, expected) in widths.items():
        if found != expected:
            raise CheckpointError(f"{folder}: {rule}, but found {found} and {expected}")
    if family.clip_l_dim + family.clip_g_dim > family.context_dim:
        raise CheckpointError(
            f"{folder}: CLIP's widths {family.clip_l_dim} + {family.clip_g_dim} exceed the context's "
            f"{family.context_dim}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: expected a Stable Diffusion 3.5 checkpoint in diffusers format"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
