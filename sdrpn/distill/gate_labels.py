"""Labels of the learned gate: does a zoom change the answer for the better? Without annotation.

The labels compare answers of the frozen model to views of the same question: a shrunk image, the
image (`stock`), and two zooms. Functions of answers, losses and arrays, without a model.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image

from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import PEAK, ZoomConfig

T = TypeVar("T")

RULES = ("consensus", "agreement")
CONTROLS = 2
"""Number of control crops."""
MAX_GAIN = 5.0
"""Log-odds gains are clipped to this (Vision-RL2)."""
LOWEST_PROBABILITY = 1e-6
WIDER_THAN_PEAK = 0.05
"""Threshold of the second zoom if that of the first is `peak`."""

NO_REGION = "no region"
NO_ANSWER = "empty answer"
NO_CONTROL = "no room for a control crop"
UNSTABLE = "the two zooms disagree"
NOT_MONOTONE = "right on the shrunk image, wrong on the image"


@dataclass(frozen=True)
class GateConfig:
    """How questions are labelled for the learned gate (docs/train.md).

    Args:
        rule: `consensus` or `agreement`.
        thresholds: `ZoomConfig.threshold` of the zoom and of the second zoom; None for the RPN's
            own, and half of it.
        kappa: With `consensus`, the zoom has to raise the log-odds of its answer by more than this
            times what a control crop does.
    """

    rule: str = "consensus"
    thresholds: tuple[float | str, float | str] | None = None
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not 0 <= self.kappa < math.inf:
            raise ValueError(f"kappa must be 0 or more, got {self.kappa}")
        for threshold in self.thresholds or ():
            ZoomConfig(threshold=threshold)
        if self.thresholds and self.thresholds[0] == self.thresholds[1]:
            raise ValueError(f"thresholds must differ, got {self.thresholds[0]} twice")

    def thresholds_for(self, zoom: ZoomConfig) -> tuple[float | str, float | str]:
        """Return the thresholds of both zooms; by default those of an RPN's zoom settings."""
        if self.thresholds is not None:
            return self.thresholds
        first = zoom.threshold
        return first, WIDER_THAN_PEAK if isinstance(first, str) else first / 2

    @classmethod
    def from_text(cls, rule: str, thresholds: str, kappa: float) -> GateConfig:
        """Parse command-line options.

        Args:
            rule: See the class.
            thresholds: Two thresholds, such as `0.15,0.075`; empty for the default.
            kappa: See the class.

        Raises:
            ValueError: If an option is invalid.
        """
        if not thresholds:
            return cls(rule, None, kappa)
        parts = [part.strip() for part in thresholds.split(",")]
        try:
            first, second = (p if p == PEAK else float(p) for p in parts)
        except ValueError:
            raise ValueError(
                f"thresholds must be two, such as 0.15,0.075, got {thresholds!r}"
            ) from None
        return cls(rule, (first, second), kappa)


@dataclass(frozen=True)
class Losses:
    """Mean losses of the zoomed answer under several views, in nats per token.

    Args:
        stock: Without a crop.
        zoom: With the region's crop.
        controls: With each of the control crops.
    """

    stock: float
    zoom: float
    controls: tuple[float, ...]


@dataclass(frozen=True)
class Views:
    """What the model answered about one question.

    Args:
        zoom: The answer with a zoom; None without a region.
        stock: The answer without a zoom.
        second_zoom: The answer with a zoom at the second threshold.
        shrunk: The answer without a zoom about the image at half of the model's resolution.
        confidence: Smallest probability of a token of `stock`.
        losses: Losses of `zoom`.
        reason: Why the question has no label, if the views cannot tell.
    """

    zoom: str | None = None
    stock: str | None = None
    second_zoom: str | None = None
    shrunk: str | None = None
    confidence: float | None = None
    losses: Losses | None = None
    reason: str | None = None


def label(views: Views, config: GateConfig) -> tuple[int | None, str | None]:
    """Label one question.

    Args:
        views: Answers of the frozen model; `agreement` needs `zoom` and `stock` only.
        config: The rule.

    Returns:
        (1, None) if a zoom helps, (0, None) if it does not, (None, reason) for an ignored question.

    Raises:
        ValueError: If a view that the rule needs is missing.
    """
    if views.reason is not None:
        return None, views.reason
    zoom, stock = _given(views.zoom, "zoom"), _given(views.stock, "stock")
    agrees = same_answer(stock, zoom)
    if config.rule == "agreement":
        return int(not agrees), None
    if not same_answer(zoom, _given(views.second_zoom, "second_zoom")):
        return None, UNSTABLE
    if agrees:
        return 0, None
    if same_answer(_given(views.shrunk, "shrunk"), zoom):
        return None, NOT_MONOTONE
    return int(beats_controls(_given(views.losses, "losses"), config.kappa)), None


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"{name} is missing")
    return value


