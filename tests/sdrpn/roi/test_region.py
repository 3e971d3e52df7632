"""From maps to boxes to crops, on maps drawn by hand: `#` is over the threshold, `.` under it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

from sdrpn.backbones.base import Backbone, ImageInput
from sdrpn.backbones.llava15 import crop_to_square, square_grid
from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.roi import postprocess as region
from sdrpn.roi.crops import crop_tokens, keep_mask, resize
from sdrpn.roi.postprocess import (
    Region,
    blur,
    components,
    crop_grid_size,
    grow,
    peak_threshold,
    propose,
)
from sdrpn.roi.vicrop import propose_window

HIGH, LOW = 0.9, 0.01
ANY_SIZE = ZoomConfig(max_cells_fraction=1.0)


def drawn(*rows: str) -> np.ndarray:
    """A map from strings: '.' is low, '#' is high, a digit n is n / 10."""
    values = {".": LOW, "#": HIGH} | {str(n): n / 10 for n in range(10)}
    return np.array([[values[cell] for cell in row] for row in rows], dtype=np.float32)


def square_view(grid: int, cell: int = 10) -> ImageGrid:
    """A square image of `cell` pixels a cell, which the model sees at its own size."""
    return square_grid((grid * cell, grid * cell), grid, grid * cell)


def boxes(found: Region) -> list[tuple[int, ...]]:
    return [tuple(box) for box in found.grid_boxes]


def look(*rows: str, policy: str = "bbox", zoom: ZoomConfig = ANY_SIZE) -> Region:
    """Propose on a drawn map over a square image of 10 px a cell."""
    values = drawn(*rows)
    found = propose(values, square_view(len(values)), replace(zoom, policy=policy))
    assert [tuple(10 * edge for edge in box) for box in boxes(found)] == [*map(tuple, found.boxes)]
    assert bool(found.boxes) == (found.reason is None)
    return found


# --- components --------------------------------------------------------------------------------


def test_one_component() -> None:
    found = look(
        "......",
        ".##...",
        ".###..",
        "......",
        "......",
        "......",
    )
    assert boxes(found) == [(1, 1, 4, 3)]
    assert found.keep is None


def test_empty_map() -> None:
    for policy in ("mask", "bbox", "strongest"):
        found = look("....", "....", "....", "....", policy=policy)
        assert found.boxes == ()
        assert found.reason == "no cell over the threshold 0.15"


def test_full_map_is_too_large() -> None:
    full = ["####"] * 4
    for policy in ("mask", "bbox", "strongest"):
        found = look(*full, policy=policy, zoom=ZoomConfig())
        assert found.reason == "no component within the size limits"
        assert boxes(look(*full, policy=policy)) == [(0, 0, 4, 4)]


def test_one_cell_is_dropped_unless_asked_for() -> None:
    lonely = ["......", "......", "...#..", "......", "......", "......"]
    assert look(*lonely).reason == "no component within the size limits"
    assert boxes(look(*lonely, zoom=replace(ANY_SIZE, min_cells=1))) == [(2, 1, 5, 4)]


def test_touching_diagonals_are_one_component() -> None:
    """Eight neighbours: with four, these would be two components of two cells."""
    found = look(
        "......",
        ".##...",
        "...##.",
        "......",
        "......",
        "......",
    )
    assert boxes(found) == [(1, 1, 5, 3)]


def test_a_gap_of_one_cell_parts_components() -> None:
    found = look(
        "##.##.",
        "##.##.",
        "......",
        "......",
        "......",
        "......",
    )
    assert boxes(found) == [(0, 0, 2, 2), (3, 0, 5, 2)]


def test_components_at_the_border() -> None:
    found = look(
        "......",
        "......",
        "......",
        "......",
        "....##",
        "....##",
    )
    assert boxes(found) == [(4, 4, 6, 6)]


def test_the_threshold_itself_is_not_over_it() -> None:
    values = np.full((4, 4), LOW, dtype=np.float32)
    values[1, :] = 0.25
    at = propose(values, square_view(4), replace(ANY_SIZE, threshold=0.25))
    below = propose(values, square_view(4), replace(ANY_SIZE, threshold=0.2499))
    assert at.boxes == ()
    assert boxes(below) == [(0, 1, 4, 2)]


def test_size_limits_count_cells_not_boxes() -> None:
    """225 of 576 cells pass and 226 do not, as published; the box may be larger."""
    for extra, passes in ((0, True), (1, False)):
        over = np.zeros((24, 24), dtype=bool)
        over[4:19, 4:19] = True
        over[19, 4 : 4 + extra] = True
        assert bool(components(over, ZoomConfig())) is passes
    ring = np.zeros((24, 24), dtype=bool)
    ring[0, :] = ring[-1, :] = ring[:, 0] = ring[:, -1] = True
    ((box, mask),) = components(ring, ZoomConfig())
    assert tuple(box) == (0, 0, 24, 24)
    assert mask.sum() == 92


def test_the_upper_limit_is_rounded() -> None:
    """0.31 of 25 cells are 7.75: a component of 8 passes, one of 9 does not."""
    eight = ["###..", "###..", "##...", ".....", "....."]
    zoom = ZoomConfig(max_cells_fraction=0.31)
    assert boxes(look(*eight, zoom=zoom)) == [(0, 0, 3, 3)]
    nine = ["###..", "###..", "###..", ".....", "....."]
    assert look(*nine, zoom=zoom).reason == "no component within the size limits"


def test_the_lower_limit() -> None:
    two_and_four = ["##....", "......", "..##..", "..##..", "......", "......"]
    assert len(boxes(look(*two_and_four))) == 2
    found = look(*two_and_four, zoom=replace(ANY_SIZE, min_cells=3))
    assert boxes(found) == [(2, 2, 4, 4)]


def test_components_carry_their_own_cells() -> None:
    """Boxes may overlap; the masks say which cells belong to which."""
    over = drawn(
        "#####.",
        "#...#.",
        "#.....",
        "#..##.",
        "#..##.",
        "......",
    )
    found = components(over > 0.5, ANY_SIZE)
    assert [tuple(box) for box, _ in found] == [(0, 0, 5, 5), (3, 3, 5, 5)]
    assert [int(mask.sum()) for _, mask in found] == [10, 4]


# --- growing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("small", "grown"),
    [
        ((3, 3, 4, 4), (2, 2, 5, 5)),  # one cell: one more on every side
        ((3, 3, 5, 4), (3, 2, 6, 5)),  # two cells: the odd one goes to the far side
        ((3, 3, 6, 4), (3, 2, 6, 5)),  # three in a row: only higher
        ((0, 0, 1, 2), (0, 0, 3, 3)),  # near corner
        ((6, 7, 8, 8), (5, 5, 8, 8)),  # far corner: shifted back, still holding both cells
        ((7, 2, 8, 5), (5, 2, 8, 5)),  # far border
        ((2, 2, 6, 3), (2, 1, 6, 4)),  # longer than 3 stays as long
    ],
)
def test_grow(small: tuple[int, ...], grown: tuple[int, ...]) -> None:
    assert tuple(grow(GridBox(*small), 8, 8)) == grown


def test_only_components_under_four_cells_are_grown() -> None:
    line = look("......", "####..", "......", "......", "......", "......")
    assert boxes(line) == [(0, 1, 4, 2)]
    three = look("......", "###...", "......", "......", "......", "......")
    assert boxes(three) == [(0, 0, 3, 3)]


@given(grid=st.integers(3, 30), data=st.data())
def test_grown_boxes_hold_the_component_and_stay_inside(grid: int, data: st.DataObject) -> None:
    width, height = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]))
    x = data.draw(st.integers(0, grid - width))
    y = data.draw(st.integers(0, grid - height))
    grown = grow(GridBox(x, y, x + width, y + height), grid, grid)
    assert 0 <= grown.x0 <= x < x + width <= grown.x1 <= grid
    assert 0 <= grown.y0 <= y < y + height <= grown.y1 <= grid
    assert (grown.x1 - grown.x0, grown.y1 - grown.y0) == (3, 3)


# --- policies ----------------------------------------------------------------------------------

TWO = (
    "........",
    ".##.....",
    ".##.....",
    "........",
    "........",
    "....5555",
    "....5555",
    "........",
)
THREE = (
    "##......",
    "##......",
    "........",
    "........",
    "...5555.",
    "........",
    "##......",
    "##......",
)


def test_bbox_crops_up_to_two_components() -> None:
    assert boxes(look(*TWO, policy="bbox")) == [(1, 1, 3, 3), (4, 5, 8, 7)]
    found = look(*THREE, policy="bbox")
    assert found.boxes == ()
    assert found.reason == "3 components, more than two"


def test_mask_boxes_all_cells_of_several_components() -> None:
    for rows, around in ((TWO, (1, 1, 8, 7)), (THREE, (0, 0, 7, 8))):
        found = look(*rows, policy="mask")
        assert boxes(found) == [around]
        assert found.keep is not None
        assert np.array_equal(found.keep, drawn(*rows) > 0.15)


def test_mask_boxes_dropped_cells_too() -> None:
    """*All* cells over the threshold, those of components that were dropped as well."""
    lonely = ("#" + TWO[0][1:], *TWO[1:])
    found = look(*lonely, policy="mask")
    assert boxes(found) == [(0, 0, 8, 7)]
    assert found.keep is not None
    assert found.keep[0, 0]


def test_mask_with_one_component_is_bbox() -> None:
    """A single cell beside it, dropped, does not make it two, and does not widen its box."""
    rows = ("#.......", ".......#", *["........"] * 2, "..###...", "..###...", *["........"] * 2)
    for policy in ("mask", "bbox", "strongest"):
        found = look(*rows, policy=policy)
        assert boxes(found) == [(2, 4, 5, 6)]
        assert found.keep is None


def test_strongest_takes_the_highest_value() -> None:
    assert boxes(look(*TWO, policy="strongest")) == [(1, 1, 3, 3)]
    small_and_strong = [row.replace("#", "4") for row in TWO]
    assert boxes(look(*small_and_strong, policy="strongest")) == [(4, 5, 8, 7)]
    assert len(boxes(look(*THREE, policy="strongest"))) == 1


def test_strongest_looks_at_component_cells_only() -> None:
    """A dropped cell inside a component's box lends it no strength."""
    rows = (
        "5555....",
        "5...5...",
        "5.....66",
        "5.#...66",
        "5.......",
        "........",
        "........",
        "........",
    )
    assert boxes(look(*rows, policy="strongest")) == [(6, 2, 8, 4)]


