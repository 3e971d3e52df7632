"""From a RoI map to boxes: blur, threshold, components, policies (SD-RPN, section 3.3).

Functions of arrays, without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from scipy import ndimage

from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import PEAK, SMALL_SQUARE, MapRules, ZoomConfig

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
MIN_BOX_SIDE = 3
"""Side, in cells, to which boxes of components under 4 cells are enlarged."""


@dataclass(frozen=True)
class Region:
    """Boxes to crop, or the reason for no zoom.

    Args:
        boxes: Boxes in source pixels; empty for no zoom.
        grid_boxes: The same boxes in grid cells.
        reason: Why there is no zoom; None if there are boxes.
        keep: [rows, columns] of {0, 1}, cells whose crop tokens the `mask` policy keeps if there
            are several components; None keeps all crop tokens.
        foreground: [rows, columns] bool, cells over the threshold; None if there is no map.
    """

    boxes: tuple[PixelBox, ...] = ()
    grid_boxes: tuple[GridBox, ...] = ()
    reason: str | None = None
    keep: Bool[np.ndarray, "rows columns"] | None = None
    foreground: Bool[np.ndarray, "rows columns"] | None = None


def blur(
    probabilities: Float[np.ndarray, "rows columns"],
) -> Float32[np.ndarray, "rows columns"]:
    """Apply a Gaussian blur with a 3 x 3 kernel, sigma 1 and reflect padding.

    Args:
        probabilities: [rows, columns] in [0, 1].

    Returns:
        [rows, columns] float32.
    """
    kernel = np.exp(-0.5 * np.array([-1.0, 0.0, 1.0]) ** 2)
    kernel /= kernel.sum()
    # scipy's "mirror" is torch's "reflect": the border cell is not repeated.
    blurred = ndimage.correlate1d(probabilities.astype(np.float64), kernel, axis=0, mode="mirror")
    return ndimage.correlate1d(blurred, kernel, axis=1, mode="mirror").astype(np.float32)


def darken(
    values: Float[np.ndarray, "rows columns"], rules: MapRules
) -> Float[np.ndarray, "rows columns"]:
    """Zero the attention sinks of large grids: the first quarter of the top row and left column.

    Args:
        values: [rows, columns] map; it is not modified.
        rules: Rules of the model family, with the grid size above which cells are zeroed.

    Returns:
        [rows, columns]; `values` itself for small grids.
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
    """Find 8-connected components within the size limits, in reading order.

    Args:
        over: [rows, columns] bool, cells over the threshold.
        zoom: Settings with the size limits.

    Returns:
        (box in grid cells, [rows, columns] bool mask) of each component. Boxes of components under
        4 cells are enlarged to at least 3 x 3 cells.
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
    """Enlarge a box to at least 3 x 3 cells around its centre, shifted to stay inside the grid.

    Args:
        box: Box in grid cells.
        rows: Rows of the grid.
        columns: Columns of the grid.
    """

    def side(low: int, high: int, cells: int) -> tuple[int, int]:
        missing = max(MIN_BOX_SIDE - (high - low), 0)
        low = min(max(low - missing // 2, 0), max(cells - (high - low) - missing, 0))
        return low, min(max(low + MIN_BOX_SIDE, high), cells)

    (x0, x1), (y0, y1) = side(box.x0, box.x1, columns), side(box.y0, box.y1, rows)
    return GridBox(x0, y0, x1, y1)


def propose(
    blurred: Float[np.ndarray, "rows columns"],
    grid: ImageGrid,
    zoom: ZoomConfig,
    rules: MapRules = SMALL_SQUARE,
) -> Region:
    """Threshold a blurred map and select the boxes to crop (SD-RPN, section 3.3).

    Args:
        blurred: [rows, columns] in [0, 1], from `blur`.
        grid: Mapping from grid cells to source pixels.
        zoom: Threshold, size limits and policy.
        rules: Rules of the model family.

    Raises:
        ValueError: If the map is not finite, which would otherwise pass for a map without a region.
    """
    if not np.isfinite(blurred).all():
        raise ValueError("the RoI map holds values that are not finite; check the RPN's weights")
    threshold = zoom.threshold
    if isinstance(threshold, str):
        threshold = peak_threshold(blurred, grid)
        if isinstance(threshold, str):
            return Region(reason=threshold)
    over = blurred > threshold
    if not over.any():
        return Region(reason=f"no cell over the threshold {threshold:g}")
    found = components(over, zoom)
    if zoom.policy == "mask" and (rules.one_box or len(found) >= 2):
        return _to_source([_bounding_box(over)], grid, zoom, rules, over, keep=over)
    if not found:
        return Region(reason="no component within the size limits")
    if zoom.policy == "strongest":
        # Components in the padding do not compete with those in the image.
        visible = [one for one in found if grid.to_pixels(one[0]).area > 0] or found
        found = [max(visible, key=lambda one: float(blurred[one[1]].max()))]
    if len(found) > 2:
        return Region(reason=f"{len(found)} components, more than two")
    return _to_source([box for box, _ in found], grid, zoom, rules, over)


LOWEST_PEAK = 0.03
LOWEST_CONTRAST = 3.0
SHARE_OF_PEAK = 0.3


def peak_threshold(blurred: Float[np.ndarray, "rows columns"], grid: ImageGrid) -> float | str:
    """Compute the threshold relative to a map's peak (Vision-RL2, arXiv 2609.19745).

    Cells in the padding are left out, since they would lower the mean of wide and tall images.

    Args:
        blurred: [rows, columns] in [0, 1], from `blur`.
        grid: Mapping from grid cells to source pixels.

    Returns:
        0.3 of the peak; why there is no region if the peak is below 0.03 or below 3 times the mean.
    """
    cells = blurred[grid.inside]
    peak, mean = float(cells.max()), float(cells.mean())
    if peak < LOWEST_PEAK:
        return f"the map's peak is {peak:.3f}, below {LOWEST_PEAK:g} (threshold={PEAK})"
    contrast = peak / (mean + 1e-8)
    if contrast < LOWEST_CONTRAST:
        return (
            f"the map's peak is {contrast:.1f} times its mean, below {LOWEST_CONTRAST:g} "
            f"(threshold={PEAK})"
        )
    return SHARE_OF_PEAK * peak


def region_from_box(box: PixelBox, grid: ImageGrid, rules: MapRules = SMALL_SQUARE) -> Region:
    """Make a region of a box that the caller chose.

    Args:
        box: Box in source pixels.
        grid: Mapping from grid cells to source pixels.
        rules: Rules of the model family.

    Raises:
        ValueError: If the box is empty or exceeds the image.
    """
    width, height = grid.size
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"box {tuple(box)} does not lie inside the {width} x {height} image")
    if reason := unsupported_crop(PixelBox(*box), rules):
        return Region(reason=reason)
    return Region(boxes=(PixelBox(*box),), grid_boxes=(grid.to_cells(PixelBox(*box)),))


def unsupported_crop(box: PixelBox, rules: MapRules) -> str | None:
    """Describe why a model family cannot encode a crop of this size; None if it can.

    Args:
        box: Crop, in source pixels.
        rules: Rules of the model family.
    """
    short, long = sorted((box.x1 - box.x0, box.y1 - box.y0))
    size = f"the region is {box.x1 - box.x0} x {box.y1 - box.y0} pixels"
    if short < rules.min_side:
        return f"{size}, and crops with a side under {rules.min_side} are not supported"
    if rules.max_aspect is not None and long > rules.max_aspect * short:
        return f"{size}, and crops narrower than 1 : {rules.max_aspect:g} are not supported"
    return None


def crop_grid_size(box: GridBox, rows: int, columns: int, zoom: ZoomConfig) -> tuple[int, int]:
    """Compute the size of a crop's token grid under `zoom.token_budget`.

    Args:
        box: Crop, in grid cells.
        rows: Rows of the encoded crop.
        columns: Columns of the encoded crop.
        zoom: Settings with the token budget, in tokens per cell side; None for no budget.

    Returns:
        (rows, columns), at most those of the encoded crop.
    """
    if zoom.token_budget is None:
        return rows, columns

    def side(cells: int, limit: int) -> int:
        return min(max(round(cells * (zoom.token_budget or 1)), 1), limit)

    return side(box.y1 - box.y0, rows), side(box.x1 - box.x0, columns)


def _bounding_box(mask: np.ndarray) -> GridBox:
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return GridBox(*(int(edge) for edge in box))


def _to_source(
    boxes: list[GridBox],
    grid: ImageGrid,
    zoom: ZoomConfig,
    rules: MapRules,
    foreground: np.ndarray,
    keep: np.ndarray | None = None,
) -> Region:
    """Map boxes to source pixels; boxes in the padding and unsupported crops are dropped."""
    pairs = [(box, grid.to_pixels(box)) for box in boxes]
    pairs = [(box, pixels) for box, pixels in pairs if pixels.area > 0]
    if not pairs:
        return Region(reason="the region contains only padding")
    reasons = [unsupported_crop(pixels, rules) for _, pixels in pairs]
    pairs = [pair for pair, reason in zip(pairs, reasons, strict=True) if reason is None]
    if not pairs:
        return Region(reason=reasons[0])
    share = sum(pixels.area for _, pixels in pairs) / (grid.size[0] * grid.size[1])
    if zoom.skip_above is not None and share >= zoom.skip_above:
        return Region(
            reason=f"the region is {share:.0%} of the image (skip_above={zoom.skip_above:g})"
        )
    pixels, cells = tuple(p for _, p in pairs), tuple(b for b, _ in pairs)
    return Region(pixels, cells, keep=keep, foreground=foreground)
