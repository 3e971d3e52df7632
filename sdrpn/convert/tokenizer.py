"""A checkpoint's tokenizer as the Hugging Face layout keeps it: tokens for images and padding too.

LLaVA's code encodes what stands before and behind an image each for itself, so that each part
begins with a space of its own. transformers calls this `legacy`, and it is asked for by name here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, LlamaConfig, LlamaTokenizer

from sdrpn.convert.checkpoint import Source
from sdrpn.files import read_object
from sdrpn.llava import IMAGE_TOKEN
from sdrpn.weights import broken_files_named

PAD_TOKEN = "<pad>"
FILES = ("tokenizer.json", "tokenizer.model")


def read_tokenizer(folder: Source, base: str | None = None) -> Any:
    """The checkpoint's tokenizer, or its base's.

    Raises FileNotFoundError that names the files which are missing.
    """
    found = _find(folder) or (_find(Source(base)) if base is not None else None)
    if found is None:
        raise FileNotFoundError(
            f"{folder.name} holds no tokenizer: put {' or '.join(FILES)}, with its "
            "tokenizer_config.json, there; LLaVA-1.5's is Vicuna's"
        )
    source, path = found
    if path.suffix == ".model":
        tokenizer = _from_sentencepiece(path, source)
    else:
        # Its own config.json is of a kind that transformers does not know.
        source.find("tokenizer_config.json")
        with broken_files_named(source.name):
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, config=LlamaConfig(), legacy=True, trust_remote_code=False
            )
    if isinstance(tokenizer, LlamaTokenizer):
        # Saved with it: transformers keeps only what from_pretrained was given.
        tokenizer.init_kwargs["legacy"] = True
    image = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens(image, special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _find(source: Source) -> tuple[Source, Path] | None:
    paths = (source.find(file) for file in FILES)
    return next(((source, path) for path in paths if path is not None), None)


def _from_sentencepiece(path: Path, source: Source) -> Any:
    """LLaMA's tokenizer from its first format, which transformers reads through protobuf only."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(f"{path} needs sentencepiece: pip install sentencepiece") from None
    model: Any = SentencePieceProcessor()
    try:
        model.Load(str(path))
    except (OSError, RuntimeError):
        raise ValueError(f"{path} cannot be read as a sentencepiece model") from None
    pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    plain = [p for i, p in enumerate(pieces) if not (model.IsControl(i) or model.IsByte(i))]
    settings = _object(source, "tokenizer_config.json")
    length = settings.get("model_max_length")
    limit: dict[str, Any] = {"model_max_length": length} if isinstance(length, int) else {}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=_merges(plain, vocabulary),
        legacy=True,
        add_bos_token=True,
        **limit,
    )
    tokenizer.add_tokens(_added(source, settings, len(vocabulary)))
    return tokenizer


def _merges(pieces: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the most frequent pieces first."""
    merges = []
    for piece in pieces:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [(a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _added(source: Source, settings: dict[str, Any], size: int) -> list[AddedToken]:
    """Tokens that a fine-tune added behind the vocabulary, in the order of their numbers."""
    tokens = {
        number: (text, False) for text, number in _object(source, "added_tokens.json").items()
    }
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        tokens[int(number)] = token["content"], bool(token.get("special"))
    later = sorted((number, *token) for number, token in tokens.items() if number >= size)
    return [AddedToken(text, special=special, normalized=False) for _, text, special in later]


def _object(source: Source, file: str) -> dict[str, Any]:
    path = source.find(file)
    return read_object(path) if path is not None else {}
