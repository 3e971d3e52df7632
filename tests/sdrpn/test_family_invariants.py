"""What holds for every model family, in float32 and greedy: one set of tests for all of them.

The references of tests/helpers/families.py know no cache, no batch and none of our layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.roi.proposers import Look, roi_logits
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import QUESTIONS
from tests.helpers.families import NEW_TOKENS, Family

TOLERANCE = 1e-4
NOTHING = ZoomConfig(threshold=1 - 1e-9)


@pytest.fixture(scope="module")
def alone(family: Family, questions: list[Question]) -> list[tuple[Answer, torch.Tensor]]:
    """Every question asked alone, without any cache."""
    engine = ZoomModel(family.backbone, family.rpn, zoom=family.zoom, prefix_cache=0)
    return [ask(engine, [question])[0] for question in questions]


def ask(
    zoom: ZoomModel, questions: Sequence[Question], **generation: Any
) -> list[tuple[Answer, torch.Tensor]]:
    """(answer, logits [its own steps, vocabulary]) of a batch, read inside generate()."""
    steps: list[torch.Tensor] = []

    def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps.append(scores.clone())
        return scores

    settings = {"max_new_tokens": NEW_TOKENS, "logits_processor": LogitsProcessorList([keep])}
    answers = zoom.ask_batch(questions, settings | generation)
    logits = torch.stack(steps, dim=1)
    return [
        (answer, own[: min(answer.new_tokens + 1, len(own))])
        for answer, own in zip(answers, logits, strict=True)
    ]


def said(family: Family, ids: Sequence[int]) -> str:
    return family.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()


def same(found: Any, expected: Any) -> None:
    for (answer, logits), (other, reference) in zip(found, expected, strict=True):
        assert (answer.text, answer.regions) == (other.text, other.regions)
        assert (answer.reason, answer.crop_tokens) == (other.reason, other.crop_tokens)
        assert logits.shape == reference.shape
        assert (logits - reference).abs().max() < TOLERANCE


def test_the_questions_are_worth_asking(alone: list[tuple[Answer, torch.Tensor]]) -> None:
    answers = [answer for answer, _ in alone]
    assert len({answer.text for answer in answers}) > len(answers) / 2
    assert {bool(answer.regions) for answer in answers} == {True, False}
    assert len({answer.crop_tokens for answer in answers}) > 3


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("proposer", ["none", "rpn"])
def test_no_region_is_stock(family: Family, questions: list[Question], proposer: str) -> None:
    zoom = ZoomModel(family.backbone, family.rpn, proposer=proposer, zoom=NOTHING)
    for question, (answer, logits) in zip(questions, ask(zoom, questions), strict=True):
        ids, reference = family.stock(question.images[0], question.text)
        assert (answer.text, answer.regions) == (said(family, ids), ())
        assert answer.reason
        assert (logits - reference).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "generation", [{"num_beams": 3}, {"repetition_penalty": 1.7}, {"num_beams": 2}], ids=str
)
def test_no_region_is_stock_under_other_settings(
    family: Family, questions: list[Question], generation: dict[str, Any]
) -> None:
    """Beams and penalties read the whole prompt, which a cache could hide from them."""
    zoom = ZoomModel(family.backbone, proposer="none")
    chosen = questions[:8]
    settings = {"max_new_tokens": NEW_TOKENS} | generation
    texts = [answer.text for answer in zoom.ask_batch(chosen, settings)]
    stock = [family.stock(q.images[0], q.text, **generation)[0] for q in chosen]
    assert texts == [said(family, ids) for ids in stock]


def test_a_zoom_is_one_full_forward(
    family: Family, questions: list[Question], alone: list[tuple[Answer, torch.Tensor]]
) -> None:
    chosen = [(one, q) for one, q in zip(alone, questions, strict=True) if one[0].regions]
    assert len(chosen) >= 5
    for (answer, logits), question in chosen:
        ids, reference = family.in_full(answer, question, family.zoom)
        assert answer.text == said(family, ids)
        assert (logits - reference).abs().max() < TOLERANCE


def test_a_given_box_is_one_full_forward(family: Family) -> None:
    zoom = ZoomModel(family.backbone, proposer="none")
    for image in family.images[:4]:
        box = PixelBox(3, 5, 3 + image.width // 2, image.height)
        question = Question(QUESTIONS[0], (image,), box)
        ((answer, logits),) = ask(zoom, [question])
        assert answer.regions == (box,)
        ids, reference = family.in_full(answer, question, zoom.zoom)
        assert answer.text == said(family, ids)
        assert (logits - reference).abs().max() < TOLERANCE
        ((_, without),) = ask(zoom, [replace(question, box=None)])
        assert (logits[0] - without[0]).abs().max() > 0.01


@pytest.mark.parametrize("size", [2, 7, 20])
@pytest.mark.parametrize("order", ["given", "shuffled"])
def test_batches_do_not_show(
    family: Family, questions: list[Question], alone: Any, size: int, order: str
) -> None:
    """Pictures of different grids, questions of different length, with and without a crop."""
    engine = ZoomModel(family.backbone, family.rpn, zoom=family.zoom, prefix_cache=0)
    places = list(range(len(questions)))
    if order == "shuffled":
        random.Random(size).shuffle(places)
    for start in range(0, len(places), size):
        batch = places[start : start + size]
        same(ask(engine, [questions[i] for i in batch]), [alone[i] for i in batch])


def test_caches_do_not_show(family: Family, questions: list[Question], alone: Any) -> None:
    """Cold, warm and too small a prefix cache give what no cache gives."""
    backbone, rpn = family.backbone, family.rpn
    one = ZoomModel(backbone, rpn).prefill(family.images[:1])[0].nbytes
    for limit in (20 * one, 2 * one, one // 2):
        zoom = ZoomModel(backbone, rpn, zoom=family.zoom, prefix_cache=limit)
        for _ in ("cold", "warm"):
            for start in range(0, len(questions), 7):
                rows = slice(start, start + 7)
                same(ask(zoom, questions[rows]), alone[rows])
        assert zoom.prefixes.nbytes <= limit


def test_plain_prompts_between_do_not_show(
    family: Family, questions: list[Question], alone: Any
) -> None:
    """No image, and several: in one batch with the others, and whatever was asked before."""
    others = [
        Question("the blue disc ?"),
        Question("what is on the red disc ?", tuple(family.images[:2])),
    ]
    engine = ZoomModel(family.backbone, family.rpn, zoom=family.zoom)
    settings = {"max_new_tokens": NEW_TOKENS}
    apart = [engine.ask_batch([one], settings)[0].text for one in others]
    for mixed in ([*others, *questions[:5]], [*questions[:5], *others]):
        answers = engine.ask_batch(mixed, settings)
        found = {id(q): a.text for q, a in zip(mixed, answers, strict=True)}
        assert [found[id(one)] for one in others] == apart
        assert [found[id(q)] for q in questions[:5]] == [answer.text for answer, _ in alone[:5]]


def test_beams_and_sampling_do_not_see_their_neighbours(
    family: Family, questions: list[Question]
) -> None:
    engine = ZoomModel(family.backbone, family.rpn, zoom=family.zoom)
    beams = {"num_beams": 3, "max_new_tokens": NEW_TOKENS}
    together = [answer.text for answer in engine.ask_batch(questions, beams)]
    assert together == [engine.ask_batch([q], beams)[0].text for q in questions]
    # At a temperature near zero sampling has one outcome.
    sampling = {"do_sample": True, "temperature": 1e-6, "max_new_tokens": NEW_TOKENS}
    sampled = [answer.text for answer in engine.ask_batch(questions, sampling)]
    greedy = [a.text for a in engine.ask_batch(questions, {"max_new_tokens": NEW_TOKENS})]
    assert sampled == greedy


def test_losses_do_not_see_their_neighbours(family: Family, questions: list[Question]) -> None:
    engine = ZoomModel(family.backbone, proposer="none")
    chosen = questions[:6]
    words = ["red", "level", "dotted", "blue disc", "pink", "cyan"]
    scored = engine.loss_batch(chosen, words)
    for question, word, (loss, _, _) in zip(chosen, words, scored, strict=True):
        ((alone, _, _),) = engine.loss_batch([question], [word])
        assert loss == pytest.approx(alone, abs=TOLERANCE)


# --- the map -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fresh", "rpn"])
def test_the_map_is_the_papers(family: Family, questions: list[Question], kind: str) -> None:
    """Recomputed by plain products over the whole sequence, fresh and with every weight moved."""
    rpn: RPN = getattr(family, kind)
    zoom = ZoomModel(family.backbone, rpn)
    chosen = questions[::3]
    looks = [
        Look(
            zoom.prefill(q.images)[0],
            family.backbone.image_grid(q.images[0]),
            family.backbone.prompt_ids(q.text).after,
            family.zoom,
        )
        for q in chosen
    ]
    for question, found in zip(chosen, roi_logits(zoom.models, looks), strict=True):
        expected = family.full_map(rpn, question.images[0], question.text)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < TOLERANCE * max(1, np.abs(expected).max())


def test_a_saved_rpn_gives_the_same_maps(
    family: Family, questions: list[Question], tmp_path: Path
) -> None:
    family.rpn.save_pretrained(tmp_path)
    loaded = RPN.from_pretrained(tmp_path)
    assert loaded.config == family.rpn.config
    answers = [
        [one for one, _ in ask(ZoomModel(family.backbone, rpn, zoom=family.zoom), questions[:6])]
        for rpn in (family.rpn, loaded)
    ]
    for before, after in zip(*answers, strict=True):
        assert before.roi_map is not None
        assert np.array_equal(before.roi_map, after.roi_map)  # type: ignore[arg-type]
        assert before.text == after.text
