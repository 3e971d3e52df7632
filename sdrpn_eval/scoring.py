"""What the graders of our tasks share: the option an answer names, means of scored documents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

LETTERS = "ABCD"
"""The options of V* and HR-Bench."""

_ARTICLE = re.compile(r"\bA\s+(?!is\b|because\b|since\b|as\b|and\b|or\b)[a-z]")
"""An upper-case A that begins a noun ("A dog"), not an option."""


def offered(text: str) -> set[str]:
    """The letters a question offers: "(A) red (B) blue" -> {"A", "B"}; A to D where it has none."""
    return set(re.findall(r"\(([A-Z])\)", text)) or set(LETTERS)


def answer_letter(response: str, valid: set[str]) -> str | None:
    """The one option a response names, or None: no letter, several, or one that was not offered.

    A letter counts where it stands alone: as the whole response ("b", "(B)."), after "answer is",
    as an option is written ("B. blue", "(B)"), or as a word. "Blue" names no option, nor does the
    A of "Answer: C".
    """
    text = response.strip()
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    if alone:
        letter = alone[1].upper()
        return letter if letter in valid else None
    text = _ARTICLE.sub(" ", text)
    for pattern in (
        r"\b(?i:answer|option|choice)(?:\s+(?i:is))?\s*:?\s*\(?([A-Z])\b(?!')",
        r"(?<![.\w])([A-Z])\s?[.):]",
        r"\b([A-Z])\b(?!')",
    ):
        letters = set(re.findall(pattern, text)) & valid
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def letter_counts(letter: str | None) -> dict[str, float]:
    """One answer's part in the histogram of letters: `answered_a` to `answered_d`, 0 or 1 each."""
    return {f"answered_{one.lower()}": float(letter == one) for one in LETTERS}


def mean_score(items: Iterable[Mapping[str, Any]]) -> float:
    """Mean over the items that carry a `score`; NaN where none does."""
    scores = [item["score"] for item in items if "score" in item]
    return sum(scores) / len(scores) if scores else float("nan")
