"""The page's questions: the text of all, and images of as many as its budget allows."""

from __future__ import annotations

import base64
import functools
import io
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sdrpn.io.plurals import agree, counted
from sdrpn_eval.record import RecordLine
from sdrpn_eval.results.comparability import preprocessing
from sdrpn_eval.results.comparison import RIGHT, Comparison
from sdrpn_eval.results.documents import Documents
from sdrpn_eval.results.regions import outcome
from sdrpn_eval.results.scores import Document

LONGEST = 4000
"""Maximum characters of a prompt or answer on the page."""
SIDE = 640
"""Longest side of an image in pixels; crops of larger images are stored separately."""
CROP_SIDE = 336
QUALITY = 70
TRIES = 50
"""Number of consecutive images exceeding the budget after which the album is full."""

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
    """Adds images to questions, in place, in an order drawn with a seed, until the album is full.

    Returns:
        Sentences about the questions without images.
    """
    changed = [d for d, q in questions.items() if len(set(q["scores"])) > 1]
    rest = [d for d, q in questions.items() if len(set(q["scores"])) == 1]
    strangers = 0
    for document in in_order(changed, rest, seed):
        if document[0] in data and not album.full:
            strangers += _add_picture(comparison, data, document, questions[document], album)
    notes = []
    if strangers:
        notes.append(
            f"{counted(strangers, 'question')} {agree(strangers, 'is', 'are')} shown without "
            "pictures, as the data on this machine is not what the runs saw"
        )
    bare, others = (
        sum(questions[d]["picture"] is None for d in some if d[0] in data)
        for some in (changed, rest)
    )
    if bare + others > strangers:
        notes.append(
            f"to stay within the size of a page, {bare} of {counted(len(changed), 'question')} "
            f"with different scores and {others} of {counted(len(rest), 'other')} "
            f"{agree(bare + others, 'is', 'are')} shown without pictures (drawn with seed {seed}); "
            "their text is all here"
        )
    return notes


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
    # An image that is scaled down on the page needs its crops beside it.
    boxes = [box for look in looks if look for box in look.regions] if max(size) > SIDE else []
    wanted: list[tuple[Hashable, Callable[[], Image.Image]]]
    wanted = [(key, lambda: shrunk(image(), SIDE))]
    wanted += [
        ((key, tuple(box)), lambda box=box: shrunk(image().crop(box), CROP_SIDE)) for box in boxes
    ]
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


# Images


@dataclass
class Album:
    """Images as data URIs, of `used` up to `budget` characters; equal keys share an image."""

    budget: int
    pictures: list[str] = field(default_factory=list)
    used: int = 0
    _places: dict[Hashable, int] = field(default_factory=dict)
    _refused: int = 0

    @property
    def full(self) -> bool:
        return self._refused >= TRIES

    def add(self, wanted: Sequence[tuple[Hashable, Callable[[], Image.Image]]]) -> list[int] | None:
        """Adds images that belong together, given by their keys and functions that make them.

        Returns:
            Their indices in `pictures`; None if they do not all fit.
        """
        if self.full:
            return None
        new = {key: data_uri(make()) for key, make in wanted if key not in self._places}
        size = sum(len(uri) + 3 for uri in new.values())  # two quotes and a comma
        if self.used + size > self.budget:
            self._refused += 1
            return None
        self._refused = 0
        self.used += size
        for key, uri in new.items():
            self._places[key] = len(self.pictures)
            self.pictures.append(uri)
        return [self._places[key] for key, _ in wanted]


def data_uri(image: Image.Image) -> str:
    """An image as a WebP data URI."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image in RGB, no larger than side x side, in the same proportions."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def in_order(changed: Sequence[Document], others: Sequence[Document], seed: int) -> list[Document]:
    """Changed questions first, then the others, each in a random order."""
    rng = random.Random(seed)
    return [*rng.sample(list(changed), len(changed)), *rng.sample(list(others), len(others))]
