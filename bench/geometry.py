"""A checkpoint of SD3.5's real geometry with random weights, to measure what the export needs.

    python -m bench.geometry medium big/sd35-medium
    /usr/bin/time -v python -m export onnx --model big/sd35-medium \\
        --scan-prompts 1 --scan-steps 2 --scan-size 64x64

The MMDiT has the real shapes. The text encoders have the real widths and few layers; tokenizers, scheduler
and VAE are the miniature's. Weights are written shard by shard: no more than one is in memory.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from export.checkpoint import MINIATURE
from measure.geometry import MODELS, config_of
from mmdit.progress import Progress

_SHARD_BYTES = 2 << 30


def main() -> None:
    """Write the checkpoint into a folder."""
    parser = argparse.ArgumentParser(description="A checkpoint of SD3.5's real geometry, random weights.")
    parser.add_argument("geometry", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    shutil.copytree(MINIATURE, folder)
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        shutil.rmtree(folder / part)
    parameters = write_transformer(config_of(arguments.geometry), folder / "transformer")
    _write_text_encoders(folder)
    print(f"{folder}: {parameters / 1e9:.2f} billion parameters in the MMDiT")


def write_transformer(config: dict[str, object], folder: Path) -> int:
    """Write a transformer of `config` with random FP16 weights; returns the number of its parameters."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    model.save_config(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    total = sum(shape.numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shards = 0

    def write_shard() -> None:
        nonlocal shards
        shards += 1
        name = f"diffusion_pytorch_model-{shards:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    with Progress("random weights", total >> 20, "million") as progress:
        done = 0
        for name, shape in shapes.items():
            if name == "pos_embed.pos_embed":  # a table, not a weight
                side = int(shape[1] ** 0.5)
                table = get_2d_sincos_pos_embed(shape[2], side, base_size=64, output_type="pt")
                shard[name] = table.half().unsqueeze(0)
            elif "norm_" in name or name.endswith("norm.weight"):
                shard[name] = torch.ones(shape, dtype=torch.float16)
            else:
                shard[name] = torch.randn(shape, generator=generator).mul_(0.02).half()
            done += shape.numel()
            progress.update(done >> 20)
            if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
                write_shard()
        write_shard()
    content = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    return total


def _write_text_encoders(folder: Path) -> None:
    torch.manual_seed(0)
    for part, width, source in (
        ("text_encoder", 768, "text_encoder"),
        ("text_encoder_2", 1280, "text_encoder_2"),
    ):
        config = CLIPTextConfig.from_pretrained(MINIATURE / source)
        config.update(
            {
                "hidden_size": width,
                "projection_dim": width,
                "intermediate_size": 4 * width,
                "num_attention_heads": width // 64,
            }
        )
        CLIPTextModelWithProjection(config).half().save_pretrained(folder / part)
    t5 = T5Config.from_pretrained(MINIATURE / "text_encoder_3")
    t5.update({"d_model": 4096, "num_heads": 64, "d_kv": 64, "d_ff": 1024})
    T5EncoderModel(t5).half().save_pretrained(folder / "text_encoder_3")


if __name__ == "__main__":
    main()
