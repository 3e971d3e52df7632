"""Tokenization of prompts as in LLaVA-1.5's training, with special tokens in questions as text.

LLaVA's own code (`tokenizer_image_token`) splits a prompt at its images and encodes the parts
separately, so every part starts with LLaMA's "▁". The tokenizers of transformers encode the full
prompt, and whether "▁" follows an image depends on their version, on `legacy` and on adjacent
spaces. This module encodes the parts separately, like LLaVA.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any

from tokenizers import normalizers, pre_tokenizers

SPACE = "▁"
"""SentencePiece's symbol for a space, prepended to every text."""


class PlainText:
    """A copy of a tokenizer that encodes special tokens as plain text, except for images.

    A question may contain the text `</s>` or `<image>`. Images are represented by `mark`, a random
    placeholder that no question contains.

    Args:
        tokenizer: The model's tokenizer; it is not modified.
        image_token_id: Token id that replaces `mark`.
        name: Model, for messages.

    Raises:
        ValueError: If the tokenizer lacks `image_token_id`, or is LLaMA's but does not start a text
            with "▁".
    """

    def __init__(self, tokenizer: Any, image_token_id: int, name: str = "this model") -> None:
        self.mark = f"<image-{secrets.token_hex(8)}>"
        self.image_token_id = image_token_id
        if image_token_id not in tokenizer.added_tokens_decoder:
            raise ValueError(
                f"config.json sets image token {image_token_id}, which the tokenizer lacks: they "
                "belong to different models"
            )
        self._tokenizer = copy.deepcopy(tokenizer)
        encode_as_sentencepiece(self._tokenizer)
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos in self._tokenizer("")["input_ids"][:1] else []
        self._check_prefix(name)

    def ids(self, text: str) -> list[int]:
        """Encode a text, with `image_token_id` for every `mark`.

        Raises:
            ValueError: If the text contains an unpaired surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a question holds {text[error.start]!a} at character {error.start} of its prompt, "
                "which is half of a character; write it in UTF-8"
            ) from None
        first, *others = text.split(self.mark)
        ids = [*self._start, *self._encode(first)]
        for part in others:
            ids += [self.image_token_id, *self._encode(part)]
        return ids

    def _encode(self, part: str) -> list[int]:
        """Encode one part, without <s>."""
        encoded = self._tokenizer(part, add_special_tokens=False, split_special_tokens=True)
        return encoded["input_ids"]

    def _check_prefix(self, name: str) -> None:
        vocabulary = self._tokenizer.get_vocab()
        if SPACE not in vocabulary or "<0x0A>" not in vocabulary:
            return  # not a LLaMA tokenizer
        wanted, found = [vocabulary[SPACE], vocabulary["<0x0A>"]], self._encode("\n")
        if found != wanted:
            raise ValueError(
                f"{name}: its tokenizer encodes the line break after an image as {found}, but "
                f"LLaVA-1.5 was trained with {wanted} (a {SPACE!r} first): use the tokenizer files "
                "of llava-hf/llava-1.5-7b-hf, or remove add_prefix_space from tokenizer_config.json"
            )


def encode_as_sentencepiece(tokenizer: Any) -> None:
    """Make a LLaMA tokenizer prepend "▁" to every text, as SentencePiece does.

    The Metaspace pre-tokenizer of transformers 5 omits "▁" before a text that starts with a space
    and, with `legacy=False`, after every added token.

    Args:
        tokenizer: Modified in place. Tokenizers that never prepend "▁", or of other types, are left
            unchanged.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    splitter = getattr(backend, "pre_tokenizer", None)
    if (
        not isinstance(splitter, pre_tokenizers.Metaspace)
        or splitter.prepend_scheme == "never"
        or splitter.split
    ):
        return
    prefix = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence(prefix)
    backend.pre_tokenizer = None
