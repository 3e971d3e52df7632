"""From attention maps to pseudo-labels: METHOD section 4, plain arrays, no model."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from sdrpn.config import LabelConfig

FOREGROUND, BACKGROUND = 1, 0
IGNORED = -100
"""Label of tokens that do not train the RPN; torch's and transformers' usual value."""

NOT_FINITE = "attention that is not finite"
NO_ATTENTION = "no attention left without the sinks"
TOO_LARGE = "foreground over too much of the image"
SEVERAL_PLACES = "foreground at several places"


def remove_sinks(grounding: np.ndarray, sink: np.ndarray, sink_threshold: float) -> np.ndarray:
    """Set the attention on sink tokens to 0 (METHOD section 4, "sink map").

    grounding, sink: [tokens] attention shares, >= 0. Returns a copy of grounding.
    """
    return np.where(sink >= sink_threshold, 0, grounding)


def pseudo_labels(grounding: np.ndarray, sink: np.ndarray, config: LabelConfig) -> np.ndarray:
    """Label every image token: 1 foreground, 0 background, -100 ignored (METHOD section 4).

    grounding, sink: [tokens] of a square grid, row-major. Returns int8 [tokens]; see `judge`.
    """
    return judge(grounding, sink, config)[0]


def judge(
    grounding: np.ndarray, sink: np.ndarray, config: LabelConfig
) -> tuple[np.ndarray, str | None]:
    """The labels, and why there are none where there are none.

    All tokens are ignored when a map holds a NaN or an infinity, when it is empty once its sinks
    are gone, when the foreground's bounding box holds `max_box_fraction` of the grid or more, or
    when it has more than `max_components` components. Raises ValueError for maps that are no square
    grid.
    """
    side = _side(grounding, sink)
    nothing = np.full(len(grounding), IGNORED, dtype=np.int8)
    if not (np.isfinite(grounding).all() and np.isfinite(sink).all()):
        return nothing, NOT_FINITE
    attention = remove_sinks(grounding, sink, config.sink_threshold)
    peak = attention.max()
    if not peak > 0:
        return nothing, NO_ATTENTION
    foreground = attention > config.foreground * peak
    rows, columns = np.nonzero(foreground.reshape(side, side))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    if height * width >= config.max_box_fraction * len(grounding):
        return nothing, TOO_LARGE
    if config.max_components is not None:
        _, parts = ndimage.label(foreground.reshape(side, side), np.ones((3, 3)))  # type: ignore[misc]
        if parts > config.max_components:
            return nothing, SEVERAL_PLACES
    outside = np.ones((side, side), dtype=bool)
    outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
    labels = nothing.copy()
    labels[outside.ravel() & (attention < config.background * peak)] = BACKGROUND
    labels[foreground] = FOREGROUND
    return labels, None


def _side(grounding: np.ndarray, sink: np.ndarray) -> int:
    if grounding.shape != sink.shape or grounding.ndim != 1:
        raise ValueError(
            f"maps must be two vectors of one length, got {grounding.shape} and {sink.shape}"
        )
    side = round(len(grounding) ** 0.5)
    if side * side != len(grounding):
        raise ValueError(f"{len(grounding)} image tokens do not make a square grid")
    return side
