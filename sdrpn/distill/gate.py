"""The learned gate: a logistic probe on the RPN's state of the last prompt token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

from sdrpn.distill.gate_job import GateSample

MIN_LABELS = 20
"""Smallest number of labels of each class in training."""
FOLDS = 5
REGULARISATION = tuple(10.0**exponent for exponent in range(-5, 2))
"""Candidates of the inverse of the weight decay, `C` of scikit-learn."""
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of skipped questions on the curve."""
NARROWEST = 0.01
"""Smallest scale of a channel, as a share of the median, so that no weight becomes huge."""


@dataclass(frozen=True)
class Probe:
    """A linear probe: probability = sigmoid(weight @ state + bias).

    Args:
        weight: [C].
        bias: The bias.
    """

    weight: Float32[np.ndarray, " width"]
    bias: float

    def probability(
        self, states: Float[np.ndarray, "questions width"]
    ) -> Float[np.ndarray, " questions"]:
        """Return the probability that a zoom helps, [n]."""
        logits = states.astype(np.float64) @ self.weight + self.bias
        return 1 / (1 + np.exp(-logits))


@dataclass(frozen=True)
class Report:
    """A trained gate, measured on held-out images.

    Args:
        probe: The gate.
        trained: Number of labels (0, 1) in training.
        held_out: Number of labels (0, 1) of held-out images.
        auc: Area under the ROC curve of the gate, on the held-out labels.
        confidence_auc: The same of the first answer's confidence, which needs no training.
        curve: Points of the curve: `skipped`, the share of questions without a zoom, `threshold`,
            the `ZoomConfig.learned_gate` that skips them, and `agreement`, the share of questions
            whose label does not ask for a zoom that was skipped.
    """

    probe: Probe
    trained: tuple[int, int]
    held_out: tuple[int, int]
    auc: float
    confidence_auc: float
    curve: tuple[Mapping[str, float], ...]

    def facts(self) -> dict[str, Any]:
        """Return training facts for the RPN's config and card."""
        names = ("skipped", "threshold", "agreement")
        return {
            "gate labels 0, 1": list(self.trained),
            "gate held-out labels 0, 1": list(self.held_out),
            "gate held-out AUC": round(self.auc, 4),
            "gate held-out AUC of the answer's confidence": round(self.confidence_auc, 4),
            f"gate curve ({', '.join(names)})": [
                [round(point[name], 4) for name in names] for point in self.curve
            ],
        }


def train_gate(
    samples: Sequence[GateSample],
    ignored: Mapping[str, int],
    *,
    held_out: float = 0.2,
    seed: int = 0,
) -> Report:
    """Fit a gate to labelled questions, both classes with the same total weight.

    The weight decay is chosen by cross-validation over images. No randomness but the split's.

    Args:
        samples: Labelled questions.
        ignored: Number of ignored questions by reason, for errors.
        held_out: Share of the images that is held out.
        seed: Seed of the split.

    Raises:
        ValueError: If `held_out` is no share, or one class has too few labels.
    """
    check_held_out(held_out)
    _check_counts(_counts(samples), MIN_LABELS, "", ignored)
    back = held_out_images(samples, held_out, seed)
    train = [s for s in samples if s.image not in back]
    test = [s for s in samples if s.image in back]
    _check_counts(_counts(train), MIN_LABELS, " of the training images", ignored)
    _check_counts(_counts(test), 1, " of the held-out images", ignored)
    states, labels = stacked(train)
    probe = fit(states, labels, [s.image for s in train])
    states, labels = stacked(test)
    probability = probe.probability(states)
    return Report(
        probe=probe,
        trained=_counts(train),
        held_out=_counts(test),
        auc=float(roc_auc_score(labels, probability)),
        confidence_auc=float(roc_auc_score(labels, [-s.confidence for s in test])),
        curve=tuple(curve(probability, labels)),
    )


def check_held_out(share: float) -> None:
    """Raise ValueError unless a share is in (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"held_out must be a share in (0, 1), got {share}")


def held_out_images(samples: Sequence[GateSample], share: float, seed: int) -> set[str]:
    """Draw the images to hold out, at least one."""
    images = sorted({s.image for s in samples})
    order = np.random.default_rng(seed).permutation(len(images))
    return {images[i] for i in order[: max(round(share * len(images)), 1)]}


def stacked(
    samples: Sequence[GateSample],
) -> tuple[Float32[np.ndarray, "questions width"], Int[np.ndarray, " questions"]]:
    """Return states [n, C] and labels [n]."""
    return np.stack([s.state for s in samples]), np.array([s.label for s in samples])


def fit(
    states: Float32[np.ndarray, "questions width"],
    labels: Int[np.ndarray, " questions"],
    images: Sequence[str],
) -> Probe:
    """Fit a logistic regression on scaled states; scale and mean become part of the probe.

    Args:
        states: [n, C].
        labels: [n] of 0 and 1.
        images: Image of each question; a fold of the cross-validation has whole images.
    """
    wide = states.astype(np.float64)
    mean, scale = wide.mean(0), wide.std(0)
    scale = np.maximum(scale, NARROWEST * max(float(np.median(scale)), 1e-12))
    scaled = (wide - mean) / scale
    model = LogisticRegression(class_weight="balanced", max_iter=2000)
    with_label = [
        len({i for i, one in zip(images, labels, strict=True) if one == k}) for k in (0, 1)
    ]
    folds = min(FOLDS, *with_label)
    if folds > 1:
        split = StratifiedGroupKFold(folds)
        search = GridSearchCV(model, {"C": REGULARISATION}, cv=split, scoring="roc_auc")
        model = search.fit(scaled, labels, groups=images).best_estimator_
    else:
        model = model.fit(scaled, labels)
    weight = model.coef_[0] / scale
    return Probe(weight.astype(np.float32), float(model.intercept_[0] - weight @ mean))


def curve(
    probability: Float[np.ndarray, " questions"], labels: Int[np.ndarray, " questions"]
) -> list[dict[str, float]]:
    """Compute the agreement over the share of skipped questions, those of lowest probability.

    Args:
        probability: [n] of the gate.
        labels: [n] of 0 and 1.

    Returns:
        Points of the curve, see `Report.curve`.
    """
    order = np.argsort(probability, kind="stable")
    points = []
    for share in SHARES:
        skipped = round(share * len(order))
        missed = int(labels[order[:skipped]].sum())
        points.append(
            {
                "skipped": skipped / len(order),
                "threshold": float(probability[order[skipped]]),
                "agreement": 1 - missed / len(order),
            }
        )
    return points


def _counts(samples: Sequence[GateSample]) -> tuple[int, int]:
    ones = sum(s.label for s in samples)
    return len(samples) - ones, ones


def _check_counts(
    counts: tuple[int, int], least: int, where: str, ignored: Mapping[str, int]
) -> None:
    if min(counts) >= least:
        return
    scarce = 1 if counts[1] < counts[0] else 0
    kinds = ("on which a zoom changes nothing", "about details that the first look cannot show")
    rest = ", ".join(f"{reason}: {n}" for reason, n in Counter(ignored).most_common())
    raise ValueError(
        f"too few labels {scarce}{where}: {counts[scarce]}, and {counts[1 - scarce]} labels "
        f"{1 - scarce} (ignored: {rest or 'none'}); a gate needs {least} of each: add questions "
        f"{kinds[scarce]}, which are asked when the same command starts again, or use another "
        "--rule or --held-out"
    )
