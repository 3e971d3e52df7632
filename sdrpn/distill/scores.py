"""Score how well attention maps point, select heads and find sinks, on plain arrays.

Shapes: L layers, H heads or maps, T image tokens of a grid in row-major order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdrpn.config import LabelConfig
from sdrpn.distill.pseudo_labels import FOREGROUND, pseudo_labels
from sdrpn.roi.sinks import remove_sinks

SINK_FACTOR = 5.0
"""A sink has at least this multiple of the mean attention of image tokens, for every question."""
SINK_MARGIN = 2.0
"""A sink has at least this multiple of the attention on the object that is asked about."""
SMALLEST_GAIN = 0.005
"""Minimum gain in IoU of an added head. It must also exceed twice its standard error, since the
best of many candidates always shows some gain."""


@dataclass(frozen=True)
class Targets:
    """Where the model should look for one question.

    Args:
        inside: bool [T], cells that the object covers.
        box: [T], share of each cell that the bounding box of the object covers.
        objects: bool [T], cells that any object of the image covers.
        image: Index of the image.
        shape: (rows, columns) of the grid.
    """

    inside: np.ndarray
    box: np.ndarray
    objects: np.ndarray
    image: int
    shape: tuple[int, int]


def score_maps(
    maps: np.ndarray, sink: np.ndarray, target: Targets, config: LabelConfig
) -> np.ndarray:
    """Score the attention maps of one question.

    Args:
        maps: [H, T] attention maps.
        sink: [T] sink map.
        target: Where the maps should point.
        config: Label thresholds.

    Returns:
        [H, 4], columns as in `METRICS`. mass: share of the attention inside the object, without
        sinks. hits: 1 if the maximum is inside. iou: of the pseudo-labels' foreground with the true
        box, in area; 0 without labels. kept: 1 if the map gives labels.
    """
    clean = remove_sinks(maps, sink, config.sink_threshold)
    total = clean.sum(1)
    some = total > 0
    mass = np.where(some, clean[:, target.inside].sum(1) / np.where(some, total, 1), 0)
    hit = target.inside[clean.argmax(1)] & some
    shape = target.shape
    labels = [pseudo_labels(m.reshape(shape), sink.reshape(shape), config) for m in maps]
    foregrounds = np.array([one.ravel() == FOREGROUND for one in labels])
    kept = foregrounds.any(1)
    return np.stack([mass, hit, iou(foregrounds, target.box), kept], axis=1)


METRICS = ("mass", "hits", "iou", "kept")


def iou(foreground: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union, in area, of cells (bool [..., T]) and a box (cell shares [T])."""
    both = (foreground * box).sum(-1)
    return both / (foreground.sum(-1) + box.sum() - both)


