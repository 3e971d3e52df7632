"""From a RoI map to boxes and crops: METHOD section 3, plain geometry on arrays, no model.

Two frames, both (x0, y0, x1, y1) and half-open: `GridBox` counts cells of the RoI map,
`PixelBox` counts pixels of the original image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from sdrpn.config import ZoomConfig
from sdrpn.io.images import LONGEST

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
SMALLEST_BOX = 3
"""Components of fewer than 4 cells are grown to boxes of at least 3 x 3 cells (METHOD 3.3)."""


class GridBox(NamedTuple):
    """A box in cells of the RoI map."""

    x0: int
    y0: int
    x1: int
    y1: int


class PixelBox(NamedTuple):
    """A box in pixels of the original image."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def area(self) -> int:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


@dataclass(frozen=True)
class Region:
    """Where to look again. Empty `boxes` means no zoom, and `reason` then says why.

    grid_boxes: the same boxes in cells. keep: [grid, grid] of {0, 1}, the cells whose crop tokens
    stay under the `mask` policy with several components; None keeps every crop token.
    """

    boxes: tuple[PixelBox, ...] = ()
    grid_boxes: tuple[GridBox, ...] = ()
    reason: str | None = None
    keep: np.ndarray | None = None


@dataclass(frozen=True)
class View:
    """How the square the model sees lies on the original image.

    size: (width, height) of the image in pixels. grid: cells a side of the RoI map.
    side: the model's input side in pixels (336). padding: `pad` centres the whole image on a
    square, `crop` takes its central square, as the hub's processor does.
    """

    size: tuple[int, int]
    grid: int
    side: int
    padding: str = "pad"

    @property
    def ratio(self) -> float:
        """Model pixels a source pixel."""
        return self.side / self._fitted

    @property
    def _fitted(self) -> int:
        """The edge of the image, in source pixels, that fills the model's side."""
        return max(self.size) if self.padding == "pad" else min(self.size)

    @property
    def offset(self) -> tuple[float, float]:
        """Where the image's corner lies in the model's square, in model pixels; <= 0 for `crop`."""
        width, height = self.size
        return (self.side - width * self.ratio) / 2, (self.side - height * self.ratio) / 2

    @property
    def pad(self) -> tuple[float, float]:
        """The `offset` that boxes are mapped with, in model pixels.

        The resized image has whole pixels, so its size is truncated before it is centred
        (SD-RPN's published code). `crop` has no published rule and keeps the exact offset.
        """
        if self.padding != "pad":
            return self.offset
        width, height = (int(edge * self.ratio) for edge in self.size)
        return (self.side - width) / 2, (self.side - height) / 2

    def to_pixels(self, box: GridBox) -> PixelBox:
        """Map a box from grid cells to source pixels: undo the pad and the resize.

        Each edge is `(cell * cell side - pad) / ratio` in float32, clamped to the image, then
        truncated. In float64 an edge on a whole pixel may come out one lower or higher than in the
        authors' code.
        """
        x0, x1 = (self._source_edge(x, axis=0) for x in (box.x0, box.x1))
        y0, y1 = (self._source_edge(y, axis=1) for y in (box.y0, box.y1))
        return PixelBox(x0, y0, x1, y1)

    def to_grid(self, box: PixelBox) -> GridBox:
        """The cells that a box in source pixels touches."""
        # Whole numbers decide: a box that ends where a cell does must not touch the next.
        ratio, pad = Fraction(self.side, self._fitted), [Fraction(edge) for edge in self.pad]
        cell = Fraction(self.side, self.grid)

        def cells(low: int, high: int, axis: int) -> tuple[int, int]:
            first = math.floor((low * ratio + pad[axis]) / cell)
            last = math.ceil((high * ratio + pad[axis]) / cell)
            first = min(max(first, 0), self.grid - 1)
            return first, min(max(last, first + 1), self.grid)

        (x0, x1), (y0, y1) = cells(box.x0, box.x1, 0), cells(box.y0, box.y1, 1)
        return GridBox(x0, y0, x1, y1)

    def _source_edge(self, cells: int, axis: int) -> int:
        model_pixels = np.float32(cells) * np.float32(self.side / self.grid)
        source = (model_pixels - np.float32(self.pad[axis])) / np.float32(self.ratio)
        return int(np.clip(source, 0, self.size[axis]))


def blur(probabilities: np.ndarray) -> np.ndarray:
    """Gaussian blur, 3 x 3, sigma 1, reflect padding (METHOD section 3, step 1).

    probabilities: [grid, grid] in [0, 1]. Returns float32 of the same shape.
    """
    kernel = np.exp(-0.5 * np.array([-1.0, 0.0, 1.0]) ** 2)
    kernel /= kernel.sum()
    # scipy's "mirror" is what torch calls "reflect": the border cell itself is not repeated.
    blurred = ndimage.correlate1d(probabilities.astype(np.float64), kernel, axis=0, mode="mirror")
    return ndimage.correlate1d(blurred, kernel, axis=1, mode="mirror").astype(np.float32)


