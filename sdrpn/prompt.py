"""Text to token ids, in which nothing that a question spells out acts as a token."""

from __future__ import annotations

import copy
import secrets
from typing import Any

IMAGE_TOKEN = "<image>"
"""Stands for an image in a prompt, in LLaVA's data, and in the tokenizer."""


class PlainText:
    """A tokenizer's twin to which special tokens are plain text, and only `mark` is an image.

    A question may spell out </s> or <image>; it means the letters. Text without them gets the ids
    that the tokenizer itself gives. mark: stands in a text for an image, and cannot be guessed, so
    that no question holds it.
    """

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self.mark = f"<image-{secrets.token_hex(8)}>"
        self.image_token_id = image_token_id
        self._tokenizer = copy.deepcopy(tokenizer)
        own = tokenizer.added_tokens_decoder.get(image_token_id)
        if own is None:
            raise ValueError(
                f"config.json says that token {image_token_id} is an image, which the tokenizer "
                "does not know: they belong to different models"
            )
        # Like the image token in all but being special: spaces around it are treated the same.
        token = copy.copy(own)
        token.content, token.special = self.mark, False
        self._tokenizer.add_tokens(token)
        self._mark_id = self._tokenizer.convert_tokens_to_ids(self.mark)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, `image_token_id` for every mark."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a question holds {text[error.start]!a} at character {error.start} of its prompt, "
                "which is half of a character; write it in UTF-8"
            ) from None
        ids = self._tokenizer(text, split_special_tokens=True)["input_ids"]
        return [self.image_token_id if i == self._mark_id else i for i in ids]
