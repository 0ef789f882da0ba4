"""Files that lie in the real repositories and that nothing here may load.

The real ones hold the same weights again: a single-file checkpoint, the text encoders for it, and
the text encoders once more under FP16 names. Here each is a few bytes: a tensor of a real name,
with a wrong shape and no number in it, so that a loader which takes it by mistake fails.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

DECOYS = {
    "sd3.5_medium.safetensors": "model.diffusion_model.x_embedder.proj.weight",
    "text_encoders/clip_g.safetensors": "text_model.embeddings.token_embedding.weight",
    "text_encoders/clip_l.safetensors": "text_model.embeddings.token_embedding.weight",
    "text_encoders/t5xxl_fp16.safetensors": "shared.weight",
    "text_encoders/t5xxl_fp8_e4m3fn.safetensors": "shared.weight",
    "text_encoder/model.fp16.safetensors": "text_model.embeddings.token_embedding.weight",
    "text_encoder_2/model.fp16.safetensors": "text_model.embeddings.token_embedding.weight",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors": "shared.weight",
    "text_encoder_3/model.fp16-00002-of-00002.safetensors": "encoder.final_layer_norm.weight",
}
FP16_INDEX = "text_encoder_3/model.safetensors.index.fp16.json"  # "fp16" stands before .json


def write_decoys(folder: Path) -> None:
    """Write the stand-ins into a checkpoint's folder: one tensor [1] each, FP16, not a number."""
    (folder / "text_encoders").mkdir()
    for path, tensor in DECOYS.items():
        nothing = torch.full((1,), float("nan"), dtype=torch.float16)
        save_file({tensor: nothing}, folder / path, metadata={"format": "pt"})
    shards = {
        tensor: Path(path).name for path, tensor in DECOYS.items() if path.startswith("text_encoder_3/")
    }
    index = {"metadata": {"total_size": 2 * len(shards)}, "weight_map": shards}
    (folder / FP16_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
