"""Many settings at once: every answer is that of the setting alone, and little is run twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.sweep import ask_settings
from tests.conftest import QUESTIONS
from tests.helpers.families import NEW_TOKENS, Family

ASKED = {"max_new_tokens": NEW_TOKENS}


@pytest.fixture
def questions(family: Family) -> list[Question]:
    return [Question(text, (image,)) for image in family.images for text in QUESTIONS[:2]]


def grid_of(zoom: ZoomConfig) -> list[ZoomConfig]:
    changes: list[dict[str, Any]] = [
        {},
        {"threshold": "peak"},
        {"threshold": 0.999999},
        {"gate": 0.06},
        {"crop_tokens": 12},
        {"crop_tokens": 12, "tiles": 4},
        {"keep_tokens": 5},
        {"keep_tokens": 5, "gate": 0.06, "crop_tokens": 9},
        {"threshold": "peak", "policy": "strongest", "min_cells": 1},
    ]
    return [replace(zoom, **change) for change in changes]


def test_every_answer_is_that_of_the_setting_alone(
    family: Family, questions: list[Question]
) -> None:
    engine = ZoomModel(family.backbone, family.rpn, zoom=family.zoom)
    settings = grid_of(family.zoom)
    swept = ask_settings(engine, questions, settings, ASKED)
    distinct = set()
    for setting, answers in zip(settings, swept, strict=True):
        alone = ZoomModel(family.backbone, family.rpn, zoom=setting)
        for answer, other in zip(answers, alone.ask_batch(questions, ASKED), strict=True):
            same = replace(other, seconds=0.0, roi_map=None)
            if other.confidence is not None:
                assert answer.confidence == pytest.approx(other.confidence, abs=1e-4)
                same = replace(same, confidence=answer.confidence)
            assert replace(answer, roi_map=None) == same
        distinct.add(tuple((answer.text, answer.regions) for answer in answers))
    assert len(distinct) > 4


@pytest.fixture
def passes(family: Family) -> Iterator[list[tuple[int, int]]]:
    """[(layer, tokens times rows)] of each forward of the first and the last layer."""
    seen: list[tuple[int, int]] = []

    def note(layer: int) -> Any:
        return lambda _, args, __: seen.append((layer, args[0].shape[0] * args[0].shape[1]))

    layers = family.backbone.layers
    hooks = [layers[i][1].register_forward_hook(note(i)) for i in (0, len(layers) - 1)]
    yield seen
    for hook in hooks:
        hook.remove()


def test_equal_answers_are_asked_once(
    family: Family, questions: list[Question], passes: list[tuple[int, int]]
) -> None:
    engine = ZoomModel(family.backbone, family.rpn, zoom=family.zoom, prefix_cache=0)
    one = ask_settings(engine, questions, [family.zoom], ASKED)
    alone = list(passes)
    passes.clear()
    settings = [family.zoom, replace(family.zoom, gate=0.9999999), family.zoom]
    three = ask_settings(engine, questions, settings, ASKED)
    assert passes == alone
    assert [[a.text for a in answers] for answers in three] == [[a.text for a in one[0]]] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": ()}, "one image and no box"),
        ({"box": PixelBox(0, 0, 20, 20)}, "one image and no box"),
    ],
)
def test_what_cannot_be_swept(
    family: Family, questions: list[Question], change: dict[str, Any], words: str
) -> None:
    engine = ZoomModel(family.backbone, family.rpn, zoom=family.zoom)
    with pytest.raises(ValueError, match=words):
        ask_settings(engine, [replace(questions[0], **change)], [family.zoom])
    with pytest.raises(ValueError, match="do_sample=False"):
        ask_settings(engine, questions[:1], [family.zoom], {"do_sample": True, "temperature": 1.0})
    with pytest.raises(ValueError, match="proposer 'rpn', got 'none'"):
        ask_settings(ZoomModel(family.backbone, proposer="none"), questions[:1], [family.zoom])
