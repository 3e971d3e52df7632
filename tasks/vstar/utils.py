"""V* bench: documents by category, the harness's prompt, and three ways to choose an option."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lmms_eval.tasks.vstar_bench.utils import (
    vstar_doc_to_text,
    vstar_doc_to_visual,
    vstar_process_results,
)

from sdrpn_eval import scoring
from sdrpn_eval.scoring import answer_letter, letter_counts, offered
from sdrpn_eval.subsets import subset

doc_to_visual = vstar_doc_to_visual
doc_to_text = vstar_doc_to_text
mean_score = scoring.mean_score

CATEGORIES = ("direct_attributes", "relative_position")
_INSTRUCTION = re.compile(r"\s*Answer with the option's letter\b.*\Z", re.DOTALL)
"""What the data set itself puts behind the last option; it belongs to none."""
_ATTRIBUTE = re.compile(r"What is the (.+?) of (.+)\?")
_SIDE = re.compile(r"Is (.+?) on the left or right side of (.+)\?")


# Which documents


def direct_attributes(dataset: Any) -> Any:
    """The 115 questions about a small thing's colour, material and the like."""
    return _of_category(dataset, "direct_attributes")


def relative_position(dataset: Any) -> Any:
    """The 76 questions about where two small things stand to each other."""
    return _of_category(dataset, "relative_position")


def _of_category(dataset: Any, category: str) -> Any:
    return dataset.select([i for i, c in enumerate(dataset["category"]) if c == category])


def ci(dataset: Any) -> Any:
    """The documents of `vstar_ci`."""
    return subset("vstar_ci", dataset)


# What a document asks


class Asked(NamedTuple):
    """A question as the data set writes it: "What is it?\\n(A) left\\n(B) right\\nAnswer with ...".

    right: index of the right option. ending: the instruction behind the options, or nothing.
    (No dataclass: lmms-eval loads this file outside sys.modules, which those look into.)
    """

    question: str
    options: tuple[str, ...]
    right: int
    ending: str


def asked(doc: dict[str, Any]) -> Asked:
    """Take a document's text apart. Raises ValueError that quotes a text of another form."""
    question, *rest = re.split(r"\s*\(([A-Z])\)\s*", doc["text"])
    letters, options = "".join(rest[0::2]), rest[1::2]
    label = doc["label"].strip().upper()
    if letters not in ("AB", "ABC", "ABCD") or len(label) != 1 or label not in letters:
        raise ValueError(
            f"V* question {doc['question_id']} needs options (A), (B), ... and one of them as its "
            f"label, got label {doc['label']!r} and {doc['text']!r}"
        )
    ending = _INSTRUCTION.search(options[-1])
    if ending:
        options[-1] = options[-1][: ending.start()]
    whole = tuple(option.strip() for option in options)
    return Asked(question.strip(), whole, letters.index(label), ending[0] if ending else "")


def shuffled(doc: dict[str, Any]) -> dict[str, Any]:
    """The document with its options in an order that depends on its content alone, label moved.

    Options are sorted by a hash of question and option, so the order is the same on every machine
    and says nothing about the order they were in.
    """
    parts = asked(doc)

    def place(i: int) -> bytes:
        text = "\n".join((str(doc["question_id"]), parts.question, parts.options[i]))
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    order = sorted(range(len(parts.options)), key=place)
    lines = [f"({scoring.LETTERS[n]}) {parts.options[i]}" for n, i in enumerate(order)]
    text = "\n".join([parts.question, *lines]) + parts.ending
    return {**doc, "text": text, "label": scoring.LETTERS[order.index(parts.right)]}


def statement(question: str, option: str) -> str:
    """An option as a sentence, as the options stand in the authors' own annotation files.

    "What is the color of the flag?", "white" -> "The color of the flag is white." All questions of
    V* have one of the two forms below; an option of any other question stays as it is.
    """
    attribute, side = _ATTRIBUTE.fullmatch(question), _SIDE.fullmatch(question)
    if attribute:
        return f"The {attribute[1]} of {attribute[2]} is {option}."
    if side and option in ("left", "right"):
        return f"{side[1][0].upper()}{side[1][1:]} is on the {option} side of {side[2]}."
    return option


# As the harness grades


def process_as_harness(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """The harness's own metrics, the overall one first: a task is judged by its first."""
    graded = vstar_process_results(doc, results)
    return {"vstar_overall_acc": graded.pop("vstar_overall_acc"), **graded}


# Shuffled options


def shuffled_to_text(doc: dict[str, Any], kwargs: dict[str, Any] | None = None) -> str:
    return vstar_doc_to_text(shuffled(doc), kwargs)


def shuffled_to_target(doc: dict[str, Any]) -> str:
    return shuffled(doc)["label"]


def process_shuffled(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, float]]:
    return process_whole(shuffled(doc), results)


# The likelihood of each option


def question_alone(doc: dict[str, Any]) -> str:
    return asked(doc).question


def statements(doc: dict[str, Any]) -> list[str]:
    parts = asked(doc)
    return [statement(parts.question, option) for option in parts.options]


def right_index(doc: dict[str, Any]) -> int:
    return asked(doc).right


def process_likelihood(
    doc: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, dict[str, float]]:
    """results: (mean loss of a token, greedy) of each option; the smallest loss is the answer."""
    losses = [loss for loss, _ in results]
    return _by_category(doc, float(losses.index(min(losses)) == asked(doc).right))


# The letter


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """A document's `accuracy`, `unparsed` and `answered_a` to `answered_d`, 0 or 1 each.

    An unparsed answer is wrong.
    """
    letter = answer_letter(results[0], offered(doc["text"]))
    return {
        "accuracy": float(letter == doc["label"].strip().upper()),
        "unparsed": float(letter is None),
        **letter_counts(letter),
    }


def process_whole(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, float]]:
    """The same for a task that holds both categories, each of which has its own accuracy."""
    graded = process_results(doc, results)
    others = {name: {"score": value} for name, value in graded.items()}
    return others | _by_category(doc, graded["accuracy"])


def _by_category(doc: dict[str, Any], accuracy: float) -> dict[str, dict[str, float]]:
    """A document of the other category has its entry without a score: every metric sees it."""
    item = {"score": accuracy}
    return {"accuracy": item} | {
        f"accuracy_{category}": item if doc["category"] == category else {}
        for category in CATEGORIES
    }
