"""Attention sinks: image tokens with high attention for any question (docs/method.md)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Num


def remove_sinks(
    grounding: Num[np.ndarray, "*maps cells"],
    sink: Num[np.ndarray, "*maps_or_one cells"],
    sink_threshold: float,
) -> Num[np.ndarray, "*maps cells"]:
    """Zero the grounding attention on sink tokens.

    Args:
        grounding: [..., T] attention of the grounding heads, >= 0.
        sink: [..., T] attention of the sink heads, >= 0, broadcast over maps.
        sink_threshold: Tokens with at least this sink attention are sinks.

    Returns:
        [..., T], a copy.
    """
    return np.where(sink >= sink_threshold, 0, grounding)
