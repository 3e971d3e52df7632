"""Crops fitted into the context: token counts computed by hand, on grids of numbered tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from sdrpn.backbones.base import Backbone, CropTokens, ImageInput
from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.roi.crops import crop_tokens, keep_mask, widen
from sdrpn.roi.postprocess import Region

WHOLE = ZoomConfig()
BOX = PixelBox(0, 0, 8, 8)


def encoder(rows: int, columns: int) -> Any:
    """A backbone whose n-th crop has the tokens 1000 n, 1000 n + 1, ..., of one channel."""
    grid = ImageGrid(rows, columns, (8, 8), 1, (1.0, 1.0))

    def encode(inputs: Sequence[ImageInput]) -> list[torch.Tensor]:
        count = rows * columns
        return [torch.arange(1000.0 * n, 1000.0 * n + count)[:, None] for n in range(len(inputs))]

    made = Mock(Backbone, crop_marks=0)
    made.crop_input.side_effect = lambda image, box: ImageInput(torch.zeros(0), grid)
    made.encode.side_effect = encode
    return made


def region(*cells: GridBox, keep: np.ndarray | None = None) -> Region:
    return Region((BOX,) * len(cells), cells, None, keep)


def fitted(
    shape: tuple[int, int], room: int, crops: int = 1, keep: np.ndarray | None = None
) -> list[CropTokens]:
    """Crops of one image, each of the whole 4 x 4 map."""
    found = region(*[GridBox(0, 0, 4, 4)] * crops, keep=keep)
    (row,) = crop_tokens(encoder(*shape), [Image.new("RGB", (8, 8))], [found], [WHOLE], [room])
    return row


@pytest.mark.parametrize(
    ("shape", "crops", "room", "sizes"),
    [
        ((4, 4), 1, 16, [(4, 4)]),
        # Sides shrink by sqrt(room / tokens), at most to 0.95, and are rounded down.
        ((4, 4), 1, 5, [(2, 2)]),
        ((4, 4), 1, 1, [(1, 1)]),
        ((24, 24), 1, 575, [(22, 22)]),
        ((24, 24), 1, 550, [(22, 22)]),
        ((24, 24), 1, 300, [(17, 17)]),
        ((2, 8), 1, 4, [(1, 4)]),
        ((8, 2), 1, 4, [(4, 1)]),
        ((2, 8), 1, 9, [(1, 6)]),
        # A side stays at 1 while the other one shrinks.
        ((1, 4), 1, 2, [(1, 2)]),
        ((4, 1), 1, 2, [(2, 1)]),
        ((1, 4), 1, 1, [(1, 1)]),
        ((1, 21), 1, 20, [(1, 19)]),
        # Several crops share what room there is: 0.79 x 4 is 3, 2 x 9 are 18.
        ((4, 4), 2, 32, [(4, 4), (4, 4)]),
        ((4, 4), 2, 20, [(3, 3), (3, 3)]),
        ((4, 4), 2, 2, [(1, 1), (1, 1)]),
        # No room for a token of each: none at all.
        ((4, 4), 2, 1, []),
        ((4, 4), 1, 0, []),
        ((4, 4), 1, -3, []),
    ],
)
def test_crops_shrink_until_they_fit(
    shape: tuple[int, int], crops: int, room: int, sizes: list[tuple[int, int]]
) -> None:
    found = fitted(shape, room, crops)
    assert [(crop.rows, crop.columns) for crop in found] == sizes
    assert [tuple(crop.tokens.shape) for crop in found] == [(r * c, 1) for r, c in sizes]
    assert all(crop.keep is None for crop in found)


def test_shrunk_grids_are_resized_bilinearly() -> None:
    """2 x 2 of 4 x 4 row-major numbers: each the mean of a quarter."""
    (crop,) = fitted((4, 4), 5)
    assert crop.tokens.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_only_kept_tokens_count() -> None:
    """The upper half of the map is kept: 8 of 16 tokens, and of 3 x 3 the first row."""
    upper = np.zeros((4, 4), bool)
    upper[:2] = True
    (crop,) = fitted((4, 4), 8, keep=upper)
    assert crop.tokens.flatten().tolist() == list(range(8))
    assert crop.keep is not None
    assert crop.keep.tolist() == [True] * 8 + [False] * 8
    assert (crop.rows, crop.columns) == (4, 4)
    # Of 3 rows the second lies on the edge: exactly 0.5, which is not over it.
    (crop,) = fitted((4, 4), 7, keep=upper)
    assert (len(crop.tokens), crop.rows, crop.columns) == (3, 3, 3)
    assert crop.keep is not None
    assert crop.keep.tolist() == [True] * 3 + [False] * 6


def test_a_mask_that_keeps_no_token_gives_no_crop() -> None:
    assert fitted((4, 4), 99, keep=np.zeros((4, 4), bool)) == []


def test_masks_are_cut_by_rows_and_by_columns() -> None:
    """Rows are y and columns x, in the box, in the map and in the token grid."""
    over = np.zeros((4, 6), bool)
    over[1, 2:5] = over[2, 2] = True
    box = GridBox(2, 1, 5, 3)  # 3 wide, 2 high
    assert keep_mask(over, box, 2, 3).reshape(2, 3).tolist() == [
        [True, True, True],
        [True, False, False],
    ]
    # On one row of tokens a cell and the empty one below it make a half, which is not over it.
    assert keep_mask(over, box, 1, 3).tolist() == [True, False, False]
    # On two columns: 0.75 of the first column's cells come from columns 0, a quarter from 1.
    assert keep_mask(over, box, 2, 2).reshape(2, 2).tolist() == [[True, True], [True, False]]


def test_crops_come_back_with_their_row() -> None:
    """Three images with two boxes, none and one: encoded together, each with its own settings."""
    images = [Image.new("RGB", (8, 8), (n, n, n)) for n in range(3)]
    two = Region((PixelBox(0, 0, 4, 4), PixelBox(4, 4, 8, 8)), (GridBox(0, 0, 2, 2),) * 2)
    none = Region((), (), "nothing")
    one = Region((PixelBox(1, 2, 7, 8),), (GridBox(0, 0, 3, 2),))
    settings = [WHOLE, WHOLE, ZoomConfig(token_budget=1.0)]
    backbone = encoder(4, 4)
    found = crop_tokens(backbone, images, [two, none, one], settings, [32, 32, 32])
    asked = [(call.args[0].getpixel((0, 0))[0], call.args[1]) for call in (
        backbone.crop_input.call_args_list
    )]  # fmt: skip
    assert asked == [(0, two.boxes[0]), (0, two.boxes[1]), (2, one.boxes[0])]
    assert backbone.encode.call_count == 1
    sizes = [[(crop.rows, crop.columns) for crop in row] for row in found]
    assert sizes == [[(4, 4), (4, 4)], [], [(2, 3)]]
    first = [[int(crop.tokens[0]) // 1000 for crop in row] for row in found]
    assert first == [[0, 1], [], [2]]
    # Room is each row's own.
    (short, _, whole) = crop_tokens(backbone, images, [two, none, one], settings, [2, 0, 6])
    assert [len(crop.tokens) for crop in (*short, *whole)] == [1, 1, 6]


def test_no_box_at_all_asks_the_backbone_nothing() -> None:
    backbone = encoder(4, 4)
    images = [Image.new("RGB", (8, 8))] * 2
    nothing = [Region((), (), "nothing")] * 2
    assert crop_tokens(backbone, images, nothing, [WHOLE] * 2, [9] * 2) == [[], []]
    assert backbone.encode.call_count == 0


# --- sparse crops and tiles --------------------------------------------------------------------


def drawn(*rows: str) -> np.ndarray:
    return np.array([[cell == "#" for cell in row] for row in rows])


def tiled(rows: int, columns: int, tiles: tuple[int, int]) -> Any:
    """`encoder`, whose crops are cut into tiles (down, across) if they are asked for."""
    made = encoder(rows, columns)
    grid = ImageGrid(rows, columns, (8, 8), 1, (1.0, 1.0))
    part = ImageInput(torch.zeros(0), grid)

    def crop_inputs(image: Any, box: Any, *, tiles: int, max_tokens: int | None) -> Any:
        down, across = size if tiles > 1 else (1, 1)
        return [[part] * across for _ in range(down)]

    size = tiles
    made.crop_inputs.side_effect = crop_inputs
    return made


def kept_of(
    over: np.ndarray, budget: int | None, *, tiles: int = 1, backbone: Any = None
) -> list[CropTokens]:
    cells = GridBox(0, 0, over.shape[1], over.shape[0])
    found = Region((BOX,), (cells,), None, None, over)
    zoom = ZoomConfig(crop_tokens=budget, tiles=tiles)
    backbone = backbone or tiled(4, 4, (1, 1))
    (row,) = crop_tokens(backbone, [Image.new("RGB", (8, 8))], [found], [zoom], [budget or 999])
    return row


def test_a_budget_drops_background_tokens_before_it_shrinks() -> None:
    over = drawn("#...", "....", "....", "....")
    (whole,) = kept_of(over, 16)
    assert (len(whole.tokens), whole.keep) == (16, None)  # fits as it is
    (sparse,) = kept_of(over, 15)
    # The cell's own token and its neighbours, in reading order.
    assert (sparse.rows, sparse.columns) == (4, 4)
    assert sparse.tokens[:, 0].tolist() == [0, 1, 4, 5]
    # Of two by two tokens the first has a quarter of foreground, the most; all are its neighbours.
    (small,) = kept_of(over, 3)
    assert (small.rows, small.columns, len(small.tokens)) == (1, 1, 1)


def test_a_budget_shrinks_crops_whose_foreground_is_too_large() -> None:
    (crop,) = kept_of(np.ones((4, 4), dtype=bool), 9)
    assert (crop.rows, crop.columns, len(crop.tokens)) == (3, 3, 9)


def test_a_box_without_a_map_shrinks_only() -> None:
    zoom = ZoomConfig(crop_tokens=9)
    backbone = tiled(4, 4, (1, 1))
    (row,) = crop_tokens(
        backbone, [Image.new("RGB", (8, 8))], [region(GridBox(0, 0, 4, 4))], [zoom], [9]
    )
    assert [(crop.rows, crop.columns, crop.keep) for crop in row] == [(3, 3, None)]


def test_a_full_context_shrinks_as_without_a_budget() -> None:
    """Only the budget makes crops sparse: the published settings have none."""
    over = drawn("#...", "....", "....", "....")
    found = Region((BOX,), (GridBox(0, 0, 4, 4),), None, None, over)
    (row,) = crop_tokens(encoder(4, 4), [Image.new("RGB", (8, 8))], [found], [WHOLE], [9])
    assert [(crop.rows, crop.columns, crop.keep) for crop in row] == [(3, 3, None)]


def test_tiles_are_joined_into_one_grid() -> None:
    over = drawn("##", "..")
    backbone = tiled(2, 2, (2, 2))
    (crop,) = kept_of(over, None, tiles=4, backbone=backbone)
    assert (crop.rows, crop.columns) == (4, 4)
    # The upper half is foreground, and one more row of neighbours: tiles 0 and 1, top rows of 2, 3.
    expected = [0, 1, 1000, 1001, 2, 3, 1002, 1003, 2000, 2001, 3000, 3001]
    assert crop.tokens[:, 0].tolist() == expected
    assert backbone.encode.call_count == 1


def test_tiles_share_one_budget() -> None:
    backbone = tiled(4, 4, (2, 2))
    (crop,) = kept_of(np.ones((4, 4), dtype=bool), 16, tiles=4, backbone=backbone)
    assert (crop.rows, crop.columns, len(crop.tokens)) == (4, 4, 16)
    backbone.crop_inputs.assert_called_with(
        backbone.crop_inputs.call_args.args[0], BOX, tiles=4, max_tokens=16
    )


def test_widened_masks_reach_diagonal_neighbours_and_stop_at_the_edge() -> None:
    keep = torch.tensor([True, *[False] * 11])
    assert widen(keep, 3, 4).reshape(3, 4).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
    ]
    assert not widen(torch.zeros(6, dtype=torch.bool), 2, 3).any()
