"""Intervals that resample images, not questions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdrpn_eval.stats import FLIPS, clustered, holm, sign_flip


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


def test_few_clusters_are_flipped_in_every_way() -> None:
    """Sums 2, 1, -1: the patterns give 4, 2, 2, 0 and their negatives; 6 of 8 reach 2."""
    assert sign_flip([1, 1, 1, 0, -1, 0], ["a", "a", "b", "b", "c", "d"]) == 6 / 8
    assert sign_flip([1, 1, 1], [0, 1, 2]) == 2 / 8


def test_no_difference_is_no_evidence() -> None:
    assert sign_flip([0.0, 0.0, 0.0], [0, 1, 2]) == 1.0
    assert sign_flip([1.0, -1.0], [0, 0]) == 1.0


def test_clear_difference_over_many_clusters_has_the_smallest_p() -> None:
    assert sign_flip([1.0] * 40, list(range(40))) == pytest.approx(1 / (FLIPS + 1))


def test_questions_on_one_image_count_once() -> None:
    """Twenty wins on one image are one win; on twenty images they are twenty."""
    assert sign_flip([1.0] * 20, [0] * 20) == 1.0
    assert sign_flip([1.0] * 20, list(range(20))) < 0.001


def test_p_is_uniform_where_nothing_is() -> None:
    rng = np.random.default_rng(3)
    draws = rng.choice([-1.0, 0.0, 1.0], (150, 40))
    p = np.array([sign_flip(row.tolist(), list(range(40)), seed=i) for i, row in enumerate(draws)])
    assert 0.01 <= np.mean(p < 0.05) <= 0.11
    assert np.mean(p) == pytest.approx(0.55, abs=0.1)


def test_exact_and_drawn_agree() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0.4, 1, 13)
    exact = sign_flip(values.tolist(), list(range(13)))
    # A fourteenth cluster that hardly counts turns the exact test into the drawn one.
    drawn = sign_flip([*values.tolist(), 1e-9], list(range(14)))
    assert drawn == pytest.approx(exact, abs=0.02)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
