"""The two CLIP tokenizers: byte-level BPE, as `vocab.json` and `merges.txt`.

Ids have CLIP's order: 256 bytes, the same 256 at the end of a word, the merges in the order learnt,
the start mark, the end mark. So any text can be written in tokens, and the end mark has the largest
id. As in the real repositories there is no `tokenizer.json`.
Source of the format: openai/CLIP `simple_tokenizer.py`.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from miniature.configs import CLIP_VOCABULARY

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable character for each byte, in CLIP's order: "!" is first and has id 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def learn_merges(sentences: list[str], count: int) -> list[tuple[str, str]]:
    """Learn `count` merges, the most frequent pair first; of equally frequent ones the smallest."""
    symbols = byte_symbols()
    frequency = Counter(
        word
        for sentence in sentences
        for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+", sentence.lower())
    )
    words = [
        ([symbols[byte] for byte in word.encode()], weight) for word, weight in sorted(frequency.items())
    ]
    for pieces, _ in words:
        pieces[-1] += END_OF_WORD
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, weight in words:
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += weight
        if not pairs:
            raise ValueError(f"the text has only {len(merges)} merges, {count} were asked for")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces, _ in words:
            for index in range(len(pieces) - 2, -1, -1):
                if pieces[index : index + 2] == list(best):
                    pieces[index : index + 2] = ["".join(best)]
    return merges


def write_clip_tokenizers(folder: Path, sentences: list[str]) -> None:
    """Write `tokenizer`, which pads with the end mark, and `tokenizer_2`, which pads with "!" (0).

    In `tokenizer_2` "!" is a special token, which is cut out of a prompt before the BPE: the two
    tokenizers give different ids for "wow!".
    """
    symbols = list(byte_symbols().values())
    merges = learn_merges(sentences, CLIP_VOCABULARY - 2 * len(symbols) - 2)
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols)]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != CLIP_VOCABULARY:
        raise ValueError(f"{CLIP_VOCABULARY - len(vocabulary)} tokens were learnt twice")
    for name, padding in (("tokenizer", END), ("tokenizer_2", "!")):
        part = folder / name
        part.mkdir()
        (part / "vocab.json").write_text(
            json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
        )
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (part / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_json(part / "tokenizer_config.json", _tokenizer_config(vocabulary, padding))
        _write_json(part / "special_tokens_map.json", _special_tokens(padding))


def _token(content: str, *, normalized: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    }


def _tokenizer_config(vocabulary: dict[str, int], padding: str) -> dict[str, Any]:
    special = {START: True, END: True} | ({} if padding == END else {padding: False})
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(vocabulary[content]): _token(content, normalized=normalized) | {"special": True}
            for content, normalized in sorted(special.items(), key=lambda item: vocabulary[item[0]])
        },
        "bos_token": START,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": padding,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }


def _special_tokens(padding: str) -> dict[str, Any]:
    return {
        "bos_token": _token(START, normalized=True),
        "eos_token": _token(END, normalized=True),
        "pad_token": padding,
        "unk_token": _token(END, normalized=True),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
