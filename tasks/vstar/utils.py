"""V* bench: documents by category, the harness's prompt, a strict reading of the answer letter."""

from __future__ import annotations

import re
from typing import Any

from lmms_eval.tasks.vstar_bench.utils import vstar_doc_to_text, vstar_doc_to_visual

doc_to_visual = vstar_doc_to_visual
doc_to_text = vstar_doc_to_text

_ARTICLE = re.compile(r"\bA\s+(?!is\b|because\b|since\b|as\b|and\b|or\b)[a-z]")
"""An upper-case A that begins a noun ("A dog"), not an option."""


def direct_attributes(dataset: Any) -> Any:
    """The 115 questions about a small thing's colour, material and the like."""
    return _of_category(dataset, "direct_attributes")


def relative_position(dataset: Any) -> Any:
    """The 76 questions about where two small things stand to each other."""
    return _of_category(dataset, "relative_position")


def _of_category(dataset: Any, category: str) -> Any:
    return dataset.select([i for i, c in enumerate(dataset["category"]) if c == category])


def options(text: str) -> set[str]:
    """The letters a question offers: "(A) red (B) blue" -> {"A", "B"}; A to D where it has none."""
    return set(re.findall(r"\(([A-Z])\)", text)) or set("ABCD")


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


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """One document's `accuracy` and `unparsed`, 0 or 1 each; an unparsed answer is wrong."""
    letter = answer_letter(results[0], options(doc["text"]))
    return {
        "accuracy": float(letter == doc["label"].strip().upper()),
        "unparsed": float(letter is None),
    }
