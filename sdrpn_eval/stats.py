"""Means with 95 % intervals that know that questions on one image are not independent."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000
BATCH = 200
"""Resamples drawn at once: 5000 clusters of all 2000 would take hundreds of MB."""
FLIPS = 9999
EXACT_UP_TO = 13
"""Clusters up to which all sign patterns are tried (2 ** 13 of them)."""


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
    sums, counts = _by_cluster(values, clusters)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Estimate(mean, float("nan"), float("nan"))
    interval = bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def sign_flip(differences: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> float:
    """Two-sided p-value of paired differences, by flipping the signs of whole clusters.

    If a change did nothing, an image's differences were as likely to be the other way round, all
    of them together: a randomization test under that symmetry (Canay, Romano and Shaikh,
    Econometrica 85, 2017). All sign patterns are tried where they are few; else FLIPS random ones,
    counted with the observed one so that p is never 0 (Phipson and Smyth, SAGMB 9, 2010).
    """
    sums, _ = _by_cluster(differences, clusters)
    sums = sums[np.abs(sums) > 1e-12]  # a cluster without a difference has nothing to flip
    observed = abs(sums.sum()) - 1e-9
    if len(sums) <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        return float(np.mean(np.abs(signs @ sums) >= observed)) if len(sums) else 1.0
    rng = np.random.default_rng(seed)
    extreme = 1
    for start in range(0, FLIPS, BATCH):
        size = (min(BATCH, FLIPS - start), len(sums))
        signs = rng.integers(0, 2, size, dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= observed).sum())
    return extreme / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for there being several (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the values, number of values) of each cluster."""
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"need one cluster a value, got {len(values)} and {len(clusters)}")
    numbers = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[key] for key in clusters])
    return np.bincount(index, weights=np.asarray(values, dtype=float)), np.bincount(index)