def test_strongest_passes_over_peaks_in_the_padding() -> None:
    """On a wide image the upper and lower rows show no picture, however high the map is there."""
    rows = (
        "99......",
        "99......",
        "....55..",
        "....55..",
        "....66..",
        "....66..",
        "8.......",
        "8.......",
    )
    wide = square_grid((448, 112), 8, 112)  # a cell has 14 model pixels and 56 source pixels
    found = propose(drawn(*rows), wide, replace(ANY_SIZE, policy="strongest"))
    assert boxes(found) == [(4, 2, 6, 6)]
    assert [tuple(box) for box in found.boxes] == [(224, 0, 336, 112)]
    square = propose(
        drawn(*rows), square_grid((448, 448), 8, 112), replace(ANY_SIZE, policy="strongest")
    )
    assert boxes(square) == [(0, 0, 2, 2)]
    only = [row.replace("5", ".").replace("6", ".") for row in rows]
    nothing = propose(drawn(*only), wide, replace(ANY_SIZE, policy="strongest"))
    assert nothing.reason == "the region contains only padding"


# --- the image ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "padding", "box", "pixels"),
    [
        # 4 x 4 cells of 28 px. 112 x 112: one source pixel is one model pixel.
        ((112, 112), "pad", (1, 1, 2, 3), (28, 28, 56, 84)),
        # Twice as large: everything doubles.
        ((224, 224), "pad", (1, 1, 2, 3), (56, 56, 112, 168)),
        # 224 x 112: 28 model pixels of padding above and below, one row of cells each.
        ((224, 112), "pad", (0, 1, 4, 3), (0, 0, 224, 112)),
        ((224, 112), "pad", (1, 0, 2, 2), (56, 0, 112, 56)),
        ((224, 112), "pad", (1, 0, 2, 1), (56, 0, 112, 0)),
        ((112, 224), "pad", (3, 1, 4, 2), (112, 56, 112, 112)),
        # The central square of 224 x 112 begins at 56.
        ((224, 112), "crop", (0, 0, 4, 4), (56, 0, 168, 112)),
        ((112, 224), "crop", (1, 0, 2, 1), (28, 56, 56, 84)),
        # 100 x 75 on 112: 1.12 model pixels a pixel, 14 of padding; truncated: 25 / 12.5 / 50.
        ((100, 75), "pad", (1, 1, 2, 2), (25, 12, 50, 37)),
    ],
)
def test_to_pixels(
    size: tuple[int, int], padding: str, box: tuple[int, ...], pixels: tuple[int, ...]
) -> None:
    assert tuple(square_grid(size, 4, 112, padding).to_pixels(GridBox(*box))) == pixels


