"""Intervals that resample images, not questions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdrpn_eval.stats import clustered


def test_mean_is_over_values_not_over_clusters() -> None:
    estimate = clustered([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert estimate.mean == 0.75
    assert estimate.low == 0.0
    assert estimate.high == 1.0


def test_questions_that_stand_or_fall_together_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    per_image = rng.random(60) < 0.5
    values = np.repeat(per_image, 5).astype(float).tolist()
    together = clustered(values, np.repeat(np.arange(60), 5).tolist())
    apart = clustered(values, list(range(300)))
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(math.sqrt(5), rel=0.25)


def test_independent_values_give_the_textbook_interval() -> None:
    values = [1.0] * 80 + [0.0] * 120
    estimate = clustered(values, list(range(200)))
    half = 1.96 * math.sqrt(0.4 * 0.6 / 200)
    assert estimate.low == pytest.approx(0.4 - half, abs=0.01)
    assert estimate.high == pytest.approx(0.4 + half, abs=0.01)


def test_same_seed_same_interval() -> None:
    values, clusters = [1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2]
    assert clustered(values, clusters) == clustered(values, clusters)


def test_one_cluster_has_no_interval() -> None:
    estimate = clustered([1, 0], ["a", "a"])
    assert estimate.mean == 0.5
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], [1, 2])])
def test_wrong_lengths_are_refused(values: list[float], clusters: list[int]) -> None:
    with pytest.raises(ValueError, match="one cluster a value"):
        clustered(values, clusters)
