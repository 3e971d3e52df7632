"""The ViCrop baseline's window search (arXiv 2502.17422; METHOD section 8), plain geometry.

The original also splits images of very high resolution into blocks of 1024 px; that is left out.
"""

from __future__ import annotations

import numpy as np

from sdrpn.roi.postprocess import GridBox, PixelBox, Region, View

NEUTRAL_QUESTION = "Write a general description of the image."
SIDES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Window sides, in multiples of the model's input side, measured in source pixels."""


def relative_attention(question: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """Attention for the question over attention for a neutral prompt, cell by cell. [T] each."""
    return question / np.maximum(neutral, np.finfo(np.float32).tiny)


def window_sums(ratio: np.ndarray, cells: int) -> np.ndarray:
    """Sums of all cells x cells windows: [grid, grid] -> [grid - cells + 1] squared."""
    table = np.pad(ratio.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    far, near = slice(cells, None), slice(None, -cells)
    return table[far, far] - table[near, far] - table[far, near] + table[near, near]


def contrast(sums: np.ndarray, cells: int) -> tuple[float, tuple[int, int]]:
    """How much the best window stands out from its up to four neighbours, and its (row, column)."""
    row, column = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
    steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    neighbours = [sums[r, c] for r, c in steps if 0 <= r < sums.shape[0] and 0 <= c < sums.shape[1]]
    mean = float(np.mean(neighbours)) if neighbours else 0.0
    return (float(sums[row, column]) - mean) / cells**2, (row, column)


def propose_window(ratio: np.ndarray, view: View) -> Region:
    """The square of source pixels that stands out most. ratio: [grid, grid], from above."""
    if not np.isfinite(ratio).all():
        raise ValueError("the attention ratio map holds values that are not finite")
    cell = view.side / view.grid / view.ratio
    best: tuple[float, int, tuple[int, int], float] | None = None
    for multiple in SIDES:
        side = min(view.side * multiple, float(min(view.size)))
        cells = min(max(round(side / cell), 1), view.grid)
        value, corner = contrast(window_sums(ratio, cells), cells)
        if best is None or value > best[0]:
            best = (value, cells, corner, side)
    assert best is not None
    _, cells, (row, column), side = best
    x0 = _start(column, cells, side, view, axis=0)
    y0 = _start(row, cells, side, view, axis=1)
    whole = max(int(side), 1)
    box = PixelBox(x0, y0, x0 + whole, y0 + whole)
    return Region((box,), (GridBox(column, row, column + cells, row + cells),))


def _start(first: int, cells: int, side: float, view: View, axis: int) -> int:
    """Source pixel where a window of this side begins, centred on its cells, inside the image."""
    middle = (first + cells / 2) * view.side / view.grid
    start = int((middle - view.offset[axis]) / view.ratio - side / 2)
    return min(max(start, 0), view.size[axis] - max(int(side), 1))