@pytest.mark.parametrize(
    ("size", "box", "pixels"),
    [
        # Edges on whole pixels, which float64 puts one lower or higher.
        ((500, 500), (6, 6, 12, 12), (125, 125, 250, 250)),
        ((500, 500), (3, 9, 18, 21), (62, 187, 375, 437)),
        ((2000, 1500), (3, 7, 18, 17), (250, 333, 1500, 1166)),
        # 333 x 0.48 = 159.84: the image has 159 rows, and so 88.5 of padding and not 88.08.
        ((700, 333), (12, 9, 15, 14), (350, 78, 437, 223)),
        ((700, 333), (0, 6, 24, 18), (0, 0, 700, 333)),
        # 640 x 0.525 and 300 x 0.21 are whole numbers, which float32 would truncate to one less.
        ((640, 480), (19, 8, 22, 11), (506, 133, 586, 213)),
        ((1600, 300), (13, 11, 16, 14), (866, 83, 1066, 283)),
        ((300, 1600), (9, 18, 12, 21), (0, 1200, 150, 1400)),
        # 79 x (336 / 79) is under 336 in float64 too: half a pixel of padding on both sides.
        ((79, 79), (4, 8, 10, 20), (13, 26, 32, 65)),
        ((20, 20), (5, 3, 8, 6), (4, 2, 6, 5)),
    ],
)
def test_edges_follow_the_published_rounding(
    size: tuple[int, int], box: tuple[int, ...], pixels: tuple[int, ...]
) -> None:
    assert tuple(square_grid(size, 24, 336).to_pixels(GridBox(*box))) == pixels


@settings(max_examples=500)
@given(
    size=st.tuples(st.integers(1, 8192), st.integers(1, 8192)),
    edges=st.tuples(*[st.integers(0, 24)] * 4),
)
def test_edges_are_those_of_float32_tensors(size: tuple[int, int], edges: tuple[int, ...]) -> None:
    """Against tensor arithmetic: (cell x 14 - pad) / ratio, clamped, truncated."""
    width, height = size
    ratio = min(336 / width, 336 / height)
    pad = torch.tensor([(336 - int(width * ratio)) / 2, (336 - int(height * ratio)) / 2] * 2)
    found = (torch.tensor(edges, dtype=torch.float32) * 14 - pad) / ratio
    expected = torch.minimum(found.clamp(min=0), torch.tensor([width, height] * 2)).int()
    assert list(square_grid(size, 24, 336).to_pixels(GridBox(*edges))) == expected.tolist()


