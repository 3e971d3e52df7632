"""From attention maps to pseudo-labels: plain arrays, no model (docs/method.md)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from sdrpn.config import LabelConfig
from sdrpn.roi.sinks import remove_sinks

FOREGROUND, BACKGROUND = 1, 0
IGNORED = -100
"""Label of tokens that do not train the RPN; torch's and transformers' usual value."""

NOT_FINITE = "attention that is not finite"
NO_ATTENTION = "no attention left without the sinks"
TOO_LARGE = "foreground over too much of the image"
SEVERAL_PLACES = "foreground at several places"


def pseudo_labels(grounding: np.ndarray, sink: np.ndarray, config: LabelConfig) -> np.ndarray:
    """Label every image token: 1 foreground, 0 background, -100 ignored.

    Args:
        grounding: [rows, columns] attention shares, >= 0.
        sink: [rows, columns] attention shares of the sink map.
        config: Where the lines are drawn.

    Returns:
        int8 [rows, columns]; see `judge`.
    """
    return judge(grounding, sink, config)[0]


def judge(
    grounding: np.ndarray, sink: np.ndarray, config: LabelConfig
) -> tuple[np.ndarray, str | None]:
    """The labels, and the reason where there are none.

    All tokens are ignored when a map holds a NaN or an infinity, when it is empty once its sinks
    are gone, when the foreground's bounding box holds `max_box_fraction` of the grid or more, or
    when it has more than `max_components` components.

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
    peak = attention.max()
    if not peak > 0:
        return nothing, NO_ATTENTION
    foreground = attention > config.foreground * peak
    rows, columns = np.nonzero(foreground)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    if height * width >= config.max_box_fraction * grounding.size:
        return nothing, TOO_LARGE
    if config.max_components is not None:
        _, parts = ndimage.label(foreground, np.ones((3, 3)))  # type: ignore[misc]
        if parts > config.max_components:
            return nothing, SEVERAL_PLACES
    outside = np.ones(grounding.shape, dtype=bool)
    outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
    labels = nothing.copy()
    labels[outside & (attention < config.background * peak)] = BACKGROUND
    labels[foreground] = FOREGROUND
    return labels, None