def needs_ladder(views: Views) -> bool:
    """Whether `consensus` needs the shrunk image and control crops for this question."""
    if views.zoom is None or views.stock is None or views.second_zoom is None:
        return False
    stable = same_answer(views.zoom, views.second_zoom)
    return stable and not same_answer(views.stock, views.zoom)


def words(answer: str) -> list[str]:
    """Normalise an answer: lower-case words without ASCII punctuation.

    Marks between two digits stay, except for commas: 3.5 is not 35, and 1,000 is 1000.
    """
    text = answer.lower().strip()
    kept = [
        mark
        for before, mark, after in zip(f" {text}", text, f"{text[1:]} ", strict=False)
        if mark not in string.punctuation or (mark != "," and before.isdigit() and after.isdigit())
    ]
    return "".join(kept).split()


def same_answer(first: str, second: str) -> bool:
    """Whether the words of one answer stand, in a row, in the other.

    "1" does not match "10", and an empty answer only matches an empty one.
    """
    short, long = sorted((words(first), words(second)), key=len)
    if not short:
        return not long
    starts = range(len(long) - len(short) + 1)
    return any(long[start : start + len(short)] == short for start in starts)


def log_odds(loss: float) -> float:
    """Convert a mean loss in nats per token to log-odds of the tokens' mean probability."""
    probability = math.exp(-loss)
    probability = min(max(probability, LOWEST_PROBABILITY), 1 - LOWEST_PROBABILITY)
    return math.log(probability / (1 - probability))


def gain(loss: float, stock: float) -> float:
    """Compute the clipped gain in log-odds of a view over the stock model's."""
    return min(max(log_odds(loss) - log_odds(stock), -MAX_GAIN), MAX_GAIN)


def beats_controls(losses: Losses, kappa: float) -> bool:
    """Whether the zoom raises the log-odds of its answer by more than any control crop does.

    Args:
        losses: Losses of the zoomed answer.
        kappa: See `GateConfig`.
    """
    controls = [gain(loss, losses.stock) for loss in losses.controls]
    return gain(losses.zoom, losses.stock) > kappa * max(0.0, *controls)


def shrunk(image: Image.Image, grid: ImageGrid) -> Image.Image:
    """Shrink an image to half of the resolution at which the model sees it.

    Args:
        image: The image.
        grid: Mapping from its tokens to its pixels.

    Returns:
        The shrunk image; the image itself if the model enlarges it to twice its size or more.
    """
    scales = [min(float(scale) / 2, 1.0) for scale in grid.scale]
    width, height = (max(round(n * s), 1) for n, s in zip(image.size, scales, strict=True))
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def control_boxes(
    roi_map: Float[np.ndarray, "rows columns"],
    grid: ImageGrid,
    regions: Sequence[PixelBox],
    count: int = CONTROLS,
) -> list[PixelBox]:
    """Place boxes where the map is lowest, of the size of the largest region.

    Boxes overlap neither regions nor each other, and show as much of the image as the region.

    Args:
        roi_map: [rows, columns], blurred.
        grid: Mapping from cells to source pixels.
        regions: Regions in source pixels, at least one.
        count: Maximum number of boxes.

    Returns:
        Boxes in source pixels, the lowest first; empty if there is no room.
    """
    taken = [_nearest_cells(grid, box) for box in regions]
    largest = max(taken, key=lambda box: (box.x1 - box.x0) * (box.y1 - box.y0))
    height, width = largest.y1 - largest.y0, largest.x1 - largest.x0
    windows = _window_means(roi_map, height, width)
    inside = _window_means(grid.inside.astype(float), height, width)
    chosen = []
    for index in np.argsort(windows, axis=None, kind="stable"):
        y0, x0 = (int(edge) for edge in np.unravel_index(index, windows.shape))
        box = GridBox(x0, y0, x0 + width, y0 + height)
        visible = inside[y0, x0] >= inside[largest.y0, largest.x0] - 1e-9
        if visible and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            chosen.append(grid.to_pixels(box))
        if len(chosen) == count:
            break
    return chosen


def _nearest_cells(grid: ImageGrid, box: PixelBox) -> GridBox:
    """The cells of a box that was made of cells, whose edges were truncated to pixels."""

    def nearest(edge: int, axis: int) -> int:
        return round(float((edge * grid.scale[axis] + grid.offset[axis]) / grid.cell))

    x0, x1 = (min(max(nearest(edge, 0), 0), grid.columns) for edge in (box.x0, box.x1))
    y0, y1 = (min(max(nearest(edge, 1), 0), grid.rows) for edge in (box.y0, box.y1))
    x0, y0 = min(x0, grid.columns - 1), min(y0, grid.rows - 1)
    return GridBox(x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))


def _window_means(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """[rows - height + 1, columns - width + 1] means of all windows of a map."""
    windows = np.lib.stride_tricks.sliding_window_view(values, (height, width))
    return windows.mean(axis=(2, 3))


def _overlap(one: GridBox, other: GridBox) -> bool:
    across = one.x0 < other.x1 and other.x0 < one.x1
    return across and one.y0 < other.y1 and other.y0 < one.y1
