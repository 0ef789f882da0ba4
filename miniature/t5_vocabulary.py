"""The T5 tokenizer: a unigram SentencePiece model, as `spiece.model` and as `tokenizer.json`.

Ids have T5's order: <pad>, </s>, <unk>, the pieces, and after them the extra ids counted down, so
that <extra_id_0> has the largest. Source: `T5Converter` in transformers' convert_slow_tokenizer.py.
"""

import io
import json
import string
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from miniature.configs import T5_EXTRA_IDS, T5_PIECES

PADDING, END, UNKNOWN = "<pad>", "</s>", "<unk>"
# Known to T5's vocabulary and to no caption here: capitals, German and French letters, punctuation.
CHARACTERS = string.printable.strip() + "äöüÄÖÜßàâçéèêëîïôùûÉ€£–—’“”„"
LONGEST = 512  # tokens; the pipeline asks for 256


def write_t5_tokenizer(folder: Path, sentences: list[str]) -> None:
    """Train on one thread, which makes the model the same every time, and write `tokenizer_3`."""
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=trained,
        model_type="unigram",
        vocab_size=T5_PIECES,
        character_coverage=1.0,
        required_chars=CHARACTERS,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=PADDING,
        eos_piece=END,
        unk_piece=UNKNOWN,
        num_threads=1,
        minloglevel=2,
    )
    model = SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = [(model.id_to_piece(index), model.get_score(index)) for index in range(T5_PIECES)]
    extra_ids = [f"<extra_id_{index}>" for index in range(T5_EXTRA_IDS)]
    pieces += [(token, 0.0) for token in reversed(extra_ids)]

    part = folder / "tokenizer_3"
    part.mkdir()
    (part / "spiece.model").write_bytes(trained.getvalue())
    _write_fast_tokenizer(part / "tokenizer.json", pieces, _normalization(trained.getvalue()))
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    added = [PADDING, END, UNKNOWN, *reversed(extra_ids)]
    config = {
        "add_prefix_space": True,
        "added_tokens_decoder": {str(ids[token]): _token(token) | {"special": True} for token in added},
        "additional_special_tokens": extra_ids,
        "clean_up_tokenization_spaces": True,
        "eos_token": END,
        "extra_ids": T5_EXTRA_IDS,
        "legacy": True,
        "model_max_length": LONGEST,
        "pad_token": PADDING,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": UNKNOWN,
    }
    special = {
        "additional_special_tokens": extra_ids,
        "eos_token": _token(END),
        "pad_token": _token(PADDING),
        "unk_token": _token(UNKNOWN),
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        text = json.dumps(content, indent=2) + "\n"
        (part / f"{name}.json").write_text(text, encoding="utf-8")


def _normalization(model: bytes) -> bytes:
    """SentencePiece's table for NFKC and white space: normalizer_spec.precompiled_charsmap.

    Read by hand, because the reader that comes with sentencepiece 0.2.3 wants a newer protobuf than
    the rest of this project can have. Field numbers: sentencepiece_model.proto.
    """
    return _message_field(_message_field(model, 3), 2)


def _message_field(message: bytes, number: int) -> bytes:
    """The first length-delimited field of that number in a serialized protobuf message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            varint()
            continue
        length = {1: 8, 2: 0, 5: 4}[wire] or varint()
        if key >> 3 == number and wire == 2:
            return message[position : position + length]
        position += length
    raise ValueError(f"the SentencePiece model lacks field {number}")


def _write_fast_tokenizer(path: Path, pieces: list[tuple[str, float]], table: bytes) -> None:
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(table)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )
    extra_ids = [piece for piece, _ in pieces[T5_PIECES:]]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (PADDING, END, UNKNOWN, *extra_ids)]
    )
    tokenizer.save(str(path))


def _token(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
