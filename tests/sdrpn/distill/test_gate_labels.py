"""The rules that turn answers into labels of the gate, on examples that a person can check."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.distill.gate_labels import (
    GateConfig,
    Losses,
    Views,
    beats_controls,
    control_boxes,
    gain,
    label,
    log_odds,
    needs_ladder,
    same_answer,
    shrunk,
    words,
)

# Words


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  Red, Stripes. ", ["red", "stripes"]),
        ("U.S.", ["us"]),
        ("$3.50!", ["3.50"]),
        ("1,000 men", ["1000", "men"]),
        ("10:30 a.m.", ["10:30", "am"]),
        (".5.", ["5"]),
        ("...", []),
        ("", []),
    ],
)
def test_answers_are_words_without_punctuation(answer: str, expected: list[str]) -> None:
    assert words(answer) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Red stripes.", "red Stripes", True),
        ("stripes", "red stripes", True),
        ("red", "red stripes", True),
        ("the red disc", "on the red disc there", True),
        ("the disc", "the red disc", False),
        ("1", "10", False),
        ("3.5", "35", False),
        ("1,000", "1000", True),
        ("blue stripes", "red stripes", False),
        ("", "red", False),
        ("", " . ", True),
    ],
)
def test_answers_match_by_whole_words(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


# Rules

LOSSES = Losses(stock=3.0, zoom=0.1, controls=(2.5, 2.9))
MENDED = Views("a dog", "a cat", "dog", "a cow", confidence=0.5, losses=LOSSES)
"""Both zooms agree; neither the image nor the shrunk one gives their answer."""


@pytest.mark.parametrize(
    ("change", "consensus", "agreement"),
    [
        ({}, (1, None), (1, None)),
        ({"stock": "Dog!"}, (0, None), (0, None)),
        ({"stock": "dog", "shrunk": None, "losses": None}, (0, None), (0, None)),
        ({"second_zoom": "horse"}, (None, "the two zooms disagree"), (1, None)),
        (
            {"stock": "dog", "second_zoom": "horse"},
            (None, "the two zooms disagree"),
            (0, None),
        ),
        (
            {"shrunk": "dog"},
            (None, "right on the shrunk image, wrong on the image"),
            (1, None),
        ),
        ({"losses": replace(LOSSES, controls=(0.2, 0.1))}, (0, None), (1, None)),
        ({"stock": ""}, (1, None), (1, None)),
        ({"reason": "no region"}, (None, "no region"), (None, "no region")),
    ],
)
def test_labels(change: dict[str, Any], consensus: Any, agreement: Any) -> None:
    views = replace(MENDED, **change)
    assert label(views, GateConfig("consensus")) == consensus
    assert label(views, GateConfig("agreement")) == agreement


def test_a_missing_view_is_an_error() -> None:
    assert label(Views("a", "b"), GateConfig("agreement")) == (1, None)
    with pytest.raises(ValueError, match="second_zoom is missing"):
        label(Views("a", "b"), GateConfig("consensus"))


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({}, True),
        ({"stock": "dog"}, False),
        ({"second_zoom": "cow"}, False),
        ({"zoom": None}, False),
    ],
)
def test_the_ladder_is_climbed_only_where_it_decides(change: dict[str, Any], needed: bool) -> None:
    assert needs_ladder(replace(MENDED, **change)) is needed


def test_gains_are_clipped_log_odds() -> None:
    assert log_odds(math.log(2)) == pytest.approx(0)
    assert log_odds(-math.log(0.8)) == pytest.approx(math.log(4))
    assert gain(-math.log(0.8), math.log(2)) == pytest.approx(math.log(4))
    assert gain(0.0, 30.0) == 5
    assert gain(30.0, 0.0) == -5
    assert gain(0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("controls", "kappa", "beats"),
    [
        # Odds: stock 1, zoom 4; a control of 1.9 has a gain of log 1.9, under half of log 4.
        ([-math.log(1.9 / 2.9)], 2.0, True),
        ([-math.log(2.1 / 3.1)], 2.0, False),
        ([-math.log(2.1 / 3.1)], 1.0, True),
        ([9.0, -math.log(2.1 / 3.1)], 2.0, False),  # the best control counts
        ([9.0], 100.0, True),  # controls that lose set no bar
        ([-math.log(0.8)], 0.0, True),
    ],
)
def test_a_zoom_has_to_beat_its_controls(controls: list[float], kappa: float, beats: bool) -> None:
    losses = Losses(math.log(2), -math.log(0.8), tuple(controls))
    assert beats_controls(losses, kappa) is beats


def test_a_zoom_that_lowers_its_answer_beats_no_control() -> None:
    assert not beats_controls(Losses(0.1, 0.2, (5.0,)), 1.0)


# Views

TENTH = (Fraction(1, 10), Fraction(1, 10))
"""Ten source pixels a cell, exactly."""


def test_controls_lie_where_the_map_is_lowest() -> None:
    grid = ImageGrid(4, 6, (60, 40), cell=1, scale=TENTH)
    roi_map = np.full((4, 6), 0.5, np.float32)
    roi_map[0:2, 0:2] = 0.9  # the region
    roi_map[2:4, 4:6] = 0.1
    roi_map[0:2, 3:5] = 0.2
    region = PixelBox(0, 0, 20, 20)
    first, second = PixelBox(40, 20, 60, 40), PixelBox(30, 0, 50, 20)
    assert control_boxes(roi_map, grid, [region]) == [first, second]
    assert control_boxes(roi_map, grid, [region], count=1) == [first]
    # Of the size of the largest region, and outside all of them.
    small = PixelBox(50, 30, 60, 40)
    assert control_boxes(roi_map, grid, [small, region])[0] == second


def test_a_control_needs_room() -> None:
    grid = ImageGrid(4, 6, (60, 40), cell=1, scale=TENTH)
    flat = np.zeros((4, 6), np.float32)
    assert control_boxes(flat, grid, [PixelBox(0, 0, 40, 40)]) == []
    assert control_boxes(flat, grid, [PixelBox(0, 0, 30, 40)]) == [PixelBox(30, 0, 60, 40)]


def test_controls_avoid_the_padding() -> None:
    # 6 x 6 cells, of which the middle two rows show a 60 x 20 image.
    grid = ImageGrid(6, 6, (60, 20), cell=1, scale=TENTH, offset=(0, 2))
    roi_map = np.zeros((6, 6), np.float32)
    roi_map[2:4] = 0.5
    found = control_boxes(roi_map, grid, [PixelBox(0, 0, 20, 20)])
    assert found == [PixelBox(20, 0, 40, 20), PixelBox(40, 0, 60, 20)]


def test_truncated_edges_do_not_enlarge_controls() -> None:
    # 100 pixels over 7 cells: edges at 14.3, 28.6, ... are truncated.
    grid = ImageGrid(7, 7, (100, 100), cell=1, scale=(0.07, 0.07))
    roi_map = np.ones((7, 7), np.float32)
    roi_map[5:, 5:] = 0
    region = grid.to_pixels(GridBox(1, 1, 3, 3))
    assert region == PixelBox(14, 14, 42, 42)
    assert control_boxes(roi_map, grid, [region], count=1) == [PixelBox(71, 71, 100, 100)]


def test_an_image_is_shrunk_to_half_of_the_models_side() -> None:
    image = Image.new("RGB", (400, 200))
    assert shrunk(image, ImageGrid(8, 8, (400, 200), 14, (0.28, 0.28), (0, 28))).size == (56, 28)
    small = Image.new("RGB", (50, 20))
    assert shrunk(small, ImageGrid(8, 8, (50, 20), 14, (2.24, 2.24), (0, 34))) is small


# Settings


@pytest.mark.parametrize(
    ("own", "expected"),
    [(0.15, (0.15, 0.075)), ("peak", ("peak", 0.05))],
)
def test_thresholds_default_to_the_rpns_own(own: Any, expected: Any) -> None:
    assert GateConfig().thresholds_for(ZoomConfig(threshold=own)) == expected


def test_thresholds_are_read() -> None:
    config = GateConfig.from_text("consensus", "peak, 0.1", 1.25)
    assert config == GateConfig("consensus", ("peak", 0.1), 1.25)
    assert config.thresholds_for(ZoomConfig()) == ("peak", 0.1)
    assert GateConfig.from_text("agreement", "", 1.0) == GateConfig("agreement")


@pytest.mark.parametrize(
    ("rule", "thresholds", "kappa", "message"),
    [
        ("votes", "", 1.0, "rule must be one of consensus, agreement, got 'votes'"),
        ("consensus", "0.1", 1.0, "thresholds must be two, such as 0.15,0.075, got '0.1'"),
        ("consensus", "low,0.1", 1.0, "thresholds must be two, such as 0.15,0.075, got 'low,0.1'"),
        ("consensus", "0.1,1.5", 1.0, r"threshold must be in \(0, 1\), got 1.5"),
        ("consensus", "0.1,0.1", 1.0, "thresholds must differ, got 0.1 twice"),
        ("consensus", "", -1.0, "kappa must be 0 or more, got -1.0"),
        ("consensus", "", math.nan, "kappa must be 0 or more, got nan"),
    ],
)
def test_wrong_options_are_refused(rule: str, thresholds: str, kappa: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig.from_text(rule, thresholds, kappa)
