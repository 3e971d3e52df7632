"""Means with 95 % intervals and tests, clustered by image.

docs/statistics.md names the methods and shows what they give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
BATCH = 200
"""Resamples drawn at once, to bound memory."""
FLIPS = 9999
"""Sign patterns drawn; if there are fewer, all of them are used."""
TAIL = 0.025
"""Probability outside of each end of an interval."""
NO_VARIANCE = 1e-24
"""A smaller variance of the mean is rounding error: all clusters are equal."""


class Estimate(NamedTuple):
    """A mean and its 95 % interval; the ends are None if the data give no interval."""

    mean: float
    low: float | None
    high: float | None


def clustered(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Mean of scores with a 95 % interval clustered by image.

    Scores in [0, 1] get the interval of Korn and Graubard (Survey Methodology 24, 1998): Clopper
    and Pearson's, exact at 0 and 1, at the effective sample size of the clustered questions. Other
    scores get a percentile bootstrap that resamples whole clusters.

    Args:
        values: One score per question.
        clusters: One key per question: the image that it is about.
        seed: Of the bootstrap.

    Returns:
        The mean over questions and its interval; no interval with one cluster, nor for scores
        outside [0, 1] that are the same in all clusters.

    Raises:
        ValueError: If the lengths differ, there are no values, or one is not finite.
    """
    sums, counts = _by_cluster(values, clusters)
    if min(values) >= 0 and max(values) <= 1:
        return _share(sums, counts)
    return _resampled(sums, counts, seed)


def clustered_difference(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    seed: int = 0,
    *,
    shares: bool = True,
) -> Estimate:
    """Mean of paired differences with a 95 % interval clustered by image.

    Of scores in [0, 1], the gains and the losses are shares with intervals of their own (see
    `clustered`), combined by the method of variance estimates recovery (Newcombe, Statistics in
    Medicine 17, 1998; Zou and Donner, Statistics in Medicine 27, 2008). So the interval has a width
    even if no question changed. Other scores get a percentile bootstrap over clusters.

    Args:
        differences: One per question, second score minus first.
        clusters: One key per question: the image that it is about.
        seed: Of the bootstrap.
        shares: Whether the scores lie in [0, 1], and the differences in [-1, 1].

    Returns:
        As `clustered`.

    Raises:
        ValueError: As `clustered`, and for a difference outside [-1, 1] of shares.
    """
    sums, counts = _by_cluster(differences, clusters)
    if not shares:
        return _resampled(sums, counts, seed)
    values = np.asarray(differences, dtype=float)
    largest = float(np.abs(values).max())
    if largest > 1:
        raise ValueError(f"differences of scores in [0, 1] must be in [-1, 1], got {largest:g}")
    gains, _ = _by_cluster(values.clip(0, None).tolist(), clusters)
    losses, _ = _by_cluster((-values).clip(0, None).tolist(), clusters)
    size = _size_of_changes(gains + losses, counts)
    gain, loss = _share(gains, counts, size), _share(losses, counts, size)
    mean = gain.mean - loss.mean
    if gain.low is None or gain.high is None or loss.low is None or loss.high is None:
        return Estimate(mean, None, None)
    related = _correlation(gains, losses, counts)
    down = _hypotenuse(gain.mean - gain.low, loss.high - loss.mean, related)
    up = _hypotenuse(gain.high - gain.mean, loss.mean - loss.low, related)
    return Estimate(mean, mean - down, mean + up)  # no further than -1 and 1, as their parts


def rounded(estimate: Estimate) -> list[float | None]:
    """An estimate as a list for JSON, null for no interval."""
    return [None if value is None else round(value, 6) for value in estimate]


def with_interval(estimate: Sequence[float | None], scale: float, digits: str) -> str:
    """Formats `mean [low, high]`, each times scale, with a format such as ".1f"."""
    mean, *ends = ["n/a" if v is None else f"{scale * v:{digits}}" for v in estimate]
    return f"{mean} [{'n/a' if 'n/a' in ends else ', '.join(ends)}]"


def _size_of_changes(changes: np.ndarray, counts: np.ndarray) -> float:
    """Effective number of questions, from how many of an image change together.

    One image of mean size that changed completely is added to those that changed: if none did, the
    questions on an image may still all change together, and count as one observation.
    """
    questions, images = float(counts.sum()), len(counts)
    together = (questions / images + changes.sum()) / (1 + np.count_nonzero(changes))
    return min(questions, max(float(images), questions / together))


