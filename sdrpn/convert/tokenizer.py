"""Convert a tokenizer to the Hugging Face layout, with tokens for images and padding.

LLaVA's code encodes the text before and after an image separately, so each part starts with its own
space. transformers calls this behaviour `legacy`, and it is set explicitly here.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, LlamaConfig, LlamaTokenizer

from sdrpn.backbones.plain_text import SPACE, encode_as_sentencepiece
from sdrpn.config import IMAGE_TOKEN
from sdrpn.io.atomic import read_object
from sdrpn.io.checkpoint_files import Source
from sdrpn.io.checkpoints import explain_load_errors
from sdrpn.io.extras import needs

PAD_TOKEN = "<pad>"
FILES = ("tokenizer.json", "tokenizer.model")


def read_tokenizer(folder: Source, base: str | None = None) -> Any:
    """Load the tokenizer of a checkpoint, or of its base.

    Args:
        folder: The checkpoint.
        base: Folder or Hub id that is searched if `folder` has no tokenizer.

    Returns:
        A transformers tokenizer with the tokens `<image>` and `<pad>`.

    Raises:
        FileNotFoundError: If neither has a tokenizer.
        ValueError: If the files are malformed, or the conversion changes the encoding.
    """
    found = _find(folder) or (_find(Source(base)) if base is not None else None)
    if found is None:
        raise FileNotFoundError(
            f"{folder.name} holds no tokenizer"
            + ("" if base is None else f", and neither does --base {base}")
            + f": put {' or '.join(FILES)}, with its tokenizer_config.json, there; LLaVA-1.5's is "
            "Vicuna's"
        )
    source, path = found
    if path.suffix == ".model":
        tokenizer = _from_sentencepiece(path, source)
    else:
        # transformers does not know the model_type of the checkpoint's own config.json.
        source.find("tokenizer_config.json")
        with explain_load_errors(source.name):
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, config=LlamaConfig(), legacy=True, trust_remote_code=False
            )
    encode_as_sentencepiece(tokenizer)
    if isinstance(tokenizer, LlamaTokenizer):
        # transformers saves only the arguments that from_pretrained received.
        tokenizer.init_kwargs["legacy"] = True
    image = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens(image, special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _find(source: Source) -> tuple[Source, Path] | None:
    paths = (source.find(file) for file in FILES)
    return next(((source, path) for path in paths if path is not None), None)


def _from_sentencepiece(path: Path, source: Source) -> Any:
    """Convert tokenizer.model, which transformers reads only if protobuf is installed.

    Raises:
        ValueError: If the result does not encode text as sentencepiece does.
        MissingExtra: If sentencepiece is not installed.
    """
    needs("sentencepiece", extra="convert", what=str(path))
    from sentencepiece import SentencePieceProcessor

    model: Any = SentencePieceProcessor()
    try:
        model.Load(str(path))
    except (OSError, RuntimeError):
        raise ValueError(f"{path} cannot be read as a sentencepiece model") from None
    count = model.GetPieceSize()
    vocabulary = {model.IdToPiece(i): i for i in range(count)}
    settings = _object(source, "tokenizer_config.json")
    length = settings.get("model_max_length")
    limit: dict[str, Any] = {"model_max_length": length} if isinstance(length, int) else {}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=_merges(model), legacy=True, add_bos_token=True, **limit
    )
    encode_as_sentencepiece(tokenizer)
    _check_same(tokenizer, model, path)
    _add_tokens(tokenizer, source, settings, count)
    return tokenizer


def _merges(model: Any) -> list[tuple[str, str]]:
    """List every pair of pieces that forms a third, in the order in which sentencepiece merges.

    The order is by descending score, which can differ from the order of the ids.
    """
    ids = range(model.GetPieceSize())
    plain = [i for i in ids if not (model.IsControl(i) or model.IsByte(i) or model.IsUnknown(i))]
    scores = {model.IdToPiece(i): model.GetScore(i) for i in plain}
    merges = []
    for i in sorted(plain, key=lambda i: (-model.GetScore(i), i)):
        piece = model.IdToPiece(i)
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        known = [(a, b) for a, b in cuts if a in scores and b in scores]
        # Of several splits of a piece, sentencepiece prefers the longer left part.
        merges += sorted(known, key=lambda pair: -len(pair[0]))
    return merges


PROBES = (
    "A chat between a curious user and an artificial intelligence assistant. USER: ",
    "\nWhat is the total of 12.50 and 3,749? ASSISTANT:",
    "",
    " ",
    " a",
    "a ",
    "a" * 20,
    "▁a",
    "\t\r\n\n  x",
    "na\u00efve e\u0301 \ufb01 \u2168 \uff21\uff11 \u00bd \u00a0 \u3000.",
    "\u732b\u306f\U0001f9d1\u200d\U0001f680\U0001f389 \u0627\u0644 \u0e17\u0e35\u0e48",
    *(f"a{' ' * count}b\n{' ' * count}{count}" for count in range(1, 34)),
    *(f"{'=' * count}{'-' * count}{'0' * count}{'.' * count}" for count in range(1, 18)),
)
"""Texts on which the converted tokenizer is compared with sentencepiece."""


def _check_same(tokenizer: Any, model: Any, path: Path) -> None:
    words = (_text_of(model, i) for i in range(model.GetPieceSize()) if _may_be_fixed(model, i))
    # A user-defined piece never merges with its neighbours.
    defined = (f"{side}{word}{side}" for word in words for side in string.printable)
    for text in (*PROBES, *defined):
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        expected = model.Encode(text)
        if found != expected:
            raise ValueError(
                f"{path} is not a LLaMA tokenizer (byte-pair encoding without normalisation): "
                f"sentencepiece encodes {text!r:.60} as {expected[:20]}, the converted tokenizer "
                f"as {found[:20]}; give LLaVA-1.5's own, which is Vicuna's"
            )


def _may_be_fixed(model: Any, number: int) -> bool:
    """Whether a piece may be user-defined; those have score 0, like few others."""
    special = model.IsControl(number) or model.IsUnknown(number) or model.IsByte(number)
    return not special and model.GetScore(number) == 0


def _text_of(model: Any, number: int) -> str:
    return model.IdToPiece(number).replace(SPACE, " ")


def _add_tokens(tokenizer: Any, source: Source, settings: dict[str, Any], size: int) -> None:
    """Add the tokens that a fine-tune appended to the vocabulary of `size` pieces.

    Raises:
        ValueError: If the ids have a gap, which would shift all later ones.
    """
    for number, token in enumerate(_added(source, settings, size), start=size):
        tokenizer.add_tokens(token[1])
        if token[0] != number or tokenizer.convert_tokens_to_ids(token[1].content) != number:
            raise ValueError(
                f"{source.name}: added token {token[1].content!r} has the id {token[0]}, but the "
                f"next free id is {number}; check added_tokens.json and tokenizer_config.json"
            )


def _added(source: Source, settings: dict[str, Any], size: int) -> list[tuple[int, AddedToken]]:
    """Return (id, token) of the tokens that a fine-tune added, sorted by id.

    As contemporary transformers did: a plain entry of added_tokens.json strips the spaces around
    it, other entries have their own `lstrip` and `rstrip`.
    """
    tokens: dict[int, AddedToken] = {}
    flags = _special_token_flags(source)
    for text, number in _object(source, "added_tokens.json").items():
        if type(number) is not int:
            raise ValueError(f"{source.name}: added_tokens.json has no id for {text!r}")
        tokens[number] = _token({"lstrip": True, "rstrip": True} | flags.get(text, {}), text)
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(
            f"{source.name}: added_tokens_decoder in tokenizer_config.json must be an object, got "
            f"a {type(decoder).__name__}"
        )
    for number, token in decoder.items():
        if not number.isdecimal() or not _is_token(token):
            raise ValueError(
                f"{source.name}: added_tokens_decoder in tokenizer_config.json has an entry "
                f"{number!r} without a content"
            )
        tokens[int(number)] = _token(token, token["content"], bool(token.get("special")))
    return sorted((pair for pair in tokens.items() if pair[0] >= size), key=lambda pair: pair[0])


def _token(flags: dict[str, Any], text: str, special: bool = False) -> AddedToken:
    known = {name: bool(flags.get(name)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(text, special=special, normalized=False, **known)


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _special_token_flags(source: Source) -> dict[str, dict[str, Any]]:
    """The entries of special_tokens_map.json that have flags, by text."""
    entries: list[Any] = []
    for value in _object(source, "special_tokens_map.json").values():
        entries += value if isinstance(value, list) else [value]
    tokens = [entry for entry in entries if _is_token(entry)]
    return {token["content"]: {"lstrip": False, "rstrip": False} | token for token in tokens}


def _object(source: Source, file: str) -> dict[str, Any]:
    path = source.find(file)
    return read_object(path) if path is not None else {}