def rank_heads(ious: np.ndarray, masses: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Return the `count` best (layer, head) of [L, H] scores, by IoU and then by mass."""
    order = np.lexsort((-masses.ravel(), -ious.ravel()))[:count]
    return [(int(i) // ious.shape[1], int(i) % ious.shape[1]) for i in order]


def join_heads(
    maps: Sequence[np.ndarray],
    sinks: Sequence[np.ndarray],
    targets: Sequence[Targets],
    config: LabelConfig,
    *,
    max_heads: int = 7,
) -> list[tuple[int, float]]:
    """Select heads by greedy forward selection on the IoU of their mean map.

    Args:
        maps: [H, T] per question; head 0 is the best single one and is always selected.
        sinks: [T] per question.
        targets: Where the maps should point.
        config: Label thresholds.
        max_heads: Maximum number of heads. Selection also ends when the gain is too small, see
            `SMALLEST_GAIN`.

    Returns:
        (head, IoU of the combination up to it) in the order of selection.
    """

    def combined_iou(heads: list[int]) -> np.ndarray:
        means = [own[heads].mean(0, keepdims=True) for own in maps]
        rows = zip(means, sinks, targets, strict=True)
        return np.array([score_maps(*row, config)[0, 2] for row in rows])

    before = combined_iou([0])
    selected = [(0, float(before.mean()))]
    while len(selected) < min(max_heads, len(maps[0])):
        heads = [head for head, _ in selected]
        others = [head for head in range(len(maps[0])) if head not in heads]
        tried = {head: combined_iou([*heads, head]) for head in others}
        best = max(tried, key=lambda head: tried[head].mean())
        gains = tried[best] - before
        if gains.mean() < max(SMALLEST_GAIN, 2 * gains.std() / len(gains) ** 0.5):
            break
        before = tried[best]
        selected.append((best, float(before.mean())))
    return selected


@dataclass(frozen=True)
class Sinks:
    """Image tokens that attract attention whatever is asked.

    Args:
        layer: Layer whose mean over heads is the sink map; None if the model has no sinks.
        threshold: Minimum value of a sink in that map; 1.0 without sinks.
        per_image: Mean number of sinks per image.
        why: The finding in one sentence.
    """

    layer: int | None
    threshold: float
    per_image: float
    why: str


def find_sinks(means: Sequence[np.ndarray], targets: Sequence[Targets]) -> Sinks:
    """Find the layer whose sinks stand out most, and a threshold that separates them from objects.

    A sink is covered by no object and has `SINK_FACTOR` times the mean attention for every question
    on its image. A layer qualifies if half of its images have sinks, and if the 5 % quantile of
    their attention is `SINK_MARGIN` times the 95 % quantile of the peak on the object asked about.
    The threshold is the geometric mean of these two quantiles.

    Args:
        means: [L, T] per question, the mean over the heads of each layer.
        targets: Where the model should look, per question.
    """
    best, found = 0.0, Sinks(None, 1.0, 0.0, "no layer has tokens that all questions look at")
    for layer in range(len(means[0])):
        rows = [own[layer] for own in means]
        low, per_image = _sink_level(rows, targets)
        asked = [row[t.inside].max() for row, t in zip(rows, targets, strict=True)]
        high = float(np.quantile(asked, 0.95))
        if low > max(best, SINK_MARGIN) * high:
            best, threshold = low / high, float(f"{(low * high) ** 0.5:.2g}")
            why = (
                f"in layer {layer}, {per_image:.1f} tokens per image have an attention of "
                f"{low:.2g} or more whatever is asked, and objects asked about at most {high:.2g}"
            )
            found = Sinks(layer, threshold, per_image, why)
    return found


def _sink_level(rows: Sequence[np.ndarray], targets: Sequence[Targets]) -> tuple[float, float]:
    """(5 % quantile of the attention on the sinks of a layer, sinks per image), or zeros.

    rows: [T] per question.
    """
    of_image: dict[int, list[np.ndarray]] = {}
    for row, target in zip(rows, targets, strict=True):
        of_image.setdefault(target.image, []).append(row)
    objects = {target.image: target.objects for target in targets}
    taken, counts = [], []
    for image in sorted(of_image):
        some = np.stack(of_image[image])
        if len(some) < 2:  # sinks are common to several questions
            continue
        average = some.mean(1, keepdims=True)
        always = (some >= SINK_FACTOR * average).all(0) & (average > 0).all()
        sink = always & ~objects[image]
        counts.append(sink.sum())
        taken.append(some[:, sink].ravel())
    if not counts or np.mean(np.array(counts) > 0) < 0.5:
        return 0.0, 0.0
    return float(np.quantile(np.concatenate(taken), 0.05)), float(np.mean(counts))


def choose_branch_layer(best: int, layers: int, depth: int) -> tuple[int, str]:
    """Choose the layer that an RPN branches off from: just above the best pointing head.

    For LLaVA-1.5-7B, whose pointing heads are in layer 14, this is 15.

    Args:
        best: Layer of the best pointing head.
        layers: Layers of the backbone.
        depth: Layers of the RPN, which are copied from those above the branch.

    Returns:
        (branch layer, the reason in one sentence).

    Raises:
        ValueError: If the backbone has too few layers.
    """
    if depth >= layers:
        raise ValueError(f"an RPN of depth {depth} needs more than {layers} backbone layers")
    branch = min(best + 1, layers - depth)
    reason = f"B = {branch}: just above the best pointing head, which is in layer {best}"
    if branch != best + 1:
        reason = (
            f"B = {branch}: the best pointing head is in layer {best}, but R = {depth} of the "
            f"{layers} layers must be left to copy"
        )
    return branch, reason
