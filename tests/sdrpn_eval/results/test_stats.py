"""Intervals that resample images, not questions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdrpn_eval.results.stats import (
    Estimate,
    clustered,
    clustered_difference,
    holm,
    images_needed,
    rounded,
    sign_flip,
    smallest_p,
    with_interval,
)


def test_mean_is_over_values_not_over_clusters() -> None:
    estimate = clustered([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert estimate.mean == 0.75
    assert estimate.low == pytest.approx(0.0, abs=1e-9)  # two images tell next to nothing
    assert estimate.high == pytest.approx(1.0, abs=1e-9)


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
    assert estimate == (0.5, None, None)
    assert clustered([1400.0, 0.0], ["a", "a"]) == (700.0, None, None)
    assert clustered_difference([1, 0], ["a", "a"]) == (0.5, None, None)
    assert clustered_difference([5, 0], ["a", "a"], shares=False) == (2.5, None, None)


# At 0 and 1, and near them. Clopper and Pearson's limits are 0.025 ** (1 / n) for n of n, and
# those that tables and `scipy.stats.binomtest` give.


@pytest.mark.parametrize(
    ("images", "low"), [(2, 0.15811), (3, 0.29240), (10, 0.69150), (100, 0.96378), (500, 0.99265)]
)
def test_all_right_has_the_exact_interval_of_its_images(images: int, low: float) -> None:
    """Whatever the number of questions: those on an image may all be right for one reason."""
    for questions in (1, 5):
        values, clusters = [1.0] * images * questions, [*range(images)] * questions
        assert clustered(values, clusters) == (1.0, pytest.approx(low, abs=1e-5), 1.0)
        wrong = clustered([0.0] * images * questions, clusters)
        assert wrong == (0.0, 0.0, pytest.approx(1 - low, abs=1e-5))


@pytest.mark.parametrize(
    ("wrong", "low", "high"),
    [(1, 0.98889, 0.99995), (2, 0.98561, 0.99952), (5, 0.97680, 0.99675), (250, 0.45529, 0.54471)],
)
def test_independent_questions_have_clopper_and_pearson_s_interval(
    wrong: int, low: float, high: float
) -> None:
    found = clustered([0.0] * wrong + [1.0] * (500 - wrong), list(range(500)))
    assert found.mean == pytest.approx(1 - wrong / 500)
    assert found[1:] == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_one_wrong_and_one_right_of_500() -> None:
    """Clopper and Pearson: 0.00005 and 0.01109, with a variance that divides by 499."""
    one = clustered([1.0] + [0.0] * 499, list(range(500)))
    assert one == (0.002, pytest.approx(0.000051, abs=2e-6), pytest.approx(0.01111, abs=2e-5))
    other = clustered([0.0] + [1.0] * 499, list(range(500)))
    assert other == pytest.approx((0.998, 1 - (one.high or 0), 1 - (one.low or 0)))


@pytest.mark.parametrize("per_image", [1, 4])
def test_a_better_score_has_no_wider_interval_below_it(per_image: int) -> None:
    clusters = [i // per_image for i in range(480)]
    lows = []
    for wrong in range(12):
        values = [1.0] * 480
        values[: wrong * per_image : per_image] = [0.0] * wrong
        lows.append(clustered(values, clusters).low or 0.0)
    assert lows == sorted(lows, reverse=True)
    assert lows[0] == pytest.approx(0.025 ** (per_image / 480))
    few = clustered([1.0] + [0.0] * 479, clusters)
    assert (few.high or 0) >= 1 - 0.025 ** (per_image / 480) - 1e-12


def test_scores_that_are_all_the_same_are_as_sure_as_their_images() -> None:
    """Half of ten images: Clopper and Pearson's 5 of 10."""
    found = clustered([0.5] * 30, [i // 3 for i in range(30)])
    assert found == (0.5, pytest.approx(0.18709, abs=1e-5), pytest.approx(0.81291, abs=1e-5))


def test_scores_of_another_scale_that_are_all_the_same_have_no_interval() -> None:
    assert clustered([1400.0] * 9, list(range(9))) == (1400.0, None, None)
    assert clustered([0.1 + 7.2] * 9, [0, 0, 0, 1, 1, 1, 2, 2, 3]).low is None
    # Sums of 3 and 7 of them round otherwise: their means differ by 5e-13.
    assert clustered([1400.1] * 10, [0] * 3 + [1] * 7).low is None
    assert clustered_difference([0.0] * 9, list(range(9)), shares=False) == (0.0, None, None)


def test_scores_of_another_scale_are_resampled_by_image() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(100, 10, 200).tolist()
    found = clustered(values, list(range(200)))
    assert found.low == pytest.approx(found.mean - 1.96 * 10 / math.sqrt(200), abs=0.4)
    assert found.high == pytest.approx(found.mean + 1.96 * 10 / math.sqrt(200), abs=0.4)
    twice = clustered(values * 2, [*range(200)] * 2)  # no news on the same images
    assert twice.low == pytest.approx(found.low, abs=0.15)
    changes = clustered_difference([v - 100 for v in values], list(range(200)), shares=False)
    assert changes.low == pytest.approx(found.low - 100)
    assert clustered(values, list(range(200)), seed=1) != found
    assert clustered([2.0, 4.0], [0, 1]) == (3.0, 2.0, 4.0)


def test_an_interval_of_another_scale_is_a_percentile_interval() -> None:
    """One image of ten has 10: it is drawn at most 3 times in 98.7 % of samples, 2 in 93.0 %."""
    found = clustered([10.0] + [0.0] * 9, list(range(10)))
    assert found == (1.0, 0.0, 3.0)


def test_images_are_resampled_with_all_their_questions() -> None:
    """Images of one and of nine questions, all close to 100."""
    sizes = [1, 9] * 20
    places = [i for i, size in enumerate(sizes) for _ in range(size)]
    values = [100.0 + i % 3 for i, _ in enumerate(places)]
    found = clustered(values, places)
    assert 100.5 < (found.low or 0) < found.mean < (found.high or 0) < 101.5


@pytest.mark.parametrize("values", [[-0.5, 0.5], [0.0, 1.5]])
def test_a_scale_that_is_not_from_0_to_1_has_a_bootstrap_s_interval(values: list[float]) -> None:
    """Of 100 images half have either score: 1.96 standard errors around the mean."""
    found = clustered(values * 50, list(range(100)))
    mean, half = sum(values) / 2, 1.96 * (values[1] - values[0]) / 2 / 10
    assert found.low == pytest.approx(mean - half, abs=0.03)
    assert found.high == pytest.approx(mean + half, abs=0.03)
    assert (found.high or 0) - (found.low or 0) == pytest.approx(2 * half, rel=0.1)


def test_few_images_are_less_sure_than_their_variance() -> None:
    """Five images with 20, 40, 60, 80 and 50 % right of 20 questions.

    The mean's variance, 0.01, is that of 25 independent questions; Student's t of 4 degrees of
    freedom against that of 99 leaves 12.77 of them, and Clopper and Pearson's limits are for half.
    """
    right = [4, 8, 12, 16, 10]
    values = [float(j < n) for n in right for j in range(20)]
    found = clustered(values, [i for i in range(5) for _ in range(20)])
    assert found == (0.5, pytest.approx(0.21886, abs=1e-5), pytest.approx(0.78114, abs=1e-5))


# Differences


@pytest.mark.parametrize(("images", "half"), [(3, 0.70760), (10, 0.30850), (125, 0.02908)])
def test_no_change_is_known_as_well_as_the_share_of_images_that_may_change(
    images: int, half: float
) -> None:
    found = clustered_difference([0.0] * images * 4, [*range(images)] * 4)
    assert found == (0.0, pytest.approx(-half, abs=1e-5), pytest.approx(half, abs=1e-5))


def test_a_difference_is_made_of_gains_and_losses() -> None:
    """Of 100: 10 won, none lost. Exact limits of 10 of 100: 4.90 and 17.62; of none: 3.62."""
    found = clustered_difference([1.0] * 10 + [0.0] * 90, list(range(100)))
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - math.hypot(0.1 - 0.0490, 0.0362), abs=5e-4)
    assert found.high == pytest.approx(0.1762, abs=5e-4)
    lost = clustered_difference([-1.0] * 10 + [0.0] * 90, list(range(100)))
    assert lost == pytest.approx((-found.mean, -(found.high or 0), -(found.low or 0)))


def test_gains_and_losses_of_one_image_are_not_independent() -> None:
    """Where each image wins one question and loses another, nothing is gained, and surely so."""
    rng = np.random.default_rng(4)
    tied = [v for size in rng.integers(0, 4, 60) for v in [1.0] * size + [-1.0] * size + [0.0] * 4]
    images = [
        i
        for i, size in enumerate(np.random.default_rng(4).integers(0, 4, 60))
        for _ in range(2 * size + 4)
    ]
    found = clustered_difference(tied, images)
    apart = clustered_difference(tied, list(range(len(tied))))
    assert found.mean == 0
    assert (found.high or 0) < 0.5 * (apart.high or 0)


def test_a_large_difference_has_the_textbook_interval() -> None:
    values = [1.0] * 240 + [-1.0] * 60 + [0.0] * 300
    half = 1.96 * math.sqrt((0.4 + 0.1 - 0.3**2) / 600)
    found = clustered_difference(values, list(range(600)))
    assert found.low == pytest.approx(0.3 - half, abs=0.005)
    assert found.high == pytest.approx(0.3 + half, abs=0.005)


def test_changes_that_come_singly_are_surer_than_whole_images() -> None:
    """Thirteen won of 700 on 140 images, each on its own: that none was lost is known, too."""
    values = [0.0] * 700
    for image in range(13):
        values[5 * image] = 1.0
    images = [i // 5 for i in range(700)]
    found = clustered_difference(values, images)
    assert found.low == pytest.approx(0.0076, abs=5e-4)
    lost = clustered_difference([-v for v in values], images)
    assert lost == pytest.approx((-found.mean, -(found.high or 0), -(found.low or 0)))


def test_a_difference_by_another_road() -> None:
    """Thirty images of six questions, 0 to 3 won and none or one lost on each.

    Worked out apart from this package, with scipy.stats.beta and numpy.corrcoef: 23.9 % won
    [17.136, 31.764], 7.8 % lost [4.210, 12.925], and a correlation of 0.894 between the two.
    """
    values: list[float] = []
    for i in range(30):
        row = [1.0] * (i % 4) + [-1.0] * (i % 4 > 1)
        values += row + [0.0] * (6 - len(row))
    found = clustered_difference(values, [i // 6 for i in range(180)])
    assert found == pytest.approx((0.16111111, 0.12957506, 0.21062042), abs=1e-7)


def test_losses_show_how_many_questions_change_together_as_gains_do() -> None:
    """Ten images of four; on one all four are won, on another all four are lost."""
    clusters = [i // 4 for i in range(40)]
    both = clustered_difference([1.0] * 4 + [-1.0] * 4 + [0.0] * 32, clusters)
    assert both.mean == 0
    assert both.high == pytest.approx(-(both.low or 0))
    assert both.high == pytest.approx(0.4, abs=0.1)
    singly = [0.0] * 40
    singly[0] = singly[4] = 1.0
    singly[8] = singly[12] = -1.0
    assert (clustered_difference(singly, clusters).high or 0) < 0.6 * (both.high or 0)


def test_an_interval_ends_at_what_a_difference_can_be() -> None:
    assert clustered_difference([1.0, 1.0, 1.0], [0, 1, 2]).high == 1.0
    assert clustered_difference([-1.0, -1.0, -1.0], [0, 1, 2]).low == -1.0


def test_differences_of_another_scale_are_not_taken_for_shares() -> None:
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got 1.5"):
        clustered_difference([0.0, -1.5], [0, 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    for function in (clustered, clustered_difference, sign_flip):
        with pytest.raises(ValueError, match="NaN or infinite"):
            function([1.0, bad], [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("images", "per_image"), [(12, 5), (60, 5), (200, 1)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
def test_intervals_hold_what_they_promise(
    images: int, per_image: int, share: float, alike: float
) -> None:
    """95 of 100 intervals hold the truth, also close to 1, where a bootstrap's do not."""
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(images), per_image).tolist()
    held = 0
    for _ in range(200):
        chance = np.full(images, share)
        if alike:
            chance = rng.beta(*(np.array([share, 1 - share]) * (1 / alike - 1 + 1e-9)), images)
        values = (rng.random((images, per_image)) < chance[:, None]).astype(float).ravel()
        _, low, high = clustered(values.tolist(), clusters)
        assert low is not None
        assert high is not None
        held += low <= share <= high
    assert held >= 183  # of 200; as few as this of 95 % come once in 500 times


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], [1, 2])])
def test_wrong_lengths_are_refused(values: list[float], clusters: list[int]) -> None:
    with pytest.raises(ValueError, match="one cluster a value"):
        clustered(values, clusters)


def test_few_clusters_are_flipped_in_every_way() -> None:
    """Sums 2, 1, -1: the patterns give 4, 2, 2, 0 and their negatives; 6 of 8 reach 2."""
    assert sign_flip([1, 1, 1, 0, -1, 0], ["a", "a", "b", "b", "c", "d"]) == 6 / 8
    assert sign_flip([1, 1, 1], [0, 1, 2]) == 2 / 8
    assert sign_flip([0.1, 0.1, 0.1, -0.05], [0, 1, 2, 3]) == 4 / 16
    assert sign_flip([1.0] * 3 + [0.0] * 17, list(range(20))) == 2 / 8


def test_no_difference_is_no_evidence() -> None:
    assert sign_flip([0.0, 0.0, 0.0], [0, 1, 2]) == 1.0
    assert sign_flip([1.0, -1.0], [0, 0]) == 1.0
    assert sign_flip([1.0, -1.0] * 10, list(range(20))) == 1.0  # of all 9999 and the observed one


def test_clear_difference_over_many_clusters_has_the_smallest_p() -> None:
    assert sign_flip([1.0] * 40, list(range(40))) == pytest.approx(1e-4)


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


def test_the_smallest_p_is_what_the_test_gives_at_best() -> None:
    assert [smallest_p(n) for n in (0, 1, 2, 3, 6)] == [1.0, 1.0, 0.5, 0.25, 0.03125]
    assert smallest_p(14) == 2 / 2**14
    assert smallest_p(15) == smallest_p(1000) == 1e-4
    for images in (1, 2, 5, 13):
        assert smallest_p(images) == sign_flip([1.0] * images, list(range(images)))


@pytest.mark.parametrize(
    ("alpha", "tests", "images"),
    [(0.05, 1, 12), (0.05, 2, 14), (0.05, 10, 18), (0.01, 1, 16), (0.5, 1, 6), (0.0001, 1, None)],
)
def test_images_that_are_needed(alpha: float, tests: int, images: int | None) -> None:
    """2 / 2 ** 6 is the first below 0.05, and half of the images shall be enough."""
    assert images_needed(alpha, tests) == images
    assert images_needed(0.05) == 12
    assert images_needed(0.000100005) == 30


def test_estimates_in_print_and_in_json() -> None:
    assert rounded(Estimate(0.12345678, None, 0.98765432)) == [0.123457, None, 0.987654]
    assert with_interval((0.5, 0.125, 0.875), 100, ".1f") == "50.0 [12.5, 87.5]"
    assert with_interval((1.5, -1.0, 2.0), 1, "+.4g") == "+1.5 [-1, +2]"
    assert with_interval((0.5, None, None), 100, ".1f") == "50.0 [n/a]"


def test_seeds_are_0_by_default_and_matter() -> None:
    values = np.random.default_rng(8).normal(5, 1, 30).tolist()
    places = list(range(30))
    assert clustered(values, places) == clustered(values, places, 0) != clustered(values, places, 1)
    changes = [v - 5 for v in values]
    for function in (sign_flip, clustered_difference):
        more = {} if function is sign_flip else {"shares": False}
        assert function(changes, places, **more) == function(changes, places, 0, **more)
        assert function(changes, places, 0, **more) != function(changes, places, 1, **more)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
