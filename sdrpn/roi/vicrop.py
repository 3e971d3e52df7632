"""Window search of the ViCrop baseline (arXiv 2502.17422); see docs/method.md.

The original also splits high-resolution images into blocks of 1024 px; this is not implemented.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.roi.postprocess import Region

NEUTRAL_QUESTION = "Write a general description of the image."
SIDES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Window sides in source pixels, as multiples of the shorter side of the model's input."""


def relative_attention(
    question: Float[np.ndarray, " cells"], neutral: Float[np.ndarray, " cells"]
) -> Float[np.ndarray, " cells"]:
    """Divide the attention for a question by that for a neutral prompt.

    Args:
        question: [T] attention for the question.
        neutral: [T] attention for the neutral prompt.

    Returns:
        [T] ratios.
    """
    return question / np.maximum(neutral, np.finfo(np.float32).tiny)


def window_sums(
    ratio: Float[np.ndarray, "height length"], rows: int, columns: int
) -> Float[np.ndarray, "height-{rows}+1 length-{columns}+1"]:
    """Sum all windows of a size with a summed-area table.

    Args:
        ratio: [height, length] map.
        rows: Rows of the window.
        columns: Columns of the window.

    Returns:
        [height - rows + 1, length - columns + 1] sums, by the window's top left cell.
    """
    table = np.pad(ratio.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    below, above = table[rows:], table[:-rows]
    right, left = slice(columns, None), slice(None, -columns)
    return below[:, right] - above[:, right] - below[:, left] + above[:, left]


def contrast(sums: Float[np.ndarray, "down across"], cells: int) -> tuple[float, tuple[int, int]]:
    """Find the window with the largest sum and its contrast to the up to four adjacent windows.

    Args:
        sums: Window sums from `window_sums`.
        cells: Cells per window.

    Returns:
        Contrast per cell, and (row, column) of the window.
    """
    row, column = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
    steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    neighbours = [sums[r, c] for r, c in steps if 0 <= r < sums.shape[0] and 0 <= c < sums.shape[1]]
    mean = float(np.mean(neighbours)) if neighbours else 0.0
    return (float(sums[row, column]) - mean) / cells, (row, column)


def propose_window(ratio: Float[np.ndarray, "rows columns"], grid: ImageGrid) -> Region:
    """Select the square window with the highest contrast.

    Args:
        ratio: [rows, columns] map from `relative_attention`.
        grid: Mapping from grid cells to source pixels.

    Returns:
        A region with one box.

    Raises:
        ValueError: If the map is not finite.
    """
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
    pixels = max(int(side), 1)
    return Region((PixelBox(x0, y0, x0 + pixels, y0 + pixels),), (cells,))


def _cells(side: float, scale: float, cell: float, limit: int) -> int:
    """Convert a window side from source pixels to cells, between 1 and `limit`."""
    return min(max(round(side / (cell / scale)), 1), limit)


def _start(centre_cell: float, side: float, grid: ImageGrid, axis: int) -> int:
    """Compute the first source pixel of a window centred on a cell, shifted into the image."""
    centre = (centre_cell * float(grid.cell) - grid.offset[axis]) / float(grid.scale[axis])
    return min(max(int(centre - side / 2), 0), grid.size[axis] - max(int(side), 1))
