"""Prompt text -> token ids, as LLaVA-1.5 was trained, with special tokens in a question as text.

LLaVA's own code (`tokenizer_image_token`) splits a prompt at its images and encodes each part on
its own, so every part starts with LLaMA's "▁". Tokenizers of transformers encode the prompt as a
whole, and whether they put that "▁" behind an image depends on their version, on `legacy` and on
spaces around it. So each part is encoded on its own here, too.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any

from tokenizers import normalizers, pre_tokenizers

SPACE = "▁"
"""What sentencepiece writes for a space, and puts before every text it encodes."""


class PlainText:
    """A tokenizer's copy for which special tokens are plain text, and only `mark` is an image.

    A question may spell out </s> or <image>; it means the letters. mark: stands in a text for an
    image, and cannot be guessed, so that no question holds it.

    Raises ValueError where the tokenizer does not know `image_token_id`, or is LLaMA's but does not
    start a text with "▁". name: the model, for the message.
    """

    def __init__(self, tokenizer: Any, image_token_id: int, name: str = "this model") -> None:
        self.mark = f"<image-{secrets.token_hex(8)}>"
        self.image_token_id = image_token_id
        if image_token_id not in tokenizer.added_tokens_decoder:
            raise ValueError(
                f"config.json says that token {image_token_id} is an image, which the tokenizer "
                "does not know: they belong to different models"
            )
        self._tokenizer = copy.deepcopy(tokenizer)
        encode_as_sentencepiece(self._tokenizer)
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos in self._tokenizer("")["input_ids"][:1] else []
        self._check_prefix(name)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, `image_token_id` for every mark."""
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
        """Ids of one part on its own, without <s>."""
        encoded = self._tokenizer(part, add_special_tokens=False, split_special_tokens=True)
        return encoded["input_ids"]

    def _check_prefix(self, name: str) -> None:
        vocabulary = self._tokenizer.get_vocab()
        if SPACE not in vocabulary or "<0x0A>" not in vocabulary:
            return  # not LLaMA's
        wanted, found = [vocabulary[SPACE], vocabulary["<0x0A>"]], self._encode("\n")
        if found != wanted:
            raise ValueError(
                f"{name}: its tokenizer encodes the line break behind an image as {found}, but "
                f"LLaVA-1.5 was trained with {wanted} (a {SPACE!r} first): use the tokenizer files "
                "of llava-hf/llava-1.5-7b-hf, or remove add_prefix_space from tokenizer_config.json"
            )


def encode_as_sentencepiece(tokenizer: Any) -> None:
    """Make a LLaMA tokenizer put "▁" before every text, as sentencepiece does.

    transformers 5 builds it with a Metaspace that leaves the "▁" out before a text that starts with
    a space and, with `legacy=False`, behind every added token. Changes the tokenizer in place; one
    that puts no "▁" anywhere, or is of another kind, stays as it is.
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