def test_cropped_squares_keep_their_exact_offset() -> None:
    """On 333 x 100, `crop` resizes to 1118.88 columns and takes the middle 336."""
    view = square_grid((333, 100), 24, 336, "crop")
    assert view.offset == pytest.approx((-391.44, 0.0))
    assert tuple(view.to_pixels(GridBox(0, 0, 24, 12))) == (116, 0, 216, 50)
    assert tuple(view.to_cells(PixelBox(117, 0, 216, 50))) == (0, 0, 24, 12)


def test_regions_in_the_padding_alone() -> None:
    """On a wide image the upper and lower cells show no picture: there is nothing to crop."""
    view = square_grid((448, 112), 8, 112)
    rows = ["........"] * 8
    rows[0] = rows[1] = "..##...."
    found = propose(drawn(*rows), view, ANY_SIZE)
    assert found.boxes == ()
    assert "padding" in str(found.reason)
    rows[4] = "..####.."
    both = propose(drawn(*rows), view, replace(ANY_SIZE, policy="bbox"))
    assert [tuple(box) for box in both.boxes] == [(112, 56, 336, 112)]
    assert boxes(both) == [(2, 4, 6, 5)]


@pytest.mark.parametrize("box", [(28, 28, 56, 84), (0, 0, 112, 112), (0, 28, 28, 56)])
def test_to_grid_undoes_to_pixels(box: tuple[int, ...]) -> None:
    for size in ((112, 112), (336, 336)):
        view = square_grid(size, 4, 112)
        scaled = PixelBox(*(edge * size[0] // 112 for edge in box))
        assert view.to_pixels(view.to_cells(scaled)) == scaled


def test_to_grid_takes_every_cell_a_box_touches() -> None:
    view = square_grid((112, 112), 4, 112)
    assert tuple(view.to_cells(PixelBox(27, 28, 57, 29))) == (0, 1, 3, 2)
    assert tuple(view.to_cells(PixelBox(111, 0, 112, 1))) == (3, 0, 4, 1)
    wide = square_grid((224, 112), 4, 112)
    assert tuple(wide.to_cells(PixelBox(0, 0, 1, 1))) == (0, 1, 1, 2)


def test_to_grid_ends_where_a_cell_ends() -> None:
    """On 500 x 500 a cell of 14 model pixels has 20.83 source pixels: 6 of them make 125."""
    view = square_grid((500, 500), 24, 336)
    assert tuple(view.to_cells(PixelBox(125, 250, 375, 500))) == (6, 12, 18, 24)
    assert tuple(view.to_cells(PixelBox(124, 249, 376, 500))) == (5, 11, 19, 24)
    # 88.5 model pixels of padding: cell 6 holds the first rows, cell 17 the last.
    wide = square_grid((700, 333), 24, 336)
    assert tuple(wide.to_cells(PixelBox(0, 0, 700, 333))) == (0, 6, 24, 18)
    assert tuple(wide.to_cells(PixelBox(175, 20, 350, 78))) == (6, 7, 12, 9)


def test_cropped_away_boxes_still_have_cells() -> None:
    """A given box may lie where `crop` shows nothing; its token grid needs a size all the same."""
    view = square_grid((300, 100), 4, 112, "crop")
    for box in (PixelBox(0, 0, 10, 10), PixelBox(290, 90, 300, 100)):
        cells = view.to_cells(box)
        assert 0 <= cells.x0 < cells.x1 <= 4
        assert 0 <= cells.y0 < cells.y1 <= 4


GRIDS = st.integers(3, 24)
SIDES = st.one_of(
    st.integers(1, 30), st.integers(1, 3000), st.sampled_from([10_000, 20_000, 30_000, 1_000_000])
)
"""Of images: smaller than the grid, ordinary, and as long as anything that opens."""
CELLS = st.one_of(st.sampled_from([0, 0.25, 0.75]), st.floats(0, 1, width=32))


@settings(max_examples=300)
@given(
    data=st.data(),
    grid=GRIDS,
    size=st.tuples(SIDES, SIDES),
    threshold=st.floats(0.01, 0.99),
    policy=st.sampled_from(["mask", "bbox", "strongest"]),
    padding=st.sampled_from(["pad", "crop"]),
    min_cells=st.integers(1, 4),
    fraction=st.floats(0.05, 1.0),
)
def test_any_map_gives_sound_boxes(
    data: st.DataObject,
    grid: int,
    size: tuple[int, int],
    threshold: float,
    policy: str,
    padding: str,
    min_cells: int,
    fraction: float,
) -> None:
    """Boxes lie inside the image and hold pixels; in cells, each holds a whole component."""
    zoom = ZoomConfig(threshold, policy, None, min_cells, fraction)
    values = data.draw(arrays(np.float32, (grid, grid), elements=CELLS))
    view = square_grid(size, grid, 14 * grid, padding)
    found = propose(values, view, zoom)
    assert bool(found.boxes) == (found.reason is None)
    assert len(found.boxes) == len(found.grid_boxes) <= (2 if policy == "bbox" else 1)
    for box, cells in zip(found.boxes, found.grid_boxes, strict=True):
        assert 0 <= box.x0 < box.x1 <= size[0]
        assert 0 <= box.y0 < box.y1 <= size[1]
        assert view.to_pixels(cells) == box
        assert 0 <= cells.x0 < cells.x1 <= grid
        assert 0 <= cells.y0 < cells.y1 <= grid
        inside = np.zeros((grid, grid), dtype=bool)
        inside[cells.y0 : cells.y1, cells.x0 : cells.x1] = True
        labelled, count = ndimage.label(values > threshold, np.ones((3, 3)))
        whole = [i for i in range(1, count + 1) if inside[labelled == i].all()]
        sizes = [int((labelled == i).sum()) for i in whole]
        assert any(min_cells <= n <= round(fraction * grid * grid) for n in sizes)
    if found.keep is not None:
        assert inside[values > threshold].all()


@settings(max_examples=100)
@given(size=st.tuples(SIDES, SIDES), grid=GRIDS, data=st.data())
def test_a_box_lies_inside_its_cells(size: tuple[int, int], grid: int, data: st.DataObject) -> None:
    """Into cells and back, a box only widens, but for the truncation of one pixel a side."""
    view = square_grid(size, grid, 14 * grid)
    x0, y0 = (data.draw(st.integers(0, edge - 1)) for edge in size)
    x1, y1 = data.draw(st.integers(x0 + 1, size[0])), data.draw(st.integers(y0 + 1, size[1]))
    around = view.to_pixels(view.to_cells(PixelBox(x0, y0, x1, y1)))
    assert around.x0 <= x0
    assert around.y0 <= y0
    assert around.x1 >= x1 - 1
    assert around.y1 >= y1 - 1


@settings(max_examples=100)
@given(
    data=st.data(),
    grid=GRIDS,
    size=st.tuples(SIDES, SIDES),
    padding=st.sampled_from(["pad", "crop"]),
)
def test_any_ratio_gives_a_sound_window(
    data: st.DataObject, grid: int, size: tuple[int, int], padding: str
) -> None:
    """ViCrop's window: a square of at least one pixel, inside the image and the grid."""
    ratio = data.draw(arrays(np.float32, (grid, grid), elements=st.floats(0, 1e6, width=32)))
    found = propose_window(ratio, square_grid(size, grid, 14 * grid, padding))
    ((box,), (cells,)) = found.boxes, found.grid_boxes
    assert 0 <= box.x0 < box.x1 <= size[0]
    assert 0 <= box.y0 < box.y1 <= size[1]
    assert box.x1 - box.x0 == box.y1 - box.y0
    assert 0 <= cells.x0 < cells.x1 <= grid
    assert 0 <= cells.y0 < cells.y1 <= grid


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 10_000)])
def test_a_region_of_less_than_a_pixel_is_none(size: tuple[int, int]) -> None:
    """On an image smaller than the grid a box may lie inside it and hold no pixel."""
    rows = ["........"] * 8
    rows[0] = "##......"
    found = propose(drawn(*rows), square_grid(size, 8, 112), replace(ANY_SIZE, min_cells=1))
    assert found.boxes == ()
    assert found.reason == "the region contains only padding"