def _share(sums: np.ndarray, counts: np.ndarray, alike: float | None = None) -> Estimate:
    """Korn and Graubard's interval, never narrower than for clusters that all agree.

    Args:
        sums: Sum of the scores per cluster.
        counts: Number of scores per cluster.
        alike: Effective sample size if all clusters agree; default: their number, as nothing then
            shows that it is larger.
    """
    # Imported here: behind a command, and slow.
    from scipy.special import betaincinv, stdtrit

    questions, images = int(counts.sum()), len(sums)
    mean = float(sums.sum()) / questions
    if images == 1:
        return Estimate(mean, None, None)
    variance = _covariance(sums, sums, counts)
    size = alike = alike or float(images)
    if variance > NO_VARIANCE:
        freedom = stdtrit(questions - 1, 1 - TAIL) / stdtrit(images - 1, 1 - TAIL)
        size = min(questions, mean * (1 - mean) / variance) * float(freedom) ** 2
    right, wrong = mean * size, (1 - mean) * size
    low = float(betaincinv(right, wrong + 1, TAIL)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, wrong, 1 - TAIL)) if wrong > 0 else 1.0
    end = TAIL ** (1 / alike)
    return Estimate(mean, min(low, end), max(high, 1 - end))


def _covariance(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> float:
    """Covariance of two means over questions, linearized, from residuals of clusters."""
    questions, images = counts.sum(), len(counts)
    residuals = [sums - sums.sum() / questions * counts for sums in (first, second)]
    return float(images / (images - 1) * (residuals[0] @ residuals[1]) / questions**2)


def _correlation(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> float:
    variances = _covariance(first, first, counts), _covariance(second, second, counts)
    if min(variances) <= NO_VARIANCE:
        return 0.0
    return _covariance(first, second, counts) / math.sqrt(variances[0] * variances[1])


def _hypotenuse(a: float, b: float, related: float) -> float:
    return math.sqrt(max(a * a - 2 * related * a * b + b * b, 0.0))


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int) -> Estimate:
    """A percentile bootstrap over clusters; no interval if all clusters are equal."""
    mean = float(sums.sum() / counts.sum())
    if np.ptp(sums / counts) <= 1e-12 * max(1.0, abs(mean)):
        return Estimate(mean, None, None)
    # Imported here: slow, and not needed for scores in [0, 1].
    from scipy.stats import bootstrap

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

    Under the null hypothesis an image's differences are as likely to have the opposite sign, all
    of them together: a randomization test under that symmetry (Canay, Romano and Shaikh,
    Econometrica 85, 2017). The test is exact for up to 13 clusters that differ (2 ** 13 sign
    patterns). Otherwise FLIPS patterns are drawn and counted with the observed one, so that p is
    never 0 (Phipson and Smyth, SAGMB 9, 2010).

    Args:
        differences: One per question, second score minus first.
        clusters: One key per question: the image that it is about.
        seed: Of the drawn patterns.

    Returns:
        The p-value, in (0, 1].

    Raises:
        ValueError: As `clustered`.
    """
    sums, _ = _by_cluster(differences, clusters)
    sums = sums[np.abs(sums) > 1e-12]  # a cluster without a difference has nothing to flip
    if len(sums) < 2:
        return 1.0
    # Imported here: slow, and --help must not wait for it.
    from scipy.stats import permutation_test

    # One-sided on the absolute sum: scipy's two-sided p doubles the observed pattern when drawing.
    result = permutation_test(
        (sums,),
        lambda sample, axis=-1: np.abs(sample.sum(axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=FLIPS,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def smallest_p(images: int) -> float:
    """The smallest p-value of `sign_flip` if this many images changed."""
    return max(2.0 ** (1 - images), 1 / (FLIPS + 1)) if images else 1.0


def images_needed(alpha: float, tests: int = 1) -> int | None:
    """Number of images that a test needs for its p-value to be informative.

    It is twice the smallest number whose p-value, after Holm's correction, can fall below alpha: so
    a difference is found if half of the images changed, all in one direction.

    Args:
        alpha: Significance level.
        tests: Number of tests to correct for.

    Returns:
        The number of images, or None if no number is enough.
    """
    if tests / (FLIPS + 1) >= alpha:
        return None
    return 2 * next(n for n in itertools.count(1) if tests * smallest_p(n) < alpha)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several p-values (1979), in their order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster."""
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"need one cluster a value, got {len(values)} and {len(clusters)}")
    if not np.isfinite(values).all():
        raise ValueError("a score is NaN or infinite")
    numbers = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[key] for key in clusters])
    return np.bincount(index, weights=np.asarray(values, dtype=float)), np.bincount(index)
