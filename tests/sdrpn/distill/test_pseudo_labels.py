"""Pseudo-labels on attention maps drawn by hand.

Maps: a digit n is n / 10 of the maximum, `#` the maximum, `*` a sink that looks stronger than all.
Labels: `1` foreground, `0` background, `.` ignored.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from sdrpn.config import LABELS_7B, LABELS_13B, LabelConfig, LayerHeads, published_labels
from sdrpn.distill.pseudo_labels import IGNORED, label_cells, padding_cells, pseudo_labels
from sdrpn.roi.sinks import remove_sinks

CONFIG = LABELS_7B
SCALE = 0.01
"""Attention shares of single tokens are small; nothing may depend on their scale."""


def label(*rows: str, config: LabelConfig = CONFIG, scale: float = SCALE) -> list[str]:
    """Draw a map, label it, draw the labels."""
    values = {"#": 1.0, "*": 5.0, ".": 0.0} | {str(n): n / 10 for n in range(10)}
    grounding = np.array([values[cell] for row in rows for cell in row], dtype=np.float32) * scale
    sink = np.array([0.5 if cell == "*" else 1e-4 for row in rows for cell in row])
    shape = len(rows), len(rows[0])
    found = pseudo_labels(grounding.reshape(shape), sink.reshape(shape), config)
    assert found.dtype == np.int8
    assert found.shape == shape
    names = {1: "1", 0: "0", IGNORED: "."}
    drawn = "".join(names[int(value)] for value in found.ravel())
    width = len(rows[0])
    return [drawn[start : start + width] for start in range(0, len(drawn), width)]


def ignored(rows: int) -> list[str]:
    return ["." * rows] * rows


def test_foreground_background_and_the_uncertain() -> None:
    """Over 0.2 of the maximum: 1. Under 0.1 and outside the box: 0. The rest: ignored."""
    assert label(
        "......",
        ".#3...",
        ".5....",
        "......",
        "...1..",
        "....2.",
    ) == [
        "000000",
        "011000",
        "01.000",
        "000000",
        "000.00",
        "0000.0",
    ]


def test_attention_that_points_at_several_places_can_be_ignored() -> None:
    """Ours, off as published: two components are one too many for `max_components=1`."""
    apart = ("#.....", "......", "......", "......", "5.....", "......")
    touching = ("#.....", ".5....", "......", "......", "......", "......")
    one = replace(CONFIG, max_components=1)
    assert label(*apart, config=one) == ignored(6)
    assert label(*apart) != ignored(6)
    assert label(*apart, config=replace(CONFIG, max_components=2)) == label(*apart)
    assert label(*touching, config=one) == label(*touching)


def test_only_the_component_with_the_most_attention_can_be_labelled() -> None:
    """Ours, off as published: the peak stands alone, and the four cells below it hold more."""
    rows = ("#.....", "......", "......", "...44.", "...44.", ".1....")
    most = replace(CONFIG, strongest=0.0)
    assert label(*rows, config=most) == ["000000"] * 3 + ["000110"] * 2 + ["000000"]
    # It has 1.6 of the foreground's 2.6; the cell below 0.2 of the maximum does not count.
    assert label(*rows, config=replace(most, strongest=0.61)) == label(*rows, config=most)
    assert label(*rows, config=replace(most, strongest=0.62)) == ignored(6)
    # Inside its box nothing is background, and its size is limited, not that of all foreground.
    apart = ("#.....", ".3....", "......", "......", "......", ".....3")
    assert label(*apart) == ignored(6)
    assert label(*apart, config=most) == ["1.0000", ".10000"] + ["000000"] * 4


def test_cells_inside_the_box_are_never_background() -> None:
    assert label("#....", ".....", "..#..", ".....", ".....") == [
        "1..00",
        "...00",
        "..100",
        "00000",
        "00000",
    ]


def test_one_cell() -> None:
    assert label("....", "..#.", "....", "....") == ["0000", "0010", "0000", "0000"]


def test_the_border() -> None:
    assert label("....", "....", "....", "..##") == ["0000", "0000", "0000", "0011"]
    assert label("#...", "#...", "....", "....") == ["1000", "1000", "0000", "0000"]


def test_empty_and_full_maps_are_ignored() -> None:
    assert label("....", "....", "....", "....") == ignored(4)
    assert label("####", "####", "####", "####") == ignored(4)
    # Level everywhere is full at any height.
    assert label("3333", "3333", "3333", "3333") == ignored(4)


def test_all_sinks_are_ignored() -> None:
    assert label("****", "****", "****", "****") == ignored(4)


def test_sinks_neither_point_nor_set_the_scale() -> None:
    """A sink is background like any cell without attention; 3 is foreground once it is gone."""
    assert label("*...", ".6..", ".3..", "...*") == ["0000", "0100", "0100", "0000"]
    # A sink at the edge does not widen the box, one inside it is ignored.
    assert label("6...", "*...", "6...", "....") == ["1000", ".000", "1000", "0000"]


def test_the_sink_threshold_is_reached_by_equality() -> None:
    grounding = np.array([0.5, 0.5, 0.5, 0.5])
    sink = np.array([1e-3, 0.9e-3, 1.0, 0.0])
    assert remove_sinks(grounding, sink, 1e-3).tolist() == [0, 0.5, 0, 0.5]
    assert grounding.tolist() == [0.5] * 4


def test_a_box_of_half_the_grid_is_ignored() -> None:
    """8 of 16 cells are half and out; 6 of 16 are in. The box counts, not its cells."""
    assert label("#...", "...#", "....", "....") == ignored(4)
    assert label("#...", "..#.", "....", "....") == ["1..0", "..10", "0000", "0000"]
    assert label("#...", "...#", "....", "....", config=replace(CONFIG, max_box_fraction=0.6)) == [
        "1...",
        "...1",
        "0000",
        "0000",
    ]


def test_lines_are_drawn_by_over_and_under() -> None:
    """Exactly 0.2 of the maximum is not foreground, exactly 0.1 not background."""
    grounding = np.zeros(16)
    grounding[[0, 3, 12, 15]] = 1.0, 0.25, 0.125, 0.1249
    config = replace(CONFIG, foreground=0.25, background=0.125)
    found = pseudo_labels(grounding.reshape(4, 4), np.zeros((4, 4)), config).ravel()
    assert found[[0, 3, 12, 15]].tolist() == [1, IGNORED, IGNORED, 0]


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
def test_scale_does_not_matter(scale: float) -> None:
    rows = ("#3..", "12..", "...1", "....")
    assert label(*rows, scale=scale) == label(*rows)


def test_why_there_are_no_labels() -> None:
    """As rows of label folders and their summaries say it."""
    point, sink = np.zeros(16), np.zeros(16)
    point[5] = 0.1
    apart = point.copy()
    apart[7] = 0.1
    one = replace(CONFIG, max_components=1)
    for grounding, config, reason in (
        (point, CONFIG, None),
        (np.full(16, np.nan), CONFIG, "attention that is not finite"),
        (np.zeros(16), CONFIG, "no attention left without the sinks"),
        (np.ones(16), CONFIG, "foreground over too much of the image"),
        (apart, CONFIG, None),
        (apart, one, "foreground at several places"),
    ):
        labels, told = label_cells(grounding.reshape(4, 4), sink.reshape(4, 4), config)
        assert told == reason
        assert (labels == IGNORED).all() == (reason is not None)


def test_odd_shapes_are_refused() -> None:
    for one, other in (((10,), (10,)), ((3, 3), (4, 4)), ((2, 8), (8, 2)), ((0, 3), (0, 3))):
        with pytest.raises(ValueError, match="two grids"):
            pseudo_labels(np.zeros(one), np.zeros(other), CONFIG)


def test_grids_need_not_be_square() -> None:
    assert label("....#", ".....", "2....") == ["0000" + "1", "00000", ".0000"]


def test_published_heads() -> None:
    assert published_labels(32, 4096) is LABELS_7B
    assert published_labels(40, 5120) is LABELS_13B
    assert published_labels(6, 128) is None
    assert LABELS_7B.grounding == (LayerHeads(14, (13, 24, 26)),)
    assert LABELS_7B.sink == (LayerHeads(2, None),)
    assert LABELS_13B.grounding == (
        LayerHeads(13, (21, 23, 26)),
        LayerHeads(15, (2,)),
        LayerHeads(16, (2, 21, 30)),
    )
    assert LABELS_13B.sink == (LayerHeads(16, (17, 22)),)


@pytest.mark.parametrize("config", [LABELS_7B, LABELS_13B], ids=["7B", "13B"])
def test_published_lines(config: LabelConfig) -> None:
    """What makes a sink, foreground, background, and a sample whose foreground is too wide."""
    assert config.sink_threshold == 1e-3
    assert (config.foreground, config.background) == (0.2, 0.1)
    assert config.max_box_fraction == 0.5
    assert config.max_components is None
    assert config.max_new_tokens == 128
    assert config.vicrop_layer == 14


def test_label_settings_survive_json() -> None:
    for config in (LABELS_7B, LABELS_13B):
        assert LabelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


# Padding, margins and faint maps, as for the second family


@pytest.mark.parametrize(
    ("edge", "cells", "shown"),
    [
        (21, 4, range(1, 3)),  # 2.1 of 4 rows: 2, from the first on
        (21, 5, range(1, 4)),  # 2.6 of 5: 2, and one more behind them
        (39, 5, range(0, 5)),  # 4.9 of 5: 4, and one more
        (1, 4, range(1, 3)),  # never less than 1
        (1, 5, range(2, 3)),
        (40, 4, range(4)),
    ],
)
def test_cells_of_padding_only(edge: int, cells: int, shown: range) -> None:
    """Of a picture of 40 by less, centred in a square; and on its side."""
    found = padding_cells((40, edge), cells)
    assert found.dtype == bool
    assert found.tolist() == [[row not in shown] * cells for row in range(cells)]
    assert (padding_cells((edge, 40), cells) == found.T).all()


def test_padding_is_background_whatever_it_holds() -> None:
    """The peak is 1: of the picture, not of the padding above and below it."""
    grounding = np.array([[5, 0.15, 0], [1, 0.15, 0], [0.15, 0, 0]])
    padding = np.array([[True] * 3, [False] * 3, [True] * 3])
    sink = np.zeros((3, 3))
    expected = [[0, 0, 0], [1, IGNORED, 0], [0, 0, 0]]
    labels, reason = label_cells(grounding, sink, LABELS_7B, padding)
    assert (labels.tolist(), reason) == (expected, None)
    assert pseudo_labels(grounding, sink, LABELS_7B, padding).tolist() == expected
    labels, reason = label_cells(grounding, sink, LABELS_7B, np.ones((3, 3), dtype=bool))
    assert reason == "no attention left without the sinks"
    assert (labels == IGNORED).all()


def test_a_margin_around_the_foreground_is_no_background() -> None:
    grounding = np.zeros((6, 6))
    grounding[1, 2] = grounding[2, 2] = 1
    config = replace(LABELS_7B, box_margin=1)
    labels = label_cells(grounding, np.zeros((6, 6)), config)[0]
    box, none = [0, IGNORED, IGNORED, IGNORED, 0, 0], [0] * 6
    middle = [0, IGNORED, 1, IGNORED, 0, 0]
    assert labels.tolist() == [box, middle, middle, box, none, none]
    corner = np.zeros((4, 4))
    corner[0, 0] = 1
    labels = label_cells(corner, np.zeros((4, 4)), config)[0]
    assert labels.tolist() == [[1, IGNORED, 0, 0], [IGNORED, IGNORED, 0, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("floor", "reason"), [(0.5, None), (0.51, "attention to the image too faint")]
)
def test_a_map_is_kept_from_its_floor_on(floor: float, reason: str | None) -> None:
    grounding = np.zeros((3, 3))
    grounding[1, 1] = 0.5
    found = label_cells(grounding, np.zeros((3, 3)), replace(LABELS_7B, floor=floor))
    assert found[1] == reason
    assert (found[0] == IGNORED).all() == (reason is not None)
