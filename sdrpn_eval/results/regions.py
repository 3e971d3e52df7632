"""Compares regions with true boxes, to tell errors of looking from errors of reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
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
    """Counts over all questions with a true box and a record, then per third by size."""
    known = [
        (boxes[d].area / prod(size), outcome(record.looks[d].regions, boxes[d]), is_right)
        for d, is_right in right.items()
        if d in boxes and d in record.looks and (size := record.looks[d].size)
    ]
    if not known:
        return []
    shares = [share for share, *_ in known]
    third = np.searchsorted(np.quantile(shares, [1 / 3, 2 / 3]), shares, side="left")
    groups = {"all": known}
    for number, name in enumerate(NAMES):
        groups[name] = [one for one, place in zip(known, third, strict=True) if place == number]
    return [_row(name, members) for name, members in groups.items() if members]


def _row(name: str, members: Sequence[tuple[float, str, bool]]) -> Looking:
    """Counts over (share of the true box, outcome, whether the answer is right)."""
    outcomes = [seen for _, seen, _ in members]
    wrong = [seen for _, seen, is_right in members if not is_right]
    return Looking(
        size=name,
        to_share=float(max(share for share, *_ in members)),
        questions=len(members),
        right=len(members) - len(wrong),
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
