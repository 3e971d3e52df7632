"""Where an answer ends: strings and end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class StopAtStrings(StoppingCriteria):
    """Stop a row when its generated text contains one of the strings.

    transformers' StopStringCriteria reads a BPE vocabulary and fails for word-level tokenizers.
    This criterion decodes the tokens, like the truncation of the answer.

    Args:
        tokenizer: Decodes the tokens.
        strings: The strings.
        known: Number of new tokens at the end of the prompt.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], known: int = 0) -> None:
        self.tokenizer, self.strings, self.known = tokenizer, strings, known
        self.prompt_length: int | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1 - self.known
        new = input_ids[:, self.prompt_length :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        done = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def end_tokens(ids: int | Sequence[int] | None) -> list[int]:
    """Return end tokens, of which generate() takes none, one or several, as a list."""
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [int(ids)]  # type: ignore[arg-type]
