"""Label rules that turn attention maps into pseudo-labels, on plain arrays (docs/method.md)."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from sdrpn.config import LabelConfig
from sdrpn.roi.sinks import remove_sinks

FOREGROUND, BACKGROUND = 1, 0
IGNORED = -100
"""Label of tokens without a loss, the default `ignore_index` of torch."""

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
        config: Thresholds.
        padding: bool [rows, columns], cells that contain only padding, or None.

    Returns:
        int8 [rows, columns]; see `label_cells`.
    """
    return label_cells(grounding, sink, config, padding)[0]


def padding_cells(size: tuple[int, int], cells: int) -> np.ndarray:
    """Return the cells of a square that contain only padding.

    Args:
        size: (width, height) of the image, in pixels, which is centred in the square.
        cells: Rows and columns of the square.

    Returns:
        bool [cells, cells].
    """
    width, height = (max(int(edge / max(size) * cells), 1) for edge in size)
    padding = np.ones((cells, cells), dtype=bool)

    def shown(own: int) -> slice:
        return slice((cells - own) // 2, min(cells, own + math.ceil((cells - own) / 2)))

    padding[shown(height), shown(width)] = False
    return padding


def label_cells(
    grounding: np.ndarray,
    sink: np.ndarray,
    config: LabelConfig,
    padding: np.ndarray | None = None,
) -> tuple[np.ndarray, str | None]:
    """Label every image token, with the reason if all are ignored.

    All tokens are ignored if a map is not finite, if its maximum outside sinks and padding is 0 or
    below `floor`, if the bounding box of the foreground, expanded by `box_margin`, covers
    `max_box_fraction` of the grid or more, if the foreground has more than `max_components`
    connected components, or if none of them has `strongest` of its attention.

    Args:
        grounding: [rows, columns] attention shares, >= 0.
        sink: [rows, columns] attention shares of the sink map.
        config: Thresholds.
        padding: bool [rows, columns], cells that contain only padding, or None.

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
    blank = np.zeros(grounding.shape, dtype=bool) if padding is None else padding
    peak = attention[~blank].max(initial=0)
    if not peak > 0:
        return ignored, NO_ATTENTION
    if peak < config.floor:
        return ignored, TOO_FAINT
    foreground = (attention > config.foreground * peak) & ~blank
    background = attention < config.background * peak
    components, count = ndimage.label(foreground, np.ones((3, 3)))  # type: ignore[misc]
    scattered = config.max_components is not None and count > config.max_components
    if config.strongest is not None:
        shares = ndimage.sum_labels(attention, components, range(1, count + 1))
        shares /= shares.sum()
        scattered = scattered or shares.max() < config.strongest
        foreground = components == shares.argmax() + 1
        background = ~foreground  # the other components are what the RPN is to unlearn
    box = _box(foreground, config.box_margin)
    if box.sum() >= config.max_box_fraction * grounding.size:
        return ignored, TOO_LARGE
    if scattered:
        return ignored, SEVERAL_PLACES
    labels = ignored.copy()
    labels[~box & background | blank] = BACKGROUND
    labels[foreground] = FOREGROUND
    return labels, None


def _box(foreground: np.ndarray, margin: int) -> np.ndarray:
    """The cells of the foreground's bounding box, expanded by `margin` cells on each side."""
    rows, columns = (
        slice(max(at.min() - margin, 0), at.max() + 1 + margin) for at in np.nonzero(foreground)
    )
    inside = np.zeros(foreground.shape, dtype=bool)
    inside[rows, columns] = True
    return inside
