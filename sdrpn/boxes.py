"""Boxes in cells of a RoI map and in source pixels, and the image grid that maps between them.

A box is (x0, y0, x1, y1), half-open. Its type gives the unit: `GridBox` is in cells, `PixelBox` in
source pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool


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
        """Pixels inside the box."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)


@dataclass(frozen=True)
class ImageGrid:
    """Position of a model's image tokens on the source image.

    The *model frame* is the input of the image encoder, in its pixels. Source coordinate x maps to
    `x * scale[0] + offset[0]` there, and cell c covers `c * cell` to `(c + 1) * cell`.

    Args:
        rows: Cells from top to bottom.
        columns: Cells from left to right.
        size: (width, height) of the source image, in pixels.
        cell: Side of a cell, in pixels of the model frame.
        scale: Pixels of the model frame per source pixel, in x and y; fractions are exact.
        offset: Position of the source image's top left corner in the model frame, in x and y;
            positive if the image is padded, negative if it is cropped.
    """

    rows: int
    columns: int
    size: tuple[int, int]
    cell: float | Fraction
    scale: tuple[float | Fraction, float | Fraction]
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def cells(self) -> int:
        """Number of cells, which is the number of image tokens."""
        return self.rows * self.columns

    @property
    def frame(self) -> tuple[float, float]:
        """(width, height) of the model frame, in its pixels."""
        return float(self.columns * self.cell), float(self.rows * self.cell)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the grid in source pixels; extends beyond a padded image."""
        (width, height), (ox, oy) = self.frame, self.offset
        sx, sy = map(float, self.scale)
        return -ox / sx, -oy / sy, (width - ox) / sx, (height - oy) / sy

    @cached_property
    def inside(self) -> Bool[np.ndarray, "rows columns"]:
        """[rows, columns] bool, True for cells that overlap the image, not only its padding."""
        down, across = (
            self._overlaps(axis, cells) for axis, cells in ((1, self.rows), (0, self.columns))
        )
        return np.logical_and.outer(down, across)

    def _overlaps(self, axis: int, cells: int) -> list[bool]:
        cell, start = Fraction(self.cell), Fraction(self.offset[axis])
        end = start + self.size[axis] * Fraction(self.scale[axis])
        return [start < (c + 1) * cell and c * cell < end for c in range(cells)]

    def to_pixels(self, box: GridBox) -> PixelBox:
        """Map a box in cells to source pixels, truncated and clamped to the image.

        Computed in float32 (docs/method.md, "From the map to the crop", step 5).
        """
        x0, x1 = (self._to_source(edge, axis=0) for edge in (box.x0, box.x1))
        y0, y1 = (self._to_source(edge, axis=1) for edge in (box.y0, box.y1))
        return PixelBox(x0, y0, x1, y1)

    def to_cells(self, box: PixelBox) -> GridBox:
        """Return the cells that a box in source pixels overlaps, at least one in each direction."""
        x0, x1 = self._touched(box.x0, box.x1, axis=0, cells=self.columns)
        y0, y1 = self._touched(box.y0, box.y1, axis=1, cells=self.rows)
        return GridBox(x0, y0, x1, y1)

    def _to_source(self, edge: int, axis: int) -> int:
        frame = np.float32(edge) * np.float32(self.cell)
        source = (frame - np.float32(self.offset[axis])) / np.float32(self.scale[axis])
        return int(np.clip(source, 0, self.size[axis]))

    def _touched(self, low: int, high: int, axis: int, cells: int) -> tuple[int, int]:
        # Exact fractions, so that a box ending at a cell's edge does not overlap the next cell.
        scale, offset = Fraction(self.scale[axis]), Fraction(self.offset[axis])
        first = math.floor((low * scale + offset) / Fraction(self.cell))
        last = math.ceil((high * scale + offset) / Fraction(self.cell))
        first = min(max(first, 0), cells - 1)
        return first, min(max(last, first + 1), cells)


def covered(regions: Sequence[PixelBox], box: PixelBox) -> float:
    """The share of a box, in [0, 1], that lies inside at least one region; in whole pixels."""
    xs = sorted({box.x0, box.x1, *(min(max(x, box.x0), box.x1) for r in regions for x in r[::2])})
    ys = sorted({box.y0, box.y1, *(min(max(y, box.y0), box.y1) for r in regions for y in r[1::2])})
    area = 0
    for x0, x1 in pairwise(xs):
        for y0, y1 in pairwise(ys):
            if any(r.x0 <= x0 and x1 <= r.x1 and r.y0 <= y0 and y1 <= r.y1 for r in regions):
                area += (x1 - x0) * (y1 - y0)
    return area / box.area