# --- given boxes -------------------------------------------------------------------------------


def test_a_given_box_is_taken_as_it_is() -> None:
    found = region.region_from_box(PixelBox(5, 30, 112, 84), square_grid((112, 112), 4, 112))
    assert found.boxes == (PixelBox(5, 30, 112, 84),)
    assert found.grid_boxes == (GridBox(0, 1, 4, 3),)
    assert found.reason is None
    assert region.region_from_box(
        PixelBox(0, 0, 112, 112), square_grid((112, 112), 4, 112)
    ).boxes == ((0, 0, 112, 112),)


@pytest.mark.parametrize(
    "box",
    [
        (-1, 0, 5, 5),
        (0, -1, 5, 5),
        (0, 0, 41, 5),
        (0, 0, 5, 31),
        (5, 5, 5, 9),
        (5, 9, 9, 5),
        (5, 5, 9, 5),
    ],
)
def test_a_given_box_must_lie_inside_the_image(box: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not lie inside the 40 x 30 image") as error:
        region.region_from_box(PixelBox(*box), square_grid((40, 30), 4, 112))
    assert str(box) in str(error.value)


# --- blur --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [2, 8, 24])
def test_blur_is_a_gaussian_of_three_by_three(grid: int) -> None:
    """Against torch: kernel 3 x 3, sigma 1, reflect padding."""
    values = np.random.default_rng(grid).random((grid, grid), dtype=np.float32)
    line = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2)
    kernel = torch.outer(line, line) / torch.outer(line, line).sum()
    wide = torch.nn.functional.pad(
        torch.tensor(values, dtype=torch.float64)[None, None], (1, 1, 1, 1), mode="reflect"
    )
    expected = torch.nn.functional.conv2d(wide, kernel[None, None])[0, 0].numpy()
    found = blur(values)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6


