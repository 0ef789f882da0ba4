"""Prompts to token ids, and three encoders' answers to one context."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .errors import RequestError


class PromptTokenizers:
    """The three tokenizers of SD3, with padding and truncation as the checkpoint's pipeline has them."""

    def __init__(self, folder: Path, encoders: tuple[str, ...]) -> None:
        self._tokenizers = {
            encoder: Tokenizer.from_file(str(folder / f"{encoder}.json")) for encoder in encoders
        }

    def __call__(self, prompt: str) -> tuple[dict[str, npt.NDArray[np.int64]], bool]:
        """Encoder → `input_ids` INT64 [1, tokens], and whether the prompt was too long for one of them."""
        ids, truncated = {}, False
        for encoder, tokenizer in self._tokenizers.items():
            encoding = tokenizer.encode(prompt)
            ids[encoder] = np.array([encoding.ids], np.int64)
            truncated |= bool(encoding.overflowing)
        return ids, truncated


def prompt_text(value: Any, name: str, max_bytes: int) -> str:
    """The text of a BYTES tensor's element; raises RequestError when it is too long or no UTF-8."""
    raw = value if isinstance(value, bytes) else str(value).encode()
    if len(raw) > max_bytes:
        raise RequestError(f"{name} has {len(raw)} bytes: expected at most {max_bytes}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is no UTF-8 text ({error})") from None


def join(
    hidden: dict[str, npt.NDArray[np.float16]], pooled: dict[str, npt.NDArray[np.float16]], width: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """One row's context [77 + S, width] and pooled [P], from the encoders' rows.

    CLIP-L's and CLIP-G's hidden states stand side by side, padded with zeros to `width`, T5's follow
    (diffusers, StableDiffusion3Pipeline.encode_prompt).
    """
    clip = np.concatenate([hidden["clip_l"][0], hidden["clip_g"][0]], axis=-1)  # [77, D_l + D_g]
    clip = np.pad(clip, [(0, 0), (0, width - clip.shape[-1])])
    context = np.concatenate([clip, hidden["t5"][0]])
    return context, np.concatenate([pooled["clip_l"][0], pooled["clip_g"][0]])
