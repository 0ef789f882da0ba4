"""A whole training in one folder: tokenizers, the VAE, the MMDiT with its text encoders; and its result."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from miniature.captions import captions
from miniature.checkpoint import TOKENIZERS, check_whole, write_checkpoint, write_record
from miniature.clip_vocabulary import write_clip_tokenizers
from miniature.mmdit_training import MmditStage
from miniature.t5_vocabulary import write_t5_tokenizer
from miniature.training import alone, read_state
from miniature.training import train as train_stage
from miniature.vae_training import VaeStage
from mmdit.errors import CheckpointError


def train(
    folder: Path, *, seed: int, minutes: float, vae_steps: int, steps: int, start: Path | None = None
) -> bool:
    """Train for about `minutes`, from where `folder` stopped; whether all of it is done.

    It runs on a GPU where PyTorch finds one. With `start`, a miniature, its VAE is taken as it is and
    the rest trained on from its weights, as a training of its own. Raises CheckpointError when a file that
    it needs is damaged or of another training, or another process trains in `folder`.
    """
    deadline = time.monotonic() + 60 * minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = None if start is None else _checked(start)
    with alone(folder):
        tokenizers = _tokenizers(folder, start)
        if start is None:
            stage = VaeStage(seed=seed, steps=vae_steps, device=device)
            if not train_stage(stage, folder, seed=seed, deadline=deadline):
                return False
            vae = stage.vae
        else:
            vae = AutoencoderKL.from_pretrained(start, subfolder="vae", torch_dtype=torch.float32)
        if time.monotonic() >= deadline:
            return False
        mmdit = MmditStage(
            vae.to(memory_format=torch.channels_last),
            (
                CLIPTokenizer.from_pretrained(tokenizers / TOKENIZERS[0]),
                CLIPTokenizer.from_pretrained(tokenizers / TOKENIZERS[1]),
                T5TokenizerFast.from_pretrained(tokenizers / TOKENIZERS[2]),
            ),
            folder,
            seed=seed,
            steps=steps,
            start=None if start is None else _models(start),
            started=started,
            device=device,
        )
        return train_stage(mmdit, folder, seed=seed, deadline=deadline)


def write(folder: Path, output: Path) -> int:
    """Write the checkpoint of the training in `folder`, with the averaged weights; its size in bytes.

    Raises CheckpointError when the training has not got so far, or a file of it is damaged.
    """
    record = {}
    for name in ("vae", "mmdit"):
        path = folder / f"{name}.pt"
        if path.exists():
            found = read_state(path)
            record[name] = {
                "settings": found["settings"],
                "steps": found["step"],
                "minutes": round(found["seconds"] / 60),
            }
        elif name == "mmdit":
            raise CheckpointError(f"{path} is not there: run `python -m miniature train` first")
    states: dict[str, dict[str, torch.Tensor]] = {"vae": found["stage"]["vae"]}
    for name, tensor in found["stage"]["average"].items():
        part, _, rest = name.partition(".")
        states.setdefault(part, {})[rest] = tensor
    return write_checkpoint(output, states, _tokenizers(folder, None), record)


def _checked(start: Path) -> dict[str, Any]:
    try:
        return check_whole(start)["training"]
    except CheckpointError as error:
        raise CheckpointError(f"{error}: restore it, or choose another --start") from None


def _tokenizers(folder: Path, start: Path | None) -> Path:
    """`folder/tokenizers`, made whole or copied from `start` if it is not there; checked if it is."""
    place = folder / "tokenizers"
    if place.exists():
        try:
            check_whole(place)
        except CheckpointError as error:
            raise CheckpointError(f"{error}: remove it to make it again") from None
        return place
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizers-") as beside:
        made = Path(beside) / "made"
        made.mkdir()
        if start is None:
            sentences = captions()
            write_clip_tokenizers(made, sentences)
            write_t5_tokenizer(made, sentences)
        else:
            for name in TOKENIZERS:
                shutil.copytree(start / name, made / name)
        write_record(made)
        made.rename(place)
    return place


def _models(checkpoint: Path) -> dict[str, Any]:
    """The weights of a miniature, named as in TextToVelocity."""
    classes = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
        "transformer": SD3Transformer2DModel,
    }
    return {
        f"{part}.{name}": tensor.float()
        for part, kind in classes.items()
        for name, tensor in kind.from_pretrained(checkpoint, subfolder=part).state_dict().items()
    }
