"""Label rules that turn attention maps into pseudo-labels, on plain arrays (docs/method.md)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from sdrpn.config import LabelConfig
from sdrpn.roi.sinks import remove_sinks

FOREGROUND, BACKGROUND = 1, 0
IGNORED = -100
"""Label of tokens without a loss, the default `ignore_index` of torch."""

NOT_FINITE = "attention that is not finite"
NO_ATTENTION = "no attention left without the sinks"
TOO_LARGE = "foreground over too much of the image"
SEVERAL_PLACES = "foreground at several places"


def pseudo_labels(grounding: np.ndarray, sink: np.ndarray, config: LabelConfig) -> np.ndarray:
    """Label every image token: 1 foreground, 0 background, -100 ignored.

    Args:
        grounding: [rows, columns] attention shares, >= 0.
        sink: [rows, columns] attention shares of the sink map.
        config: Thresholds.

    Returns:
        int8 [rows, columns]; see `label_cells`.
    """
    return label_cells(grounding, sink, config)[0]


def label_cells(
    grounding: np.ndarray, sink: np.ndarray, config: LabelConfig
) -> tuple[np.ndarray, str | None]:
    """Label every image token, with the reason if all are ignored.

    All tokens are ignored if a map is not finite, if no attention is left without the sinks, if the
    bounding box of the foreground covers `max_box_fraction` of the grid or more, or if the
    foreground has more than `max_components` connected components.

    Args:
        grounding: [rows, columns] attention shares, >= 0.
        sink: [rows, columns] attention shares of the sink map.
        config: Thresholds.

    Returns:
        (int8 [rows, columns], reason or None).

    Raises:
        ValueError: If the maps are not two grids of one shape.
    """
    if grounding.shape != sink.shape or grounding.ndim != 2 or not grounding.size:
        raise ValueError(
            f"maps must be two grids (rows, columns) of one shape, got {grounding.shape} and "
            f"{sink.shape}"
        )
    ignored = np.full(grounding.shape, IGNORED, dtype=np.int8)
    if not (np.isfinite(grounding).all() and np.isfinite(sink).all()):
        return ignored, NOT_FINITE
    attention = remove_sinks(grounding, sink, config.sink_threshold)
    peak = attention.max()
    if not peak > 0:
        return ignored, NO_ATTENTION
    foreground = attention > config.foreground * peak
    rows, columns = np.nonzero(foreground)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    if height * width >= config.max_box_fraction * grounding.size:
        return ignored, TOO_LARGE
    if config.max_components is not None:
        _, components = ndimage.label(foreground, np.ones((3, 3)))  # type: ignore[misc]
        if components > config.max_components:
            return ignored, SEVERAL_PLACES
    outside = np.ones(grounding.shape, dtype=bool)
    outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
    labels = ignored.copy()
    labels[outside & (attention < config.background * peak)] = BACKGROUND
    labels[foreground] = FOREGROUND
    return labels, None
