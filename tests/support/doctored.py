"""Checkpoints whose activations FP16 cannot hold, made from the miniature by scaling some of its weights.

FP32 holds them with ease: real checkpoints are like this (T5's `wo`, SD3.5 Large's last blocks).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from mmdit.family import PARTS

LIBRARY_CLASSES = {
    "clip_l": CLIPTextModelWithProjection,
    "clip_g": CLIPTextModelWithProjection,
    "t5": T5EncoderModel,
    "mmdit": SD3Transformer2DModel,
    "vae_decoder": AutoencoderKL,
}
Doctoring = Mapping[str, Mapping[str, float]]

# Component → the start of a parameter's name → its factor. Every one overflows a residual stream.
STREAMS: Doctoring = {
    "clip_l": {"text_model.encoder.layers.2.mlp.fc2": 2.0**13},
    "clip_g": {"text_model.encoder.layers.2.mlp.fc2": 2.0**12},
    "t5": {"encoder.block.1.layer.1.DenseReluDense.wo": 2.0**9},
    "mmdit": {
        "transformer_blocks.2.ff.net.2": 2.0**15,
        "transformer_blocks.3.ff.net.2": 2.0**15,
        "transformer_blocks.2.ff_context.net.2": 2.0**13,
    },
    "vae_decoder": {"decoder.up_blocks.2.upsamplers.0.conv": 2.0**12},
}
# A feed-forward's hidden product overflows, and its last linear brings the stream back to size.
HIDDEN: Doctoring = {
    "t5": {
        "encoder.block.0.layer.1.DenseReluDense.wi_1": 2.0**14,
        "encoder.block.0.layer.1.DenseReluDense.wo": 2.0**-8,
    },
    "mmdit": {
        "transformer_blocks.1.ff_context.net.0": 2.0**14,
        "transformer_blocks.1.ff_context.net.2": 2.0**-8,
    },
}


def doctored(miniature: Path, doctoring: Doctoring, folder: Path) -> Path:
    """A copy of the miniature with some weights (and their biases) multiplied."""
    shutil.copytree(miniature, folder)
    for component, factors in doctoring.items():
        part = folder / PARTS[component]
        model = LIBRARY_CLASSES[component].from_pretrained(part, dtype=torch.float32, use_safetensors=True)
        for start, factor in factors.items():
            found = [weight for name, weight in model.named_parameters() if name.startswith(start)]
            assert found, start
            with torch.no_grad():
                for weight in found:
                    weight.mul_(factor)
        for old in (*part.glob("*.safetensors"), *part.glob("*.index*.json")):
            old.unlink()
        model.save_pretrained(part)
    return folder
