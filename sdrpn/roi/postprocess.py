"""From a RoI map to boxes: blur, threshold, components, policies (SD-RPN, section 3.3).

Plain geometry on arrays, no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from scipy import ndimage

from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import SMALL_SQUARE, MapRules, ZoomConfig

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
SMALLEST_BOX = 3
"""Components of fewer than 4 cells are grown to boxes of at least 3 x 3 cells."""


@dataclass(frozen=True)
class Region:
    """Where to look again. Empty `boxes` means no zoom, and `reason` then says why.

    grid_boxes: the same boxes in cells. keep: [rows, columns] of {0, 1}, the cells whose crop
    tokens stay under the `mask` policy with several components; None keeps every crop token.
    """

    boxes: tuple[PixelBox, ...] = ()
    grid_boxes: tuple[GridBox, ...] = ()
    reason: str | None = None
    keep: Bool[np.ndarray, "rows columns"] | None = None


def blur(
    probabilities: Float[np.ndarray, "rows columns"],
) -> Float32[np.ndarray, "rows columns"]:
    """Gaussian blur, 3 x 3, sigma 1, reflect padding.

    probabilities: [rows, columns] in [0, 1]. Returns float32 of the same shape.
    """
    kernel = np.exp(-0.5 * np.array([-1.0, 0.0, 1.0]) ** 2)
    kernel /= kernel.sum()
    # scipy's "mirror" is what torch calls "reflect": the border cell itself is not repeated.
    blurred = ndimage.correlate1d(probabilities.astype(np.float64), kernel, axis=0, mode="mirror")
    return ndimage.correlate1d(blurred, kernel, axis=1, mode="mirror").astype(np.float32)


def darken(
    values: Float[np.ndarray, "rows columns"], rules: MapRules
) -> Float[np.ndarray, "rows columns"]:
    """Set the sinks of large grids to 0: the first quarters of the top row and the left column.

    values: [rows, columns]; returned as they are where the grid is small enough, else as a copy.
    """
    if rules.dark_above is None or values.size <= rules.dark_above:
        return values
    dark, (rows, columns) = values.copy(), values.shape
    dark[: rows // 4, 0] = 0
    dark[0, : columns // 4] = 0
    return dark


def components(
    over: Bool[np.ndarray, "rows columns"], zoom: ZoomConfig
) -> list[tuple[GridBox, np.ndarray]]:
    """Connected components with 8 neighbours, in reading order.

    over: bool [rows, columns]. Returns (box, bool mask of the component) for each that is neither
    too small nor too large; boxes of components under 4 cells are grown to at least 3 x 3.
    """
    labelled: Any = ndimage.label(over, structure=EIGHT_NEIGHBOURS)[0]  # type: ignore[index]
    largest = round(zoom.max_cells_fraction * over.size)
    found = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labelled), start=1):
        mask = labelled == index
        cells = int(mask.sum())
        if not zoom.min_cells <= cells <= largest:
            continue
        box = GridBox(columns.start, rows.start, columns.stop, rows.stop)
        found.append((grow(box, *over.shape) if cells < 4 else box, mask))
    return found


def grow(box: GridBox, rows: int, columns: int) -> GridBox:
    """Grow a box to at least 3 x 3 cells around its centre, shifted to stay inside the grid."""

    def side(low: int, high: int, cells: int) -> tuple[int, int]:
        missing = max(SMALLEST_BOX - (high - low), 0)
        low = min(max(low - missing // 2, 0), max(cells - (high - low) - missing, 0))
        return low, min(max(low + SMALLEST_BOX, high), cells)

    (x0, x1), (y0, y1) = side(box.x0, box.x1, columns), side(box.y0, box.y1, rows)
    return GridBox(x0, y0, x1, y1)


def propose(
    blurred: Float[np.ndarray, "rows columns"],
    grid: ImageGrid,
    zoom: ZoomConfig,
    rules: MapRules = SMALL_SQUARE,
) -> Region:
    """Threshold a blurred map and choose the boxes to crop (SD-RPN, section 3.3).

    blurred: [rows, columns] in [0, 1], from `blur`. rules: of the model family. NaN is refused: a
    broken map must not look like an image without a region.
    """
    if not np.isfinite(blurred).all():
        raise ValueError("the RoI map holds values that are not finite; check the RPN's weights")
    over = blurred > zoom.threshold
    if not over.any():
        return Region(reason=f"no cell over the threshold {zoom.threshold:g}")
    found = components(over, zoom)
    if zoom.policy == "mask" and (rules.one_box or len(found) >= 2):
        return _to_source([_around(over)], grid, zoom, rules, keep=over)
    if not found:
        return Region(reason="no component within the size limits")
    if zoom.policy == "strongest":
        # A peak in the padding must not hide one in the picture.
        seen = [one for one in found if grid.to_pixels(one[0]).area > 0] or found
        found = [max(seen, key=lambda one: float(blurred[one[1]].max()))]
    if len(found) > 2:
        return Region(reason=f"{len(found)} components, more than two")
    return _to_source([box for box, _ in found], grid, zoom, rules)


def given(box: PixelBox, grid: ImageGrid, rules: MapRules = SMALL_SQUARE) -> Region:
    """A region chosen by the caller, checked against the image. rules: of the model family."""
    width, height = grid.size
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"box {tuple(box)} does not lie inside the {width} x {height} image")
    if refusal := refused(PixelBox(*box), rules):
        return Region(reason=refusal)
    return Region(boxes=(PixelBox(*box),), grid_boxes=(grid.to_cells(PixelBox(*box)),))


def refused(box: PixelBox, rules: MapRules) -> str | None:
    """Why a family cannot read a crop of this size; None where it can."""
    short, long = sorted((box.x1 - box.x0, box.y1 - box.y0))
    size = f"the region is {box.x1 - box.x0} x {box.y1 - box.y0} pixels"
    if short < rules.min_side:
        return f"{size}, and crops with a side under {rules.min_side} are not read"
    if rules.max_aspect is not None and long > rules.max_aspect * short:
        return f"{size}, and crops narrower than 1 : {rules.max_aspect:g} are not read"
    return None


def budget(box: GridBox, rows: int, columns: int, zoom: ZoomConfig) -> tuple[int, int]:
    """(rows, columns) of the tokens that a crop keeps, of the rows x columns it is encoded as.

    All of them, or the box's size times the token budget.
    """
    if zoom.token_budget is None:
        return rows, columns

    def side(cells: int, most: int) -> int:
        return min(max(round(cells * (zoom.token_budget or 1)), 1), most)

    return side(box.y1 - box.y0, rows), side(box.x1 - box.x0, columns)


def _around(mask: np.ndarray) -> GridBox:
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return GridBox(*(int(edge) for edge in box))


def _to_source(
    boxes: list[GridBox],
    grid: ImageGrid,
    zoom: ZoomConfig,
    rules: MapRules,
    keep: np.ndarray | None = None,
) -> Region:
    """Map to source pixels; boxes without a pixel, as in the padding, are left out."""
    pairs = [(box, grid.to_pixels(box)) for box in boxes]
    pairs = [(box, pixels) for box, pixels in pairs if pixels.area > 0]
    if not pairs:
        return Region(reason="the region holds no whole pixel of the image, only padding")
    refusals = [refused(pixels, rules) for _, pixels in pairs]
    pairs = [pair for pair, refusal in zip(pairs, refusals, strict=True) if refusal is None]
    if not pairs:
        return Region(reason=refusals[0])
    share = sum(pixels.area for _, pixels in pairs) / (grid.size[0] * grid.size[1])
    if zoom.skip_above is not None and share >= zoom.skip_above:
        return Region(reason=f"the region is {share:.0%} of the image, which was seen already")
    return Region(tuple(p for _, p in pairs), tuple(b for b, _ in pairs), keep=keep)
