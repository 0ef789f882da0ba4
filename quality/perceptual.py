"""LPIPS and CLIP score, where their libraries and weights lie on this machine; nothing is downloaded.

Neither is among the dependencies. torchmetrics and torchvision with AlexNet's weights in torch hub's cache
give LPIPS; CLIP's weights in the Hugging Face cache give the CLIP score.
"""

import os
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet_Weights.IMAGENET1K_V1
CLIP = "openai/clip-vit-base-patch16"


def weights() -> list[Path]:
    """Where LPIPS's and CLIP's weights would lie; loads no torch."""
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    from huggingface_hub.constants import HF_HUB_CACHE

    clip = f"models--{CLIP.replace('/', '--')}"
    return [Path(torch_home).expanduser() / "hub/checkpoints" / ALEXNET, Path(HF_HUB_CACHE) / clip]


class Absent(Exception):
    """A figure cannot be measured here; the message says why."""


def lpips(pairs: list[tuple[Picture, Picture]]) -> list[float]:
    """LPIPS (Zhang et al. 2018, AlexNet) of each pair of pictures; 0 is the same picture. Raises Absent."""
    for library in ("torchmetrics", "torchvision"):
        if util.find_spec(library) is None:
            raise Absent(f"{library} is not installed")
    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        raise Absent(f"AlexNet's weights are not there: {ALEXNET} belongs into torch hub's cache")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric: Any = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()

    def unit(picture: Picture) -> Any:
        return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255

    with torch.no_grad():
        return [float(metric(unit(one), unit(other))) for one, other in pairs]


def clip_scores(prompts: list[str], pictures: list[Picture], model: str = CLIP) -> list[float]:
    """100 × the cosine of each picture's and its prompt's CLIP embeddings. Raises Absent."""
    import export.quiet  # noqa: F401  isort: skip
    import torch
    from transformers import CLIPModel, CLIPProcessor

    try:
        loaded: Any = CLIPModel.from_pretrained(model, local_files_only=True).eval()
        processor: Any = CLIPProcessor.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, ImportError):
        raise Absent(f"{model} is not in the Hugging Face cache") from None

    scores = []
    with torch.no_grad():
        for prompt, picture in zip(prompts, pictures, strict=True):
            inputs = processor(
                text=[prompt], images=[picture], return_tensors="pt", padding=True, truncation=True
            )
            found = loaded(**inputs)
            scores.append(100 * float((found.image_embeds * found.text_embeds).sum()))
    return scores
