"""Shared by the graders of our tasks: parses option letters, averages scored documents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LETTERS = "ABCD"
"""The options of V* and HR-Bench."""

_TYPOGRAPHIC = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-"})
_NO_NOUN = (
    "is|isn't|was|are|be|would|could|might|may|should|must|can|seems|looks|appears|because|since|as|"
    "and|or|nor|but|though|although|if|unless|then|than|rather|instead|maybe|perhaps|possibly|"
    "probably|likely|also|either|not|versus|vs|to|in|on|at|of|by|from|with|for|it|this|that|the|only|through"
)
_ARTICLE = re.compile(
    rf"(?<!option )(?<!choice )(?<!letter )\bA[ \t]+(?!(?:{_NO_NOUN})\b)(?=[a-z]{{2}})",
    re.IGNORECASE,
)
"""An A that begins a noun ("A dog"), not an option."""
_ABBREVIATED = re.compile(r"\b(?:[A-Za-z]\.){2,}")
"""Letters of abbreviations ("U.S.A.", "e.g.")."""
_BRACKETED = re.compile(r"(?<!\w)[(\[{']\s*([A-Za-z])\s*[)\]}'](?!\w)")
_AT_START = re.compile(r"^\W*([A-Za-z])\s?[.):](?=\s|$)")
"""A lower-case letter counts in brackets, and where an option begins the response."""

_END = r"(?![\w']|-\w)\)?[.:]*"
_LETTER = rf"\(?(?<![\w.'-])[A-Z]{_END}"
_ANY_CASE = (
    r"\(?(?<![\w.'-])(?:[A-Zb-z]|a(?=\W*$|[.,;:!?)]|\s*/|\s+(?:or|and|because|since|as)\b))"
    rf"{_END}"
)
"""An "a" is an option where no noun can follow."""
_FILLING = (
    r"(?i:(?:the|option|choice|letter|either|both|neither|most|probably|likely|maybe|perhaps|"
    r"possibly|definitely|clearly|certainly|simply|just|also|even)\s+)*"
)
_JOINED = (
    r"\s*(?:,|/|&|\||\+|-|;|(?:,\s*|\(\s*)?\b(?i:or|and|nor|to|through|versus|vs|maybe|perhaps|"
    r"possibly|probably)\b\.?)[\s,]*(?i:(?:or|and|nor)\s+)?"
)
_MORE = rf"(?:{_JOINED}{_FILLING}{_ANY_CASE})*+"
_LIST, _LIST_ANY_CASE = rf"{_LETTER}{_MORE}", rf"{_ANY_CASE}{_MORE}"
_BE = r"(?i:is|are|was|would\s+be|could\s+be|might\s+be|may\s+be|should\s+be|must\s+be|will\s+be)"
_NEGATED = re.compile(
    r"(?i:\b(?:not|neither|never|without|except|cannot|unlike|none\s+of|rather\s+than|"
    r"instead\s+of)|n't)\s+(?i:(?:be|think|believe|say|choose|pick|select)\s+)?(?i:(?:that\s+)?(?:it|the\s+answer)\s+"
    rf"(?:is|are)\s+)?{_FILLING}{_LIST_ANY_CASE}"
    rf"|(?:(?i:option|choice)\s+)?{_LIST}\s+(?i:is|are|was|seems|looks|would\s+be)"
    r"(?:\s+(?i:not|incorrect|wrong|false|impossible|unlikely)\b|n't\b)"
)
"""Options that the response rejects."""
_CONCLUSIONS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b(?i:answers?)\b(?:[^.?!\n]{{0,40}}?\b{_BE})?[\s:=,-]*{_FILLING}({_LIST_ANY_CASE})",
        rf"\b(?i:(?:correct|right|best)\s+(?:one|option|choice|letter)s?)\s*(?:{_BE}|:)[\s:]*"
        rf"{_FILLING}({_LIST_ANY_CASE})",
        rf"\b(?i:choose|chose|pick|select|say|go(?:ing)?\s+with)\s+{_FILLING}({_LIST})",
        rf"({_LIST})\s+{_BE}\s+(?i:(?:both|the)\s+)*(?i:correct|right|answers?|best|true)\b",
        rf"\b(?i:so|therefore|thus|hence),?\s+(?i:it\s+(?:is|must\s+be)\s+)?{_FILLING}({_LIST})(?=\W*$)",
    )
)
"""Phrases that state the answer, whatever else the response names."""
_HEAD = re.compile(rf"^\W*(?i:(?:option|choice)\s+)?(?=\(?[A-Z]\s?[.):])({_LIST})")
_WRITTEN = re.compile(r"\([A-Z]\)|(?<![\w.])[A-Z][):]|^\s*[A-Z]\.(?=\s)", re.MULTILINE)
_ANYWHERE = re.compile(_LIST)


def offered(text: str) -> set[str]:
    """The letters of a question's options, "(A) red (B) blue"; A to D if it has none."""
    return set(re.findall(r"\(([A-Z])\)", text)) or set(LETTERS)


