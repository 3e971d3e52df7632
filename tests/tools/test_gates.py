"""The table of the gates: how it is measured, and that the page shows what was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrpn.distill.gate_job import as_text
from sdrpn.io.questions import read_questions
from tools.tiny_vstar import gates

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((DOCS / "gates.json").read_text())


def test_the_page_shows_what_was_measured(result: dict[str, Any]) -> None:
    assert (DOCS / "gates.md").read_text() == gates.page(result)


def test_the_claims_of_the_page_hold(result: dict[str, Any]) -> None:
    """The confidence is the better gate, and neither rule nor annotation mends the learned one."""
    assert result["questions"] >= 500
    auc = {gate["name"]: gate["auc"] for gate in result["gates"]}
    sure, *others = auc["confidence of the first answer"]
    assert sure > 0.75
    for name in ("learned, `consensus`", "learned, `agreement`", "learned, annotated labels"):
        assert auc[name][2] < others[0]
        accuracy = next(g["accuracy"] for g in result["gates"] if g["name"] == name)
        assert accuracy["0.3"][0] < accuracy["0"][0] - 0.05
    assert auc["learned, annotated labels, last layer"][2] < others[0]
    later = auc["learned, annotated labels, last layer, a token later"][0]
    assert later == pytest.approx(sure, abs=0.05)
    for found in result["labels"].values():
        assert found["right"] > 0.95


def test_the_least_needy_are_skipped() -> None:
    zoom, stock = np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    need = np.array([0.9, 0.1, 0.2, 0.3])
    for share, expected in ((0.0, [1, 1, 0, 1]), (0.5, [1, 1, 1, 1]), (0.75, [1, 1, 1, 0])):
        right = gates.accuracy_when_skipping(zoom, stock, need, share)
        assert right.tolist() == expected
    assert zoom.tolist() == [1, 1, 0, 1]


def test_labels_are_held_against_the_generator() -> None:
    row = {"answer": "level", "colour": "red"}
    state = as_text(np.ones(2, np.float32))
    views = {"second_zoom": None, "shrunk": None, "losses": None, "reason": None}
    lines = [
        {"id": name, "image": "x", "zoom": zoom, "stock": stock, "confidence": 0.5, "state": state}
        | views
        for name, zoom, stock in (
            ("mended", "red level", "red rising"),
            ("same", "red level", "red level"),
            ("spoiled", "red rising", "red level"),
        )
    ]
    lines.append({"id": "none", "image": "x", **views, "zoom": None, "stock": None})
    lines[-1] |= {"reason": "no region", "confidence": None}
    labels = gates.Labels(lines, dict.fromkeys(("mended", "same", "spoiled"), row), "agreement")
    assert [labels.is_mended(line) for line in lines[:3]] == [True, False, False]
    expected = {"questions": 4, "labels 1": 2, "labels 0": 1, "ignored": 1, "right": 0.6667}
    assert labels.quality() == expected
    assert [line["id"] for line in labels.asked] == ["mended", "same", "spoiled"]


def test_questions_have_no_answers(tmp_path: Path) -> None:
    rows = gates.write_questions(tmp_path, 1)
    asked = read_questions(tmp_path / "questions.jsonl", tmp_path / "images")
    assert [one.id for one in asked] == list(rows)
    assert all(not one.given for one in asked)
    assert all((tmp_path / "images" / one.image).is_file() for one in asked)
