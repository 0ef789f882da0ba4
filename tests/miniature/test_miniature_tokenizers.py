"""The miniature's tokenizers: the real ones' formats and habits, for any text."""

from pathlib import Path

import diffusers
import pytest
import torch

from miniature.clip_vocabulary import byte_symbols

MADE = Path(__file__).resolve().parents[2] / "miniature" / "checkpoint"
PROMPT = "a large red circle on the left and a small blue cross on the right on a white background"
OTHER = "a photograph of an old castle by the sea, sunset"


@pytest.fixture(scope="module")
def made() -> Path:
    return MADE


@pytest.fixture(scope="module")
def pipeline(made):
    return diffusers.StableDiffusion3Pipeline.from_pretrained(made, dtype=torch.float32)


TEXTS = [
    "",
    "   ",
    "wow!",
    "Ein Bahnhof im Nebel: größer, schöner, süßer",
    "東京の夜、雨 — 🦊🌲🌕",
    "".join(chr(code) for code in range(32, 0x250)),
    "\u202eأهلا\u200d👩‍🚀\ufffd\U0010fffd",
    "tab\tand\nnewline\r\x00\x1b",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_can_be_tokenized(pipeline, text):
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert all(0 <= index < len(tokenizer) for index in ids)


def test_clip_writes_every_text_in_tokens_that_give_it_back(pipeline):
    text = "größer 東京 🦊 x9$"
    ids = pipeline.tokenizer(text).input_ids
    tokens = pipeline.tokenizer.convert_ids_to_tokens(ids[1:-1])
    bytes_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    joined = "".join(token.replace("</w>", "") for token in tokens)
    assert bytes(bytes_of[symbol] for symbol in joined).decode() == text.replace(" ", "")


def test_common_words_are_one_clip_token(pipeline):
    tokens = pipeline.tokenizer.convert_ids_to_tokens(pipeline.tokenizer(PROMPT).input_ids)
    assert tokens[1:-1] == [f"{word}</w>" for word in PROMPT.split()]


def test_the_end_mark_has_the_largest_id_as_pooling_at_the_largest_id_demands(pipeline):
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        assert (encoder.config.bos_token_id, encoder.config.eos_token_id) == (0, 2)
        assert tokenizer.eos_token_id == encoder.config.vocab_size - 1 == len(tokenizer) - 1
        assert tokenizer.model_max_length == 77


def test_the_second_tokenizer_pads_with_an_exclamation_mark_and_cuts_it_out(pipeline):
    first, second = (
        tokenizer("wow!", padding="max_length").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    assert set(first[first.index(pipeline.tokenizer.eos_token_id) :]) == {pipeline.tokenizer.eos_token_id}
    assert set(second[second.index(pipeline.tokenizer_2.eos_token_id) + 1 :]) == {0}
    mark = first.index(pipeline.tokenizer.eos_token_id) - 1
    assert first[:mark] == second[:mark]
    assert (first[mark], second[mark]) == (256, 0)  # "!</w>" and "!"


def test_t5_is_the_same_from_its_three_files(made, pipeline):
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    pieces = SentencePieceProcessor(str(made / "tokenizer_3/spiece.model"))
    fast = Tokenizer.from_file(str(made / "tokenizer_3/tokenizer.json"))
    for text in (PROMPT, OTHER, *TEXTS[:4]):
        ids = pipeline.tokenizer_3(text).input_ids
        assert fast.encode(text).ids == ids
        assert pieces.encode(text) + [1] == ids


def test_t5_ends_with_its_extra_ids_below_a_table_of_whole_rows(pipeline):
    tokenizer, rows = pipeline.tokenizer_3, pipeline.text_encoder_3.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == len(tokenizer) - 100
    assert len(tokenizer) < rows and rows % 128 == 0
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
