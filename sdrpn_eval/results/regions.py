"""Compares regions with true boxes, to tell errors of looking from errors of reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrpn.boxes import PixelBox, covered
from sdrpn_eval.results.records import Record
from sdrpn_eval.results.scores import Document

HOLDS = 0.5
"""Minimum share of the true box that a region covers if it holds the answer."""
NAMES = ("small", "medium", "large")
"""Thirds of the questions by the true box's share of the image."""


@dataclass(frozen=True)
class Looking:
    """Counts over questions, by the size of the true box.

    Attributes:
        to_share: The largest true box among them, as a share of its image.
        zoomed: Questions with a region.
        holds: Questions whose region holds the answer.
        wrong_no_zoom, wrong_look, wrong_read: Wrong answers without a region, with a region that
            misses the answer, and with one that holds it.
    """

    size: str
    to_share: float
    questions: int
    right: int
    zoomed: int
    holds: int
    wrong_no_zoom: int
    wrong_look: int
    wrong_read: int


def where_it_looked(
    record: Record, boxes: Mapping[Document, PixelBox], right: Mapping[Document, bool]
) -> list[Looking]:
    """Counts over all questions with a true box and a record, then per third by size.

    Args:
        record: Of the run.
        boxes: True boxes.
        right: Whether each answer is right.
    """
    known = [d for d in right if d in boxes and d in record.looks and record.looks[d].size]
    if not known:
        return []
    shares = [_share(record, boxes, d) for d in known]
    rows = [_row("all", known, shares, record, boxes, right)]
    limits = np.quantile(shares, [1 / 3, 2 / 3])
    third = np.searchsorted(limits, shares, side="left")
    for number, name in enumerate(NAMES):
        chosen = [i for i, t in enumerate(third) if t == number]
        if chosen:
            some = [known[i] for i in chosen]
            rows.append(_row(name, some, [shares[i] for i in chosen], record, boxes, right))
    return rows


def _share(record: Record, boxes: Mapping[Document, PixelBox], document: Document) -> float:
    width, height = record.looks[document].size or (1, 1)
    return boxes[document].area / (width * height)


def _row(
    name: str,
    documents: Sequence[Document],
    shares: Sequence[float],
    record: Record,
    boxes: Mapping[Document, PixelBox],
    right: Mapping[Document, bool],
) -> Looking:
    outcomes = [outcome(record.looks[d].regions, boxes[d]) for d in documents]
    wrong = [o for o, d in zip(outcomes, documents, strict=True) if not right[d]]
    return Looking(
        size=name,
        to_share=float(max(shares)),
        questions=len(documents),
        right=len(documents) - len(wrong),
        zoomed=len(outcomes) - outcomes.count("no zoom"),
        holds=outcomes.count("held"),
        wrong_no_zoom=wrong.count("no zoom"),
        wrong_look=wrong.count("missed"),
        wrong_read=wrong.count("held"),
    )


def outcome(regions: Sequence[Any], box: PixelBox) -> str:
    """`no zoom`; else `held` or `missed`, whether regions cover HOLDS of the true box."""
    if not regions:
        return "no zoom"
    return "held" if covered(regions, box) >= HOLDS else "missed"
