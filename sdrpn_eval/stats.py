"""Means with 95 % intervals that know that questions on one image are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def clustered(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Mean of values with a percentile-bootstrap interval that resamples whole clusters.

    clusters: one key a value, the image a question is about. Paired comparisons pass differences.
    With one cluster there is nothing to resample, and the interval is NaN.
    """
    if len(values) != len(clusters) or not values:
        raise ValueError(f"need one cluster a value, got {len(values)} and {len(clusters)}")
    numbers = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[key] for key in clusters])
    sums = np.bincount(index, weights=np.asarray(values, dtype=float))
    counts = np.bincount(index)
    mean = float(sums.sum() / counts.sum())
    if len(numbers) == 1:
        return Estimate(mean, float("nan"), float("nan"))
    interval = bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))
