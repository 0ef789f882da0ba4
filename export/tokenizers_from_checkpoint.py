"""Checkpoint → three `tokenizers` files that pad and truncate as SD3's pipeline does.

The server reads them with the `tokenizers` library alone.
"""

from pathlib import Path

import export.quiet  # noqa: F401  isort: skip
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mmdit.errors import CheckpointError, first_line
from mmdit.family import CLIP_TOKENS, TOKENIZERS, Family


def write_tokenizers(family: Family, checkpoint: Path, folder: Path) -> None:
    """Write `clip_l.json`, `clip_g.json` and `t5.json`, checked against transformers' own answers.

    Raises CheckpointError when a tokenizer cannot be read, or answers differently after conversion.
    """
    for component, part in TOKENIZERS.items():
        length = family.t5_tokens if component == "t5" else CLIP_TOKENS
        try:
            original = AutoTokenizer.from_pretrained(checkpoint / part, local_files_only=True)
        except Exception as error:  # of a damaged file; the library raises nothing more specific
            raise CheckpointError(
                f"{checkpoint / part} cannot be read ({first_line(error)}): download it again"
            ) from None
        converted = Tokenizer.from_str(original.backend_tokenizer.to_str())
        converted.enable_truncation(length)
        converted.enable_padding(length=length, pad_id=original.pad_token_id, pad_token=original.pad_token)
        for text in ("", "a red square", "Füße 飛 🙂 “naïve”…\n", "word " * 600):
            expected = original(text, padding="max_length", max_length=length, truncation=True)
            if converted.encode(text).ids != expected["input_ids"]:
                raise CheckpointError(
                    f"{checkpoint / part}: the converted tokenizer reads {text[:24]!r} differently"
                )
        converted.save(str(folder / f"{component}.json"))