def answer_letter(response: str, valid: set[str]) -> str | None:
    """The option that a response names; None for no letter, several, or one that is not offered.

    A letter counts as the whole response ("b", "(B)."), behind "answer is" and its like, as an
    option is written at the start ("B. blue"), else as an upper-case word or in brackets; of these
    the first that applies. A response that hedges ("A or B", "A and C", "not A") names none, nor
    does "Blue", nor the A of "A red car".

    Args:
        response: Text of the answer.
        valid: Letters of the question's options, in upper case.
    """
    text = re.sub(r"[*_`\"]", "", response.translate(_TYPOGRAPHIC)).strip()
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    if alone:
        letter = alone[1].upper()
        return letter if letter in valid else None
    for letters in _named(text):
        named = {letter.upper() for letter in letters} - ({"I"} - valid)
        if named:
            return named.pop() if len(named) == 1 and named <= valid else None
    return None


def _named(text: str) -> Iterator[list[str]]:
    """Yields the letters that a text names as its answer, for each way of naming, surest first."""
    text = _ABBREVIATED.sub(" ", text)
    text = _BRACKETED.sub(lambda found: f"({found[1].upper()})", text)
    text = _AT_START.sub(lambda found: found[0].upper(), text)
    text = _ARTICLE.sub(" ", text)
    text = _NEGATED.sub(" . ", text)
    yield [
        letter
        for way in _CONCLUSIONS
        for found in way.finditer(text)
        for letter in _letters(found[1])
    ]
    head = _HEAD.match(text)
    if head:
        rest = text[head.end() :]
        yield [
            *_letters(head[1]),
            *(one for found in _WRITTEN.findall(rest) for one in _letters(found)),
        ]
    yield [letter for found in _ANYWHERE.findall(text) for letter in _letters(found)]


def _letters(words: str) -> list[str]:
    return re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", words)


def letter_counts(letter: str | None) -> dict[str, float]:
    """An answer's part in the histogram of letters: `answered_a` to `answered_d`, 0 or 1 each."""
    return {f"answered_{one.lower()}": float(letter == one) for one in LETTERS}


def mean_score(items: Iterable[Mapping[str, Any]]) -> float:
    """Mean over the items that have a `score`; NaN if none has."""
    scores = [item["score"] for item in items if "score" in item]
    return sum(scores) / len(scores) if scores else float("nan")


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The picture of a document of an embedded benchmark."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """The question of a document of an embedded benchmark."""
    return doc["question"]


def match_by_group(
    response: str, doc: Mapping[str, Any], *, name: str, own: Iterable[str], groups: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """One document's part in `accuracy` and `accuracy_GROUP` of an embedded benchmark.

    A document of another group has its entry without a score, so that every metric sees every
    document and lmms-eval counts samples right; `image_id` is what intervals are clustered by.

    Args:
        response: What the model said.
        doc: The document, with `answer` and `image_id`.
        name: What the model may name before the answer.
        own: The document's groups.
        groups: All groups.
    """
    said = " ".join(response.lower().split())
    correct = said in (doc["answer"], f"{name} {doc['answer']}")
    unscored: dict[str, Any] = {"image_id": doc["image_id"]}
    item = unscored | {"score": float(correct)}
    parts = {f"accuracy_{group}": item if group in own else unscored for group in groups}
    return {"accuracy": item} | parts