def components(over: np.ndarray, zoom: ZoomConfig) -> list[tuple[GridBox, np.ndarray]]:
    """Connected components with 8 neighbours, in reading order (METHOD section 3, step 3).

    over: bool [grid, grid]. Returns (box, bool mask of the component) for each that is neither too
    small nor too large; boxes of components under 4 cells are grown to at least 3 x 3.
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
        found.append((grow(box, over.shape[0]) if cells < 4 else box, mask))
    return found


def grow(box: GridBox, grid: int) -> GridBox:
    """Grow a box to at least 3 x 3 cells around its centre, shifted to stay inside the grid."""

    def side(low: int, high: int) -> tuple[int, int]:
        missing = max(SMALLEST_BOX - (high - low), 0)
        low = min(max(low - missing // 2, 0), max(grid - (high - low) - missing, 0))
        return low, min(max(low + SMALLEST_BOX, high), grid)

    (x0, x1), (y0, y1) = side(box.x0, box.x1), side(box.y0, box.y1)
    return GridBox(x0, y0, x1, y1)


def propose(blurred: np.ndarray, view: View, zoom: ZoomConfig) -> Region:
    """Threshold a blurred map and choose the boxes to crop (METHOD section 3, steps 2 to 5).

    blurred: [grid, grid] in [0, 1], from `blur`. NaN is refused: a broken map must not look like
    an image without a region.
    """
    if not np.isfinite(blurred).all():
        raise ValueError("the RoI map holds values that are not finite; check the RPN's weights")
    over = blurred > zoom.threshold
    if not over.any():
        return Region(reason=f"no cell over the threshold {zoom.threshold:g}")
    found = components(over, zoom)
    if zoom.policy == "mask" and len(found) >= 2:
        return _to_source([_around(over)], view, zoom, keep=over)
    if not found:
        return Region(reason="no component within the size limits")
    if zoom.policy == "strongest":
        # A peak in the padding must not hide one in the picture.
        seen = [one for one in found if view.to_pixels(one[0]).area > 0] or found
        found = [max(seen, key=lambda one: float(blurred[one[1]].max()))]
    if len(found) > 2:
        return Region(reason=f"{len(found)} components, more than two")
    return _to_source([box for box, _ in found], view, zoom)


def given(box: PixelBox, view: View) -> Region:
    """A region chosen by the caller, checked against the image."""
    width, height = view.size
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"box {tuple(box)} does not lie inside the {width} x {height} image")
    return Region(boxes=(PixelBox(*box),), grid_boxes=(view.to_grid(PixelBox(*box)),))


def crop(image: Image.Image, box: PixelBox, side: int) -> Image.Image:
    """Cut a box out of the original and stretch it to side x side (METHOD section 3, step 6)."""
    # Columns first, then rows, as every Pillow did that published numbers were made with: newer
    # ones start with the cheaper direction, which moves the rounding of tall crops.
    bilinear = Image.Resampling.BILINEAR
    cut = image.crop((box.x0, box.y0, box.x1, box.y1))
    if cut.height > LONGEST:
        # But here they would take gigabytes of a crop that is high and narrow.
        cut = cut.resize((cut.width, side), bilinear)
    return cut.resize((side, cut.height), bilinear).resize((side, side), bilinear)


def budget(box: GridBox, grid: int, zoom: ZoomConfig) -> tuple[int, int]:
    """(rows, columns) of crop tokens for a box: the whole grid, or box size x token budget."""
    if zoom.token_budget is None:
        return grid, grid

    def side(cells: int) -> int:
        return min(max(round(cells * (zoom.token_budget or 1)), 1), grid)

    return side(box.y1 - box.y0), side(box.x1 - box.x0)


def _around(mask: np.ndarray) -> GridBox:
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return GridBox(*(int(edge) for edge in box))


def _to_source(
    boxes: list[GridBox], view: View, zoom: ZoomConfig, keep: np.ndarray | None = None
) -> Region:
    """Map to source pixels; boxes without a pixel, as in the padding, are left out."""
    pairs = [(box, view.to_pixels(box)) for box in boxes]
    pairs = [(box, pixels) for box, pixels in pairs if pixels.area > 0]
    if not pairs:
        return Region(reason="the region holds no whole pixel of the image, only padding")
    share = sum(pixels.area for _, pixels in pairs) / (view.size[0] * view.size[1])
    if zoom.skip_above is not None and share >= zoom.skip_above:
        return Region(reason=f"the region is {share:.0%} of the image, which was seen already")
    return Region(tuple(p for _, p in pairs), tuple(b for b, _ in pairs), keep=keep)
