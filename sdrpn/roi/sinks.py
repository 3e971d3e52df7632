"""Attention sinks: image tokens that take attention whatever is asked (docs/method.md)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Num


def remove_sinks(
    grounding: Num[np.ndarray, "*maps cells"],
    sink: Num[np.ndarray, "*maps_or_one cells"],
    sink_threshold: float,
) -> Num[np.ndarray, "*maps cells"]:
    """Set the attention on sink tokens to 0.

    grounding, sink: attention shares, >= 0, of one shape. Returns a copy of grounding.
    """
    return np.where(sink >= sink_threshold, 0, grounding)