def test_blur_of_flat_maps_and_of_one_cell() -> None:
    for value in (0.0, 0.3, 1.0):
        assert np.allclose(blur(np.full((6, 6), value, dtype=np.float32)), value, atol=1e-7)
    one = np.zeros((5, 5), dtype=np.float32)
    one[2, 2] = 1
    spread = blur(one)
    assert spread.sum() == pytest.approx(1)
    assert spread[2, 2] == spread.max()
    assert np.array_equal(np.argwhere(spread > 0)[[0, -1]], [[1, 1], [3, 3]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_maps_are_refused(value: float) -> None:
    """A map of NaN must not look like an image without a region."""
    values = drawn("....", "....", "....", "....")
    values[1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        propose(values, square_view(4), ZoomConfig())


# --- crops -------------------------------------------------------------------------------------


def noise_image(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def test_crops_are_cut_from_the_original_and_stretched() -> None:
    image = noise_image(50, 40)
    found = crop_to_square(image, PixelBox(10, 5, 42, 37), 32)
    assert np.array_equal(np.asarray(found), np.asarray(image)[5:37, 10:42])
    assert crop_to_square(image, PixelBox(0, 0, 50, 3), 32).size == (32, 32)
    assert crop_to_square(image, PixelBox(7, 7, 8, 8), 32).getcolors() == [
        (1024, image.getpixel((7, 7)))
    ]


@settings(max_examples=60)
@given(data=st.data(), size=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_any_box_gives_a_crop_of_its_own_pixels(data: st.DataObject, size: tuple[int, int]) -> None:
    """Never empty, and no colour that is not between those of the box."""
    x0, y0 = (data.draw(st.integers(0, edge - 1)) for edge in size)
    box = PixelBox(
        x0, y0, data.draw(st.integers(x0 + 1, size[0])), data.draw(st.integers(y0 + 1, size[1]))
    )
    image = noise_image(*size)
    cut = np.asarray(image)[box.y0 : box.y1, box.x0 : box.x1]
    found = np.asarray(crop_to_square(image, box, 28))
    assert found.shape == (28, 28, 3)
    assert (found >= cut.min((0, 1))).all()
    assert (found <= cut.max((0, 1))).all()


def test_crops_that_are_very_high_resize_rows_first() -> None:
    """Columns first would take side x height pixels of a crop one pixel wide."""
    high, bilinear = noise_image(5, 9_000), Image.Resampling.BILINEAR
    found = np.asarray(crop_to_square(high, PixelBox(0, 0, 5, 9_000), 112))
    rows = high.resize((5, 112), bilinear).resize((112, 112), bilinear)
    columns = high.resize((112, 9_000), bilinear).resize((112, 112), bilinear)
    assert np.array_equal(found, rows)
    assert not np.array_equal(found, columns)


@pytest.mark.parametrize("size", [(300, 60), (60, 300), (20, 20), (1000, 900), (5, 8192)])
def test_crops_resize_columns_first(size: tuple[int, int]) -> None:
    """The order of the two passes decides the rounding, so it is not left to Pillow's version."""
    image = noise_image(*size)
    found = np.asarray(crop_to_square(image, PixelBox(0, 0, *size), 112), dtype=int)
    columns = image.resize((112, size[1]), Image.Resampling.BILINEAR)
    assert np.array_equal(found, columns.resize((112, 112), Image.Resampling.BILINEAR))
    rows = image.resize((size[0], 112), Image.Resampling.BILINEAR)
    other = np.asarray(rows.resize((112, 112), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(found - other).max() <= 2


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (None, (24, 24)),
        (1.0, (2, 5)),
        (2.0, (4, 10)),
        (0.1, (1, 1)),
        (4.9, (10, 24)),
        (99, (24, 24)),
    ],
)
def test_budget_is_cells_of_the_box_times_the_ratio(
    ratio: float | None, expected: tuple[int, int]
) -> None:
    """(rows, columns) for a box of 5 x 2 cells, at most the grid."""
    assert crop_grid_size(GridBox(3, 4, 8, 6), 24, 24, ZoomConfig(token_budget=ratio)) == expected


def test_kept_tokens_follow_the_cut_map() -> None:
    """The map is cut to the box before it is resized, and what exceeds one half stays."""
    over = drawn(
        "....",
        ".##.",
        ".#..",
        "....",
    )
    found = keep_mask(over > 0.5, GridBox(1, 1, 3, 3), 4, 4).reshape(4, 4)
    # Tokens lie at quarters of cells. The innermost one of the empty quarter gets 9/16 of its own
    # cell and 7/16 of the three full ones, which does not exceed one half.
    assert found.tolist() == [
        [True, True, True, True],
        [True, True, True, True],
        [True, True, False, False],
        [True, True, False, False],
    ]
    assert keep_mask(over > 0.5, GridBox(1, 1, 3, 3), 2, 2).tolist() == [True, True, True, False]
    assert keep_mask(over > 0.5, GridBox(2, 2, 4, 4), 2, 2).tolist() == [False] * 4


def test_resize_is_bilinear_and_leaves_whole_grids_alone() -> None:
    feature = torch.arange(32.0).reshape(4, 4, 2)
    assert resize(feature, 4, 4) is feature
    small = resize(feature, 2, 1)
    assert small.shape == (2, 1, 2)
    # align_corners=False without antialiasing: the middle of 4 columns lies between 1 and 2.
    assert small[0, 0].tolist() == feature[0:2, 1:3].mean((0, 1)).tolist()


def encoding(grid: int) -> dict[str, Any]:
    """What a backbone is asked for: crop tokens of one channel, told apart by their number."""
    ready = ImageInput(torch.zeros(0), square_grid((1, 1), grid, 14))
    tokens = torch.arange(1.0, grid**2 + 1)[:, None]
    return {
        "crop_marks": 0,
        "crop_input.return_value": ready,
        "encode.side_effect": lambda inputs: [tokens for _ in inputs],
    }


@settings(max_examples=200)
@given(
    data=st.data(),
    grid=GRIDS,
    size=st.tuples(SIDES, SIDES),
    policy=st.sampled_from(["mask", "bbox", "strongest"]),
    token_budget=st.one_of(st.none(), st.floats(0.01, 20)),
    room=st.integers(0, 700),
)
def test_crop_tokens_are_some_and_fit_or_there_are_none(
    data: st.DataObject,
    grid: int,
    size: tuple[int, int],
    policy: str,
    token_budget: float | None,
    room: int,
) -> None:
    """Whatever region a map gives: never an empty crop, never more tokens than there is room."""
    zoom = ZoomConfig(0.5, policy, token_budget, 1, 1.0)
    values = data.draw(arrays(np.float32, (grid, grid), elements=CELLS))
    found = propose(values, square_grid(size, grid, 14 * grid), zoom)
    image = Image.new("RGB", (1, 1))
    encoder = Mock(Backbone, **encoding(grid))
    (crops,) = crop_tokens(encoder, [image], [found], [zoom], [room])
    if not found.boxes:
        assert crops == []
        return
    whole = sum(
        rows * columns
        for rows, columns in (crop_grid_size(b, grid, grid, zoom) for b in found.grid_boxes)
    )
    if not crops:
        assert room < len(found.boxes) or found.keep is not None
        return
    tokens = torch.cat([crop.tokens for crop in crops])
    assert 1 <= len(tokens) <= min(room, whole)
    assert tokens.isfinite().all()
    if whole <= room and found.keep is None:
        assert len(tokens) == whole


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\), got 1.5"),
        ({"threshold": 0}, r"threshold must be in \(0, 1\), got 0"),
        ({"threshold": float("nan")}, "threshold must be in"),
        ({"policy": "boxes"}, "policy must be one of mask, bbox, strongest, got 'boxes'"),
        ({"token_budget": 0}, "token_budget must be above 0 or None, got 0"),
        ({"min_cells": 0}, "min_cells must be 1 or more, got 0"),
        ({"max_cells_fraction": 1.1}, r"max_cells_fraction must be in \(0, 1\], got 1.1"),
        ({"max_cells_fraction": 0}, "max_cells_fraction must be in"),
    ],
)
def test_settings_are_checked(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZoomConfig(**wrong)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown key\(s\) treshold in ZoomConfig; known: .*thres"
    ):
        ZoomConfig.from_dict({"treshold": 0.2})
    assert ZoomConfig.from_dict({"threshold": 0.2}) == ZoomConfig(threshold=0.2)


def test_the_published_settings_are_the_defaults() -> None:
    zoom = ZoomConfig()
    assert (zoom.threshold, zoom.policy, zoom.token_budget) == (0.15, "mask", None)
    assert (zoom.min_cells, round(zoom.max_cells_fraction * 576)) == (2, 225)


def test_a_region_as_large_as_the_image_is_not_zoomed_where_told() -> None:
    """9 of 16 cells: skipped from 9/16 on, and looked at again where nothing is said."""
    rows = ("....", ".###", ".###", ".###")
    assert boxes(look(*rows, zoom=replace(ANY_SIZE, skip_above=0.57))) == [(1, 1, 4, 4)]
    skipped = look(*rows, zoom=replace(ANY_SIZE, skip_above=0.56))
    assert not skipped.boxes
    assert skipped.reason == "the region is 56% of the image (skip_above=0.56)"
    assert boxes(look(*rows)) == [(1, 1, 4, 4)]
    with pytest.raises(ValueError, match="skip_above must be in"):
        replace(ANY_SIZE, skip_above=1.5)


def test_settings_from_text() -> None:
    assert ZoomConfig.from_text("") == ZoomConfig()
    text = "threshold=0.2, policy=strongest,min_cells=1,token_budget=none,skip_above=0.7"
    text += ",crop_tokens=144,tiles=2,gate=0.9,keep_tokens=128"
    assert ZoomConfig.from_text(text) == ZoomConfig(
        0.2,
        "strongest",
        None,
        1,
        skip_above=0.7,
        crop_tokens=144,
        tiles=2,
        gate=0.9,
        keep_tokens=128,
    )
    for wrong, message in (
        ("treshold=0.2", r"unknown key\(s\) treshold"),
        ("threshold=high", "zoom settings 'threshold=high'"),
        ("threshold=2", "threshold must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            ZoomConfig.from_text(wrong)


# --- a threshold relative to the peak ----------------------------------------------------------


PEAKED = replace(ANY_SIZE, threshold="peak", policy="strongest", min_cells=1)
SQUARE = square_grid((448, 448), 8, 112)


def test_a_lone_cell_passes_with_its_neighbours() -> None:
    """Blurred, it has 0.204, 0.124 and 0.075 of its height: all over 0.3 of 0.204."""
    values = np.zeros((8, 8), dtype=np.float32)
    values[3, 4] = 1
    blurred = blur(values)
    found = propose(blurred, SQUARE, PEAKED)
    assert boxes(found) == [(3, 2, 6, 5)]
    assert found.foreground is not None
    assert int(found.foreground.sum()) == 9
    # However sure the RPN is: a tenth of the height gives the same region, a fiftieth none.
    assert boxes(propose(blurred / 6, SQUARE, PEAKED)) == [(3, 2, 6, 5)]
    low = propose(blurred / 50, SQUARE, PEAKED)
    assert low.reason == "the map's peak is 0.004, below 0.03 (threshold=peak)"


@pytest.mark.parametrize(
    ("peak", "rest", "reason"),
    [
        (0.0299, 0.0, "the map's peak is 0.030, below 0.03 (threshold=peak)"),
        (0.0301, 0.0, None),
        # 64 cells: with one at p and the others at r, the mean is (p + 63 r) / 64.
        (0.9, 0.295, "the map's peak is 3.0 times its mean, below 3 (threshold=peak)"),
        (0.9, 0.26, None),
        (0.9, 0.5, "the map's peak is 1.8 times its mean, below 3 (threshold=peak)"),
    ],
)
def test_maps_without_a_clear_peak_have_no_region(
    peak: float, rest: float, reason: str | None
) -> None:
    values = np.full((8, 8), rest, dtype=np.float32)
    values[2, 2] = peak
    found = propose(values, SQUARE, PEAKED)
    assert found.reason == reason
    assert boxes(found) == ([] if reason else [(1, 1, 4, 4)])


def test_the_threshold_is_three_tenths_of_the_peak() -> None:
    values = np.zeros((8, 8), dtype=np.float32)
    values[4, 4], values[4, 5], values[4, 3] = 0.5, 0.151, 0.149
    assert peak_threshold(values, SQUARE) == pytest.approx(0.15)
    found = propose(values, SQUARE, PEAKED)
    assert found.foreground is not None
    assert np.argwhere(found.foreground).tolist() == [[4, 4], [4, 5]]


def test_padding_counts_for_neither_peak_nor_mean() -> None:
    """A wide image fills rows 3 and 4 of 8; what lies above and below is no part of it."""
    wide = square_grid((448, 112), 8, 112)
    values = np.zeros((8, 8), dtype=np.float32)
    values[3:5] = 0.3
    values[3, 2] = 0.6
    # Over all 64 cells the mean is 0.08 and the peak 7.6 times that; over 16 it is 1.9 times.
    assert propose(values, wide, PEAKED).reason == (
        "the map's peak is 1.9 times its mean, below 3 (threshold=peak)"
    )
    values[3:5] = 0.01
    values[3, 2], values[0, 0] = 0.2, 0.9
    assert peak_threshold(values, wide) == pytest.approx(0.06)
    assert boxes(propose(values, wide, PEAKED)) == [(1, 2, 4, 5)]


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((448, 448), (0, 8), (0, 8)),
        ((448, 112), (3, 5), (0, 8)),
        ((112, 448), (0, 8), (3, 5)),
        # 30 of 112 pixels high: rows 41 to 71 of the frame, cells of 14.
        ((448, 120), (2, 6), (0, 8)),
    ],
)
def test_cells_inside_the_image(
    size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    expected = np.zeros((8, 8), dtype=bool)
    expected[slice(*rows), slice(*columns)] = True
    assert np.array_equal(square_grid(size, 8, 112).inside, expected)


def test_settings_of_earlier_versions() -> None:
    old = {"threshold": 0.2, "relative": True, "max_crop_tokens": 64}
    assert ZoomConfig.from_dict(old) == ZoomConfig(threshold="peak", crop_tokens=64)
    old = {"threshold": 0.2, "relative": False, "max_crop_tokens": None}
    assert ZoomConfig.from_dict(old) == ZoomConfig(threshold=0.2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": "top"}, "threshold must be float, got 'top'; the only other value is"),
        ({"gate": 0}, r"gate must be in \(0, 1\) or None, got 0"),
        ({"learned_gate": 1}, r"learned_gate must be in \(0, 1\) or None, got 1"),
        ({"crop_tokens": 0}, "crop_tokens must be 1 or more, got 0"),
        ({"keep_tokens": 0}, "keep_tokens must be 1 or more, got 0"),
        ({"tiles": 3}, "tiles must be one of 1, 2, 4, got 3"),
        ({"keep_tokens": 8, "thin_above": 9}, "both drop image tokens: give one"),
    ],
)
def test_new_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ZoomConfig(**settings)
