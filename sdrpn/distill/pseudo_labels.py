"""From attention maps to pseudo-labels: plain arrays, no model (docs/method.md)."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from sdrpn.config import LabelConfig
from sdrpn.roi.sinks import remove_sinks

FOREGROUND, BACKGROUND = 1, 0
IGNORED = -100
"""Label of tokens that do not train the RPN; torch's and transformers' usual value."""

NOT_FINITE = "attention that is not finite"
NO_ATTENTION = "no attention left without the sinks"
TOO_FAINT = "attention to the image too faint"
TOO_LARGE = "foreground over too much of the image"
SEVERAL_PLACES = "foreground at several places"


def pseudo_labels(
    grounding: np.ndarray,
    sink: np.ndarray,
    config: LabelConfig,
    padding: np.ndarray | None = None,
) -> np.ndarray:
    """Label every image token: 1 foreground, 0 background, -100 ignored.

    Args:
        grounding: [rows, columns] attention shares, >= 0.
        sink: [rows, columns] attention shares of the sink map.
        config: Where the lines are drawn.
        padding: [rows, columns] bool, the cells that show no picture; None for none.

    Returns:
        int8 [rows, columns]; see `judge`.
    """
    return judge(grounding, sink, config, padding)[0]


def padding_cells(size: tuple[int, int], cells: int) -> np.ndarray:
    """The cells of a padded square that show none of a picture.

    Args:
        size: (width, height) of the picture, in pixels, which lies in the square's middle.
        cells: Rows and columns of the square.

    Returns:
        bool [cells, cells].
    """
    width, height = (max(int(edge / max(size) * cells), 1) for edge in size)
    padding = np.ones((cells, cells), dtype=bool)

    def shown(own: int) -> slice:
        return slice((cells - own) // 2, min(cells, own + math.ceil((cells - own) / 2)))

    rows = shown(height) if width > height else slice(None)
    columns = shown(width) if height > width else slice(None)
    padding[rows, columns] = False
    return padding


def judge(
    grounding: np.ndarray,
    sink: np.ndarray,
    config: LabelConfig,
    padding: np.ndarray | None = None,
) -> tuple[np.ndarray, str | None]:
    """The labels, and the reason where there are none.

    All tokens are ignored when a map holds a NaN or an infinity, when its maximum off sinks and
    padding is 0 or below `floor`, when the foreground's bounding box, grown by `box_margin`, holds
    `max_box_fraction` of the grid or more, or when it has more than `max_components` components.
    Arguments as in `pseudo_labels`.

    Raises:
        ValueError: For maps that are not two grids of one shape.
    """
    if grounding.shape != sink.shape or grounding.ndim != 2 or not grounding.size:
        raise ValueError(
            f"maps must be two grids (rows, columns) of one shape, got {grounding.shape} and "
            f"{sink.shape}"
        )
    nothing = np.full(grounding.shape, IGNORED, dtype=np.int8)
    if not (np.isfinite(grounding).all() and np.isfinite(sink).all()):
        return nothing, NOT_FINITE
    attention = remove_sinks(grounding, sink, config.sink_threshold)
    blank = np.zeros(grounding.shape, dtype=bool) if padding is None else padding
    peak = attention[~blank].max(initial=0)
    if not peak > 0:
        return nothing, NO_ATTENTION
    if peak < config.floor:
        return nothing, TOO_FAINT
    foreground = (attention > config.foreground * peak) & ~blank
    box = _box(foreground, config.box_margin)
    if box.sum() >= config.max_box_fraction * grounding.size:
        return nothing, TOO_LARGE
    if config.max_components is not None:
        _, parts = ndimage.label(foreground, np.ones((3, 3)))  # type: ignore[misc]
        if parts > config.max_components:
            return nothing, SEVERAL_PLACES
    labels = nothing.copy()
    labels[~box & (attention < config.background * peak) | blank] = BACKGROUND
    labels[foreground] = FOREGROUND
    return labels, None


def _box(foreground: np.ndarray, margin: int) -> np.ndarray:
    """The cells of the box around the foreground, grown by so many on each side."""
    rows, columns = (
        slice(max(at.min() - margin, 0), at.max() + 1 + margin) for at in np.nonzero(foreground)
    )
    inside = np.zeros(foreground.shape, dtype=bool)
    inside[rows, columns] = True
    return inside
