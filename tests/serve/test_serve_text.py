"""Prompts to token ids and to one context, against the checkpoint's own tokenizers."""

import numpy as np
import pytest

from mmdit.contract import TEXT_ENCODERS
from mmdit.family import TOKENIZERS
from serve.inside.text import PromptTokenizers, join, prompt_text


@pytest.fixture(scope="module")
def tokenizers(build):
    """The exported tokenizers, as the text_encoder model loads them."""
    return PromptTokenizers(build.tokenizers, TEXT_ENCODERS)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red square",
        "wow! stop!!",
        "Füße 飛行機 🙂 مرحبا",
        "tabs\tand\nlines",
        "word " * 400,
        "\u0000\u200b",
    ],
)
def test_token_ids_are_those_of_the_checkpoints_tokenizers(tokenizers, miniature, prompt):
    """Padding, truncation and special tokens as transformers does them for SD3's pipeline."""
    from transformers import AutoTokenizer

    ids, _ = tokenizers(prompt)
    for encoder, part in TOKENIZERS.items():
        length = 256 if encoder == "t5" else 77
        original = AutoTokenizer.from_pretrained(miniature / part)
        expected = original(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
        assert ids[encoder].tolist() == [expected]
        assert ids[encoder].dtype == np.int64


def test_a_prompt_is_truncated_from_the_first_token_too_many(tokenizers):
    """75 tokens between CLIP's start and end fit, 76 do not."""
    one_token = "a "
    assert tokenizers(one_token * 75)[1] is False
    assert tokenizers(one_token * 76)[1] is True


def test_the_context_is_laid_out_as_in_diffusers():
    """CLIP-L beside CLIP-G, zeros up to the width, T5 behind; the pooled side by side."""
    hidden = {
        "clip_l": np.full((1, 77, 2), 1, np.float16),
        "clip_g": np.full((1, 77, 3), 2, np.float16),
        "t5": np.full((1, 4, 8), 3, np.float16),
    }
    pooled = {"clip_l": np.full((1, 2), 4, np.float16), "clip_g": np.full((1, 3), 5, np.float16)}
    context, joined = join(hidden, pooled, width=8)
    assert context.shape == (81, 8)
    assert context[0].tolist() == context[76].tolist() == [1, 1, 2, 2, 2, 0, 0, 0]
    assert context[77].tolist() == [3] * 8
    assert joined.tolist() == [4, 4, 5, 5, 5]


@pytest.mark.parametrize(
    ("value", "message"),
    [(b"x" * 9, "prompt has 9 bytes: expected at most 8"), (b"\xff", "prompt is no UTF-8 text")],
)
def test_a_prompt_that_cannot_be_read_is_named(value, message):
    """Too many bytes, or bytes that are no text."""
    with pytest.raises(ValueError, match=message):
        prompt_text(value, "prompt", 8)
