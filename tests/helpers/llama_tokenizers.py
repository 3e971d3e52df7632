"""Tokenizers of LLaMA's kind for tests, and what sentencepiece and LLaVA's own code make of text.

Nothing here goes through the code under test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from sdrpn.config import VICUNA_SYSTEM_PROMPT

CORPUS = (
    VICUNA_SYSTEM_PROMPT,
    "USER: ASSISTANT: What is the pattern on the red disc? Answer the question with one word.",
    "    for row in table:\n        total += row.amount    # indented by four and by eight",
    "The   total  of    12.50,   3,749    and      100 is      3,861.50 ; the rest is  -- ------ .",
    "A. a red disc  B. a blue disc    C. no disc at all        D. none of the above",
    "</ s> s> <s unk> <unk pad> image> <image </s <im age>",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software",
    'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,',
    "na\u00efve caf\u00e9s in M\u00fcnchen; aaaaaa ======== 00000 .......... (((()))) [[[]]]",
)
"""Text with runs of spaces, indentation, numbers and words that special tokens could be made of."""


def train(path: Path, size: int = 520, **settings: Any) -> Path:
    """Write a sentencepiece model with the settings of LLaMA's; the pieces are in score order."""
    text = path.with_suffix(".txt")
    text.write_text("\n".join(CORPUS * 20), encoding="utf-8")
    chosen: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": size,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "minloglevel": 2,
    }
    prefix = str(path.with_suffix(""))
    SentencePieceTrainer.train(input=str(text), model_prefix=prefix, **(chosen | settings))
    path.with_suffix(".vocab").unlink()
    text.unlink()
    return path


def shuffle_pieces(path: Path, seed: int = 1) -> None:
    """Give a model's pieces other ids, and leave their scores: as LLaMA's ids follow no score.

    The file is a protobuf whose first fields are the pieces; a normal one ends with its score.
    """
    data = path.read_bytes()
    pieces: list[bytes] = []
    normal: list[int] = []
    at = 0
    while data[at] == 0x0A:
        length, content = _varint(data, at + 1)
        letters, text = _varint(data, content + 1)
        end = content + length
        if text + letters + 5 == end:
            normal.append(len(pieces))
        pieces.append(data[at:end])
        at = end
    moved = normal[:]
    random.Random(seed).shuffle(moved)
    shuffled = pieces[:]
    for number, place in zip(normal, moved, strict=True):
        shuffled[place] = pieces[number]
    path.write_bytes(b"".join(shuffled) + data[at:])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def write_settings(folder: Path, **more: Any) -> None:
    """tokenizer_config.json as it stands beside Vicuna's tokenizer.model."""
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    settings |= {"add_eos_token": False, "legacy": False, "model_max_length": 2048}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | more))


# --- the references ------------------------------------------------------------------------------


def llava_ids(pieces: SentencePieceProcessor, parts: list[str], image: int) -> list[int]:
    """`tokenizer_image_token` of LLaVA's code: each part on its own, one <s>, images between."""
    ids = [1]
    for number, part in enumerate(parts):
        ids += ([image] if number else []) + pieces.encode(part)
    return ids


def slow_ids(
    pieces: SentencePieceProcessor, text: str, added: Mapping[str, tuple[int, bool, bool]]
) -> list[int]:
    """What the slow LlamaTokenizer gives with `legacy=True`, without <s>.

    added: word -> (id, lstrip, rstrip). The text is cut at the longest added word at each place,
    the spaces that a word eats are taken off its neighbours, and sentencepiece encodes the rest.
    Checked against transformers 4.31.0 and 4.37.2.
    """
    parts: list[str] = [""]
    words: list[str] = []
    at = 0
    while at < len(text):
        found = max((w for w in added if text.startswith(w, at)), key=len, default="")
        if found:
            words.append(found)
            parts.append("")
        else:
            parts[-1] += text[at]
        at += len(found) or 1
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number and added[words[number - 1]][2]:
            part = part.lstrip()
        if number < len(words) and added[words[number]][1]:
            part = part.rstrip()
        ids += pieces.encode(part) if part else []
        ids += [added[words[number]][0]] if number < len(words) else []
    return ids


def random_texts(count: int, seed: int, words: tuple[str, ...] = ()) -> list[str]:
    """Texts with runs of spaces, indentation, line breaks, bytes without a piece, and `words`."""
    rng = random.Random(seed)
    own = [word for line in CORPUS for word in line.split()]
    odd = [
        *"\u00e9\u00fc\u732b\u72ac\u00a0\u200b\u2581",
        "\U0001f389",
        "\U0001f9d1\u200d\U0001f680",
    ]
    odd += ["\ufb01", "\u2460", "\u0301", "\t", "\r\n", "\0"]

    def part() -> str:
        kind = rng.random()
        if words and kind < 0.3:
            return rng.choice(words)
        if kind < 0.45:
            return rng.choice(own)
        if kind < 0.6:
            return " " * rng.choice([1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17])
        if kind < 0.7:
            return "\n" + " " * rng.choice([0, 0, 2, 4, 8, 12])
        if kind < 0.8:
            return rng.choice(odd)
        if kind < 0.9:
            return rng.choice("a=-.0(") * rng.randint(1, 12)
        return "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(3))

    return ["".join(part() for _ in range(rng.randint(0, 20))) for _ in range(count)]
