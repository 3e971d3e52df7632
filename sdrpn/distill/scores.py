"""How well attention points, which heads do it best, and which tokens are sinks: arrays, no model.

Shapes: n questions, L layers, H heads or maps, T image tokens of a grid, row-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdrpn.config import LabelConfig
from sdrpn.distill.pseudo_labels import FOREGROUND, pseudo_labels
from sdrpn.roi.sinks import remove_sinks

SINK_FACTOR = 5.0
"""A sink takes at least this many times the attention of an average image token, always."""
SINK_MARGIN = 2.0
"""A sink's attention is at least this many times what the cells of the asked object take."""
SMALLEST_GAIN = 0.005
"""A head joins the others if it adds at least this much IoU, and twice the gain's standard error:
of many candidates one always seems to help a little."""


@dataclass(frozen=True)
class Targets:
    """Where one question should make the model look.

    inside: bool [T], cells that the asked object covers. box: [T], the share of each cell that its
    bounding box covers. objects: bool [T], cells of any object of the image. image: its number.
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
    """Score the attention maps of one question: [H, 4], columns as in `MEASURES`.

    maps: [H, T]. sink: [T]. mass: share of the map that lies inside the object, sinks removed.
    hit: 1 where the maximum does. iou: of the pseudo-labels' foreground with the true box, in
    area; a map that gives no labels has 0. kept: 1 where there are labels.
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


MEASURES = ("mass", "hits", "iou", "kept")


def iou(foreground: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union, in area, of sets of cells (bool [..., T]) and a box (shares [T])."""
    both = (foreground * box).sum(-1)
    return both / (foreground.sum(-1) + box.sum() - both)


def ranked(ious: np.ndarray, masses: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The `count` best (layer, head) of [L, H] scores: by IoU, then by mass."""
    order = np.lexsort((-masses.ravel(), -ious.ravel()))[:count]
    return [(int(i) // ious.shape[1], int(i) % ious.shape[1]) for i in order]


def join_heads(
    maps: Sequence[np.ndarray],
    sinks: Sequence[np.ndarray],
    targets: Sequence[Targets],
    config: LabelConfig,
    *,
    most: int = 7,
) -> list[tuple[int, float]]:
    """Greedily join maps while the mean of them points better.

    maps: [H, T] of each of n questions, the first head the best on its own. sinks: [T] of each.
    Returns (map, IoU once it has joined) in the order of joining: the first, then whichever helps
    most, until the gain is too small (see `SMALLEST_GAIN`) or there are `most`.
    """

    def joint(chosen: list[int]) -> np.ndarray:
        together = [own[chosen].mean(0, keepdims=True) for own in maps]
        rows = zip(together, sinks, targets, strict=True)
        return np.array([score_maps(*row, config)[0, 2] for row in rows])

    before = joint([0])
    trail = [(0, float(before.mean()))]
    while len(trail) < min(most, len(maps[0])):
        chosen = [head for head, _ in trail]
        others = [head for head in range(len(maps[0])) if head not in chosen]
        tried = {head: joint([*chosen, head]) for head in others}
        best = max(tried, key=lambda head: tried[head].mean())
        gains = tried[best] - before
        if gains.mean() < max(SMALLEST_GAIN, 2 * gains.std() / len(gains) ** 0.5):
            break
        before = tried[best]
        trail.append((best, float(before.mean())))
    return trail


@dataclass(frozen=True)
class Sinks:
    """Image tokens that take attention whatever is asked; layer None: the model has none.

    threshold: on the mean over the heads of `layer`; 1.0 where there are none. per_image: how many
    there are on average. why: the finding in one sentence.
    """

    layer: int | None
    threshold: float
    per_image: float
    why: str


def find_sinks(means: Sequence[np.ndarray], targets: Sequence[Targets]) -> Sinks:
    """The layer whose sinks stand out most, and a threshold that tells them from what was asked.

    means: [L, T] of each of n questions, mean over the heads of each layer. A sink holds nothing
    that could be asked for (no object covers it) and takes `SINK_FACTOR` times an average token's
    attention under every question on its image. A layer counts if half of the images have sinks and
    if nearly all of those (95 %) take `SINK_MARGIN` times what the asked objects nearly always stay
    below. The threshold is the geometric mean of these two limits.
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
                f"in layer {layer} {per_image:.1f} tokens an image take {low:.2g} or more whatever "
                f"is asked, and what was asked for at most {high:.2g}"
            )
            found = Sinks(layer, threshold, per_image, why)
    return found


def _sink_level(rows: Sequence[np.ndarray], targets: Sequence[Targets]) -> tuple[float, float]:
    """What nearly all sinks of a layer take: (5 % quantile, sinks per image), or zeros.

    rows: [T] of each question.
    """
    of_image: dict[int, list[np.ndarray]] = {}
    for row, target in zip(rows, targets, strict=True):
        of_image.setdefault(target.image, []).append(row)
    objects = {target.image: target.objects for target in targets}
    taken, counts = [], []
    for image in sorted(of_image):
        some = np.stack(of_image[image])
        if len(some) < 2:  # one question cannot tell what all of them look at
            continue
        average = some.mean(1, keepdims=True)
        always = (some >= SINK_FACTOR * average).all(0) & (average > 0).all()
        sink = always & ~objects[image]
        counts.append(sink.sum())
        taken.append(some[:, sink].ravel())
    if not counts or np.mean(np.array(counts) > 0) < 0.5:
        return 0.0, 0.0
    return float(np.quantile(np.concatenate(taken), 0.05)), float(np.mean(counts))


def branch_layer(best: int, layers: int, depth: int) -> tuple[int, str]:
    """Where an RPN of `depth` should branch off, and the reason in one line.

    Just past the layer of the best pointing head: 15 for LLaVA-1.5-7B, whose heads lie in layer
    14. No deeper than leaves `depth` layers to copy. Raises ValueError where there are too few.
    """
    if depth >= layers:
        raise ValueError(f"an RPN of depth {depth} needs more than the {layers} layers there are")
    branch = min(best + 1, layers - depth)
    reason = f"B = {branch}: the best pointing head is in layer {best}, and B is just past it"
    if branch != best + 1:
        reason = (
            f"B = {branch}: the best pointing head is in layer {best}, but R = {depth} layers must "
            f"be left of {layers} to copy"
        )
    return branch, reason
