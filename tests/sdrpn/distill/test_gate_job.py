"""The views behind the gate's labels, for every model family, and the job that asks for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdrpn.boxes import PixelBox
from sdrpn.distill.gate import Probe
from sdrpn.distill.gate_job import (
    LABELS_FILE,
    GateJob,
    as_state,
    as_text,
    labelled,
    rpn_states,
    view_batch,
)
from sdrpn.distill.gate_labels import GateConfig, Views, control_boxes, needs_ladder, shrunk
from sdrpn.engine import Question, ZoomModel
from sdrpn.io.questions import ImageQuestion
from tests.conftest import QUESTIONS
from tests.helpers.families import NEW_TOKENS, Family
from tests.sdrpn.test_family_invariants import said

GENERATION = {"max_new_tokens": NEW_TOKENS}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def config(family: Family) -> GateConfig:
    assert isinstance(family.zoom.threshold, float)
    return GateConfig("consensus", (family.zoom.threshold, family.zoom.threshold + 0.01))


def engine(family: Family, **options: Any) -> ZoomModel:
    return ZoomModel(family.backbone, family.rpn, zoom=family.zoom, **options)


def ask(zoom: ZoomModel, questions: Sequence[Question], config: GateConfig) -> Any:
    return view_batch(zoom, questions, config, GENERATION)


@pytest.fixture(scope="module")
def alone(family: Family, questions: list[Question], config: GateConfig) -> list[Any]:
    """(views, state) of every question asked alone, without any cache."""
    found = [ask(engine(family, prefix_cache=0), [question], config) for question in questions]
    return [(views[0], states[0]) for views, states in found]


def same(found: Views, expected: Views) -> None:
    one, other = (replace(v, losses=None, confidence=None) for v in (found, expected))
    assert one == other
    assert found.confidence == pytest.approx(expected.confidence, abs=TOLERANCE)
    assert (found.losses is None) == (expected.losses is None)
    if found.losses and expected.losses:
        for name in ("stock", "zoom", "controls"):
            own, other = getattr(found.losses, name), getattr(expected.losses, name)
            assert own == pytest.approx(other, abs=1e-3)


def test_the_questions_are_worth_asking(alone: list[tuple[Views, Any]]) -> None:
    views = [one for one, _ in alone]
    assert {None, "no region"} <= {one.reason for one in views}
    assert any(one.losses for one in views)
    assert any(one.reason is None and not one.losses for one in views)


@pytest.mark.parametrize("size", [3, 20])
def test_batches_do_not_show(
    family: Family,
    questions: list[Question],
    config: GateConfig,
    alone: list[tuple[Views, Any]],
    size: int,
) -> None:
    zoom = engine(family)
    for start in range(0, len(questions), size):
        found = ask(zoom, questions[start : start + size], config)
        for views, state, (expected, reference) in zip(*found, alone[start:], strict=False):
            same(views, expected)
            assert (state is None) == (reference is None)
            if state is not None:
                assert np.abs(state - reference).max() < TOLERANCE


def test_views_are_the_answers_they_say(
    family: Family, questions: list[Question], config: GateConfig, alone: list[tuple[Views, Any]]
) -> None:
    """Against transformers' own answers, and the engine's with a zoom."""
    zoomed = engine(family).ask_batch(questions, GENERATION)
    second = replace(family.zoom, threshold=config.thresholds_for(family.zoom)[1])
    others = engine(family).ask_batch([replace(q, zoom=second) for q in questions], GENERATION)
    climbed = 0
    for question, (views, state), zoom, other in zip(questions, alone, zoomed, others, strict=True):
        assert (views.reason == "no region") == (not zoom.regions)
        if not zoom.regions:
            assert views == Views(reason="no region")
            assert state is None
            continue
        (image,) = question.images
        ids, _ = family.stock(image, question.text)
        assert (views.zoom, views.stock) == (zoom.text, said(family, ids))
        if not zoom.text:
            assert views.reason == "empty answer"
            continue
        assert views.second_zoom == other.text
        if views.losses:
            climbed += 1
            small = shrunk(image, family.backbone.image_grid(image))
            ids, _ = family.stock(small, question.text)
            assert views.shrunk == said(family, ids)
    assert climbed


def test_losses_are_of_the_zoomed_answer_under_each_view(
    family: Family, questions: list[Question], alone: list[tuple[Views, Any]]
) -> None:
    stock, zoom = ZoomModel(family.backbone, proposer="none"), engine(family)
    for question, (views, _) in zip(questions, alone, strict=True):
        if not views.losses:
            continue
        assert views.zoom is not None
        (answer,) = zoom.ask_batch([question], GENERATION)
        assert answer.roi_map is not None
        grid = family.backbone.image_grid(question.images[0])
        boxes = control_boxes(answer.roi_map, grid, answer.regions)
        variants = [replace(question, box=PixelBox(*box)) for box in boxes]
        expected = [
            engine.loss_batch([one], [views.zoom])[0][0]
            for engine, one in ((stock, question), *((zoom, one) for one in (question, *variants)))
        ]
        own = [views.losses.stock, views.losses.zoom, *views.losses.controls]
        assert own == pytest.approx(expected, abs=1e-3)


def test_agreement_asks_for_less(
    family: Family, questions: list[Question], config: GateConfig, alone: list[tuple[Views, Any]]
) -> None:
    found, _ = ask(engine(family), questions, replace(config, rule="agreement"))
    for views, (whole, _) in zip(found, alone, strict=True):
        if whole.reason == "no room for a control crop":
            whole = replace(whole, reason=None)
        same(views, replace(whole, second_zoom=None, shrunk=None, losses=None))


def test_gates_of_the_engine_do_not_move_labels(
    family: Family, questions: list[Question], config: GateConfig, alone: list[tuple[Views, Any]]
) -> None:
    zoom = engine(family)
    zoom.zoom = replace(zoom.zoom, gate=0.01, keep_tokens=10_000)
    found, _ = ask(zoom, questions[:6], config)
    for views, (expected, _) in zip(found, alone, strict=False):
        same(views, expected)


def test_the_engine_computes_the_trained_probe(family: Family, questions: list[Question]) -> None:
    """What is trained on states is what a saved gate gives for the same questions."""
    rng = np.random.default_rng(0)
    width = family.rpn.config.hidden_size
    probe = Probe((rng.standard_normal(width) / width**0.5).astype(np.float32), 0.3)
    states = rpn_states(engine(family), questions)
    assert states.dtype == np.float32
    assert states.shape == (len(questions), width)
    rpn = family.rpn.with_gate(torch.from_numpy(probe.weight), probe.bias)
    assert not family.rpn.config.gate
    answers = ZoomModel(family.backbone, rpn, zoom=family.zoom).ask_batch(questions, GENERATION)
    assert [a.gate for a in answers] == pytest.approx(probe.probability(states), abs=TOLERANCE)
    again = rpn.with_gate(torch.zeros(width), 0.0)
    answers = ZoomModel(family.backbone, again, zoom=family.zoom).ask_batch(questions[:2])
    assert [a.gate for a in answers] == [0.5, 0.5]


def test_states_survive_a_line() -> None:
    state = np.array([0.1, -3e-7, 12345.678, np.float32(np.pi)], np.float32)
    read = as_state(json.loads(json.dumps(as_text(state))))
    assert read.dtype == np.float32
    assert np.array_equal(read, state)


# The job


def job(family: Family, folder: Path, config: GateConfig, **options: Any) -> GateJob:
    for i, image in enumerate(family.images):
        (folder / "images").mkdir(exist_ok=True)
        image.save(folder / "images" / f"{i}.png")
    asked = [
        ImageQuestion(f"q{i}", f"{i % len(family.images)}.png", QUESTIONS[i % 4])
        for i in range(len(family.images) * len(QUESTIONS))
    ]
    given = {"batch_size": 4, "max_new_tokens": NEW_TOKENS} | options
    return GateJob(engine(family), asked, folder / "images", folder / "out", config, **given)


def test_lines_become_samples(family: Family, config: GateConfig, tmp_path: Path) -> None:
    lines = job(family, tmp_path, config).run()
    assert list(lines) == [f"q{i}" for i in range(20)]
    samples, ignored = labelled(lines.values(), config)
    assert len(samples) + sum(ignored.values()) == 20
    assert ignored["no region"]
    for one in samples:
        assert one.state.shape == (family.rpn.config.hidden_size,)
        assert one.label in (0, 1)
        assert 0 <= one.confidence <= 1
    lax = labelled(lines.values(), replace(config, rule="agreement"))[0]
    assert len(lax) >= len(samples)
    assert sum(one.label for one in lax) >= sum(one.label for one in samples)
    assert sum(needs_ladder(view_of(line)) for line in lines.values())


def view_of(line: dict[str, Any]) -> Views:
    return Views(line["zoom"], line["stock"], line["second_zoom"])


class Stopped(BaseException):
    pass


def test_a_stopped_job_resumes(
    family: Family, config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = list(job(family, whole, config).run().values())
    first, batches = job(family, tmp_path, config), 0
    ask_one = first._ask

    def stopping(*args: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise Stopped
        return ask_one(*args)

    monkeypatch.setattr(first, "_ask", stopping)
    with pytest.raises(Stopped):
        first.run()
    lines = (tmp_path / "out" / LABELS_FILE).read_text().splitlines()
    assert len(lines) == 8
    with (tmp_path / "out" / LABELS_FILE).open("a") as file:
        file.write(lines[0][:40])  # a line that a killed process left incomplete
    second, asked = job(family, tmp_path, config), []
    monkeypatch.setattr(
        second, "_ask", lambda *args: asked.append(args) or GateJob._ask(second, *args)
    )
    found = list(second.run().values())
    assert sum(len(batch) for batch, _ in asked) == 12
    assert [one["id"] for one in found] == [one["id"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one["zoom"], one["stock"]) == (other["zoom"], other["stock"])
    assert job(family, tmp_path, config).run().keys() == {one["id"] for one in expected}


def test_other_settings_are_refused(family: Family, config: GateConfig, tmp_path: Path) -> None:
    job(family, tmp_path, config).run()
    with pytest.raises(
        ValueError, match=r"other settings \(rule: consensus there, agreement now\)"
    ):
        job(family, tmp_path, replace(config, rule="agreement"))
    with pytest.raises(ValueError, match=r"other settings \(thresholds: "):
        job(family, tmp_path, replace(config, thresholds=(0.2, 0.3)))
    job(family, tmp_path, replace(config, kappa=2.0))  # decides what lines mean, not what they are


def test_questions_that_cannot_be_asked_are_counted(
    family: Family, config: GateConfig, tmp_path: Path
) -> None:
    broken = job(family, tmp_path, config)
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    lines = broken.run()
    _, ignored = labelled(lines.values(), config)
    assert ignored["the question could not be asked"] == 4
    family.images[1].save(tmp_path / "images" / "1.png")
    _, ignored = labelled(job(family, tmp_path, config).run().values(), config)
    assert "the question could not be asked" not in ignored


@pytest.mark.parametrize(
    "change",
    [
        {"state": "AAA"},
        {"state": None},
        {"stock": None},
        {"zoom": 3},
        {"losses": {"stock": 1.0}},
        {"confidence": None},
        {"confidence": "high"},
    ],
    ids=str,
)
def test_a_broken_line_is_named(change: dict[str, Any]) -> None:
    views = {"zoom": "a", "stock": "b", "second_zoom": "a", "shrunk": "c", "confidence": 0.5}
    losses = {"stock": 2.0, "zoom": 0.1, "controls": [1.0]}
    line = views | {"losses": losses, "reason": None, "state": as_text(np.ones(2, np.float32))}
    line |= {"id": "x", "image": "x.png"}
    (sample,), _ = labelled([line], GateConfig())
    assert sample.label == 1
    with pytest.raises(
        ValueError, match=r"the line of question 'x' in gate_labels\.jsonl is broken"
    ):
        labelled([line | change], GateConfig())
