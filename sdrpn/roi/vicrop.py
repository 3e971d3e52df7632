"""The ViCrop baseline's window search (arXiv 2502.17422), plain geometry; see docs/method.md.

The original also splits images of very high resolution into blocks of 1024 px; that is left out.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.roi.postprocess import Region

NEUTRAL_QUESTION = "Write a general description of the image."
SIDES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Window sides, in multiples of the model frame's shorter side, measured in source pixels."""


def relative_attention(
    question: Float[np.ndarray, " cells"], neutral: Float[np.ndarray, " cells"]
) -> Float[np.ndarray, " cells"]:
    """Attention for the question over attention for a neutral prompt, cell by cell. [T] each."""
    return question / np.maximum(neutral, np.finfo(np.float32).tiny)


def window_sums(
    ratio: Float[np.ndarray, "height length"], rows: int, columns: int
) -> Float[np.ndarray, "height-{rows}+1 length-{columns}+1"]:
    """Sums of all windows of rows x columns cells, one for each place of the window's corner."""
    table = np.pad(ratio.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    below, above = table[rows:], table[:-rows]
    right, left = slice(columns, None), slice(None, -columns)
    return below[:, right] - above[:, right] - below[:, left] + above[:, left]


def contrast(sums: Float[np.ndarray, "down across"], cells: int) -> tuple[float, tuple[int, int]]:
    """How much the best window stands out from its up to four neighbours, and its (row, column).

    sums: of windows that hold so many cells.
    """
    row, column = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
    steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    neighbours = [sums[r, c] for r, c in steps if 0 <= r < sums.shape[0] and 0 <= c < sums.shape[1]]
    mean = float(np.mean(neighbours)) if neighbours else 0.0
    return (float(sums[row, column]) - mean) / cells, (row, column)


def propose_window(ratio: Float[np.ndarray, "rows columns"], grid: ImageGrid) -> Region:
    """The square of source pixels that stands out most. ratio: [rows, columns], from above."""
    if not np.isfinite(ratio).all():
        raise ValueError("the attention ratio map holds values that are not finite")
    best: tuple[float, GridBox, float] | None = None
    for multiple in SIDES:
        side = min(min(grid.frame) * multiple, float(min(grid.size)))
        rows = _cells(side, float(grid.scale[1]), float(grid.cell), grid.rows)
        columns = _cells(side, float(grid.scale[0]), float(grid.cell), grid.columns)
        value, (row, column) = contrast(window_sums(ratio, rows, columns), rows * columns)
        if best is None or value > best[0]:
            best = value, GridBox(column, row, column + columns, row + rows), side
    assert best is not None
    _, cells, side = best
    x0 = _start((cells.x0 + cells.x1) / 2, side, grid, axis=0)
    y0 = _start((cells.y0 + cells.y1) / 2, side, grid, axis=1)
    whole = max(int(side), 1)
    return Region((PixelBox(x0, y0, x0 + whole, y0 + whole),), (cells,))


def _cells(side: float, scale: float, cell: float, most: int) -> int:
    """Cells that a window of this side, in source pixels, is wide or high."""
    return min(max(round(side / (cell / scale)), 1), most)


def _start(middle: float, side: float, grid: ImageGrid, axis: int) -> int:
    """Source pixel where a window of this side begins, centred on a cell, inside the image."""
    centre = (middle * float(grid.cell) - grid.offset[axis]) / float(grid.scale[axis])
    return min(max(int(centre - side / 2), 0), grid.size[axis] - max(int(side), 1))
