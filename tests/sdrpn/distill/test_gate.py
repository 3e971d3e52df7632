"""The probe behind the learned gate, on states whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdrpn.distill.gate import Probe, curve, fit, held_out_images, stacked, train_gate
from sdrpn.distill.gate_job import GateSample

WIDTH = 6


def samples(count: int, *, rare: int = 2, seed: int = 0, noise: float = 0.0) -> list[GateSample]:
    """Questions, four an image; one of `rare` needs a zoom, and channel 2 of its state says so."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        label = int(rng.integers(rare) == 0)
        state = rng.standard_normal(WIDTH) * [1, 10, 1, 1, 1e-3, 1] + [0, 30, 0, 0, 0, 0]
        state[2] = 2 * label - 1 + noise * rng.standard_normal()
        state[5] = 7.0  # a channel that never changes
        confidence = float(rng.random())
        made.append(GateSample(f"{i // 4}.png", state.astype(np.float32), label, confidence))
    return made


def test_the_probe_finds_what_the_state_says() -> None:
    report = train_gate(samples(400, noise=0.3), {})
    assert report.auc > 0.98
    assert 0.3 < report.confidence_auc < 0.7  # drawn at random
    assert report.probe.weight.dtype == np.float32
    assert report.probe.weight.shape == (WIDTH,)
    states, labels = stacked(samples(200, seed=1, noise=0.3))
    found = report.probe.probability(states) > 0.5
    assert (found == labels).mean() > 0.97


def test_the_probe_is_a_linear_layer_and_a_sigmoid() -> None:
    probe = Probe(np.array([1.0, -2.0], np.float32), 0.5)
    found = probe.probability(np.array([[1.0, 0.75], [0.0, 0.0]], np.float32))
    assert found == pytest.approx([0.5, 1 / (1 + np.exp(-0.5))])


def test_classes_count_alike_however_rare() -> None:
    """Without information the probability is a half, not the rare class's share."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((600, 3)).astype(np.float32)
    labels = (np.arange(600) % 10 == 0).astype(int)
    probe = fit(states, labels, [str(i // 4) for i in range(600)])
    assert probe.probability(states).mean() == pytest.approx(0.5, abs=0.05)


def test_confidence_is_a_baseline_of_unsureness() -> None:
    """Unsure answers need a zoom: low confidence ranks high."""
    sure = [replace(one, confidence=0.9 - 0.8 * one.label) for one in samples(400)]
    assert train_gate(sure, {}).confidence_auc == 1


def test_the_same_labels_give_the_same_gate() -> None:
    one, other = (train_gate(samples(300, noise=2.0), {}) for _ in range(2))
    assert np.array_equal(one.probe.weight, other.probe.weight)
    assert (one.probe.bias, one.curve) == (other.probe.bias, other.curve)
    seeded = train_gate(samples(300, noise=2.0), {}, seed=5)
    assert not np.array_equal(one.probe.weight, seeded.probe.weight)


def test_whole_images_are_held_out() -> None:
    made = samples(400)
    back = held_out_images(made, 0.2, seed=0)
    assert len(back) == 20
    assert back <= {one.image for one in made}
    assert held_out_images(made[::-1], 0.2, seed=0) == back
    assert held_out_images(made, 0.2, seed=1) != back
    report = train_gate(made, {})
    measured = [one.label for one in made if one.image in back]
    assert report.held_out == (measured.count(0), measured.count(1))
    assert sum(report.trained) + sum(report.held_out) == 400


def test_the_curve_skips_the_least_likely_first() -> None:
    probability = np.array([0.9, 0.1, 0.3, 0.2, 0.8, 0.4, 0.7, 0.6, 0.5, 0.95])
    labels = np.array([1, 0, 1, 0, 1, 0, 0, 0, 0, 1])
    points = {round(point["skipped"], 2): point for point in curve(probability, labels)}
    assert sorted(points) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert points[0.0]["agreement"] == 1
    assert points[0.2]["agreement"] == 1
    assert points[0.3]["agreement"] == pytest.approx(0.9)  # 0.3 needed it
    assert points[0.9]["agreement"] == pytest.approx(0.7)
    for share, point in points.items():
        assert (probability < point["threshold"]).mean() == pytest.approx(share)


def test_too_few_labels_are_counted() -> None:
    made = [replace(one, label=int(i == 7)) for i, one in enumerate(samples(201))]
    message = (
        r"too few labels 1: 1, and 200 labels 0 \(ignored: the two zooms disagree: 7, no region: "
        r"2\); a gate needs 20 of each: add questions about details that the first look cannot show"
    )
    with pytest.raises(ValueError, match=message):
        train_gate(made, {"no region": 2, "the two zooms disagree": 7})
    flipped = [replace(one, label=1 - one.label) for one in made]
    with pytest.raises(
        ValueError, match=r"too few labels 0: 1, .* on which a zoom changes nothing"
    ):
        train_gate(flipped, {})
    with pytest.raises(ValueError, match=r"too few labels .*: 0, and 0 labels .*ignored: none"):
        train_gate([], {})


def test_both_parts_need_both_classes() -> None:
    every = [replace(one, image="one.png" if one.label else one.image) for one in samples(200)]
    with pytest.raises(ValueError, match=r"too few labels 1 of the (training|held-out) images: 0"):
        train_gate(every, {})


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1])
def test_a_share_is_held_out(held_out: float) -> None:
    with pytest.raises(ValueError, match=r"held_out must be a share in \(0, 1\)"):
        train_gate(samples(100), {}, held_out=held_out)


def test_facts_say_what_was_measured() -> None:
    facts = train_gate(samples(400), {}).facts()
    assert facts["gate held-out AUC"] == 1
    zeros, ones = facts["gate held-out labels 0, 1"]
    assert zeros + ones == 80
    curve_points = facts["gate curve (skipped, threshold, agreement)"]
    assert curve_points[0][::2] == [0, 1]
    assert len(curve_points) == 10
