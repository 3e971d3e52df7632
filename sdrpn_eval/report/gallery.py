"""The page's questions: the text of all, and images of as many as the budget allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from PIL import Image

from sdrpn.io.plurals import agree, counted
from sdrpn_eval.record import RecordLine
from sdrpn_eval.report.pictures import SIDE, Album, cut, in_order, needs_crop, shrunk
from sdrpn_eval.results.comparability import preprocessing
from sdrpn_eval.results.comparison import RIGHT, Comparison
from sdrpn_eval.results.documents import Documents
from sdrpn_eval.results.regions import outcome
from sdrpn_eval.results.scores import Document

LONGEST = 4000
"""Maximum characters of a prompt or answer on the page."""

Question = dict[str, Any]


def all_questions(comparison: Comparison) -> dict[Document, Question]:
    """All questions in the form that the page's script reads, without images."""
    run = comparison.evidence[0].run
    return {
        (info.task, doc_id): _question(comparison, (info.task, doc_id))
        for info in comparison.tasks
        for doc_id in sorted(run.tasks[info.task].samples)
    }


def description(comparison: Comparison) -> dict[str, Any]:
    """Names and settings for the page's script."""
    return {
        "runs": [run.name for run in comparison.runs],
        "padding": [
            preprocessing(e.run, e.facts).get("padding", "none") for e in comparison.evidence
        ],
        "tasks": [info.task for info in comparison.tasks],
        "metrics": [
            row.metric if (row := comparison.main_row(info.task)) else None
            for info in comparison.tasks
        ],
        "right": RIGHT,
    }


def _question(comparison: Comparison, document: Document) -> Question:
    """A question without its image."""
    task, doc_id = document
    samples = [e.run.tasks[task].samples[doc_id] for e in comparison.evidence]
    looks = [e.record.looks.get(document) for e in comparison.evidence]
    box = comparison.boxes.get(document)
    return {
        "task": [info.task for info in comparison.tasks].index(task),
        "id": doc_id,
        "prompt": samples[0].prompt[:LONGEST],
        "target": samples[0].target[:LONGEST],
        "answers": [sample.answer[:LONGEST] for sample in samples],
        "scores": _scores(comparison, document),
        "size": next((look.size for look in looks if look and look.size), None),
        "truth": list(box) if box else None,
        "looks": [
            None
            if look is None
            else {
                "boxes": [list(b) for b in look.regions],
                "why": look.reason,
                "outcome": outcome(look.regions, box) if box else None,
            }
            for look in looks
        ],
        "picture": None,
    }


def _scores(comparison: Comparison, document: Document) -> list[float | None]:
    """Each run's score by the task's main metric."""
    row = comparison.main_row(document[0])
    if row is None:
        return [None for _ in comparison.runs]
    key = (row.task, row.metric, row.filter)
    return [(scores[key].values or {}).get(document) for scores in comparison.scores]


def add_pictures(
    comparison: Comparison,
    data: Mapping[str, Documents],
    questions: Mapping[Document, Question],
    album: Album,
    seed: int,
) -> list[str]:
    """Adds images to questions within the budget.

    Args:
        comparison: What the page shows.
        data: Documents by task.
        questions: From `all_questions`; changed in place.
        album: The page's images.
        seed: Of the order in which questions get images.

    Returns:
        Sentences about the questions without images.
    """
    changed = [d for d, q in questions.items() if len(set(q["scores"])) > 1]
    rest = [d for d, q in questions.items() if len(set(q["scores"])) == 1]
    strangers = 0
    for document in in_order(changed, rest, seed):
        if document[0] in data and not album.full:
            strangers += _add_picture(comparison, data, document, questions[document], album)
    return _left_out(questions, changed, rest, data, strangers, seed)


def _add_picture(
    comparison: Comparison,
    data: Mapping[str, Documents],
    document: Document,
    question: Question,
    album: Album,
) -> bool:
    """Adds a question's image, crops and maps; returns True if the data here differs."""
    task, doc_id = document
    looks = [e.record.looks.get(document) for e in comparison.evidence]
    shown = next((look for look in looks if look and look.images and look.size), None)
    key = data[task].key(doc_id)
    if key is None:
        return False
    if not _is_the_same(key, shown, data[task], doc_id, question["prompt"]):
        return True

    @functools.cache
    def image() -> Image.Image:
        found = data[task].image(doc_id)
        assert found is not None  # it has a key
        return found

    size = shown.size if shown and shown.size else image().size
    boxes = [box for look in looks if look for box in look.regions] if needs_crop(size) else []
    wanted: list[tuple[Hashable, Callable[[], Image.Image]]] = []
    wanted += [(key, lambda: shrunk(image(), SIDE))]
    wanted += [((key, tuple(box)), lambda box=box: cut(image(), box)) for box in boxes]
    places = album.add(wanted)
    if places is None:
        return False
    question["picture"], question["size"] = places[0], list(size)
    crops = dict(zip((tuple(box) for box in boxes), places[1:], strict=True))
    for look, told in zip(looks, question["looks"], strict=True):
        if look is not None:
            told |= {"crops": [crops.get(tuple(box)) for box in look.regions]}
            told |= {"map": look.heat, "grid": look.grid, "peak": look.map_max}
            album.used += len(look.heat or "") + 80
    return False


def _is_the_same(
    key: str, shown: RecordLine | None, data: Documents, doc_id: int, asked: str
) -> bool:
    """Whether a document is the one that was asked, by its image's hash or else its prompt."""
    if shown is not None:
        return key == shown.images[0]
    prompt = data.prompt(doc_id)
    return prompt is not None and prompt[:LONGEST] in asked


def _left_out(
    questions: Mapping[Document, Question],
    changed: Sequence[Document],
    rest: Sequence[Document],
    data: Mapping[str, Documents],
    strangers: int,
    seed: int,
) -> list[str]:
    def bare(documents: Sequence[Document]) -> int:
        return sum(questions[d]["picture"] is None for d in documents if d[0] in data)

    notes = []
    if strangers:
        notes.append(
            f"{counted(strangers, 'question')} {agree(strangers, 'is', 'are')} shown without "
            "pictures, as the data on this machine is not what the runs saw"
        )
    if bare(changed) + bare(rest) > strangers:
        notes.append(
            f"to stay within the size of a page, {bare(changed)} of "
            f"{counted(len(changed), 'question')} with different scores and {bare(rest)} of "
            f"{counted(len(rest), 'other')} {agree(bare(changed) + bare(rest), 'is', 'are')} shown "
            f"without pictures (drawn with seed {seed}); their text is all here"
        )
    return notes
