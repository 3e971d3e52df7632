"""Agreement of RoI maps with held-out pseudo-labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from sdrpn.distill.pseudo_labels import IGNORED


def map_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float] | None:
    """Compute average precision and IoU of one RoI map.

    Args:
        logits: [T] RoI logits.
        labels: [T] of 1, 0 and -100; only cells labelled 1 or 0 count.

    Returns:
        `average_precision`, and `iou` of the cells with a probability above 0.5; None unless both
        labels occur.
    """
    labelled = labels != IGNORED
    truth, scores = labels[labelled] == 1, logits[labelled]
    if truth.all() or not truth.any():
        return None
    over = scores > 0
    return {
        "average_precision": float(average_precision_score(truth, scores)),
        "iou": float((over & truth).sum() / (over | truth).sum()),
    }


class MapMetrics:
    """`compute_metrics` of transformers' Trainer: `map_scores` averaged over samples.

    Called for each batch (`batch_eval_metrics`), so maps are not accumulated.
    """

    def __init__(self) -> None:
        self._scores: list[dict[str, float]] = []

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        logits, labels = (_array(v) for v in (prediction.predictions, prediction.label_ids))
        each = (map_scores(a, b) for a, b in zip(logits, labels, strict=True))
        self._scores += [scores for scores in each if scores is not None]
        if not compute_result:
            return {}
        names = ("average_precision", "iou")
        # Without samples the mean is NaN, which is harmless: the best checkpoint is chosen by loss.
        means = {
            n: float(np.mean([s[n] for s in self._scores])) if self._scores else float("nan")
            for n in names
        }
        self._scores = []
        return means


def _array(values: Any) -> np.ndarray:
    return values.float().cpu().numpy() if hasattr(values, "cpu") else np.asarray(values)
