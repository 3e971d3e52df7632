"""What was published for SD-RPN on Qwen2.5-VL: branches, heads, thresholds, training settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sdrpn.config import LabelConfig, LayerHeads

CELL_PIXELS = 28 * 28
"""Pixels of an image token."""

PIXELS = 576 * CELL_PIXELS
"""Least and most pixels of a resized picture: about 576 tokens, or just as many of a square."""

PICTURES: Mapping[str, Any] = MappingProxyType(
    {"min_pixels": PIXELS, "max_pixels": PIXELS, "square": True}
)
"""How pictures are prepared for labels and in training."""

THRESHOLD = 0.1
"""Of most published runs; the others are in `Size.thresholds`."""

DEPTH = 3
BRANCH_SHARE = 4 / 7
"""Of the layers, below the RPN, where nothing is published (ours): 3B has 21 of 36, 7B 16 of 28."""

TRAINING: Mapping[str, Any] = MappingProxyType(
    {"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999}
)
GLOBAL_BATCH = 128


@dataclass(frozen=True)
class HighResolution:
    """A published run with more tokens: its threshold, and its limits in tokens."""

    threshold: float
    least: int
    most: int


@dataclass(frozen=True)
class Size:
    """What was published for one size.

    Args:
        base: Its Hub id.
        hidden_size: What it is told by, with `layers`.
        layers: Decoder layers.
        branch_layer: B.
        labels: Heads that point in natural pictures (GQA) and in pictures of text (OCR-VQA).
        thresholds: On the blurred map, by benchmark, with 576 tokens.
        high_resolution: Runs with more tokens, by benchmark.
    """

    base: str
    hidden_size: int
    layers: int
    branch_layer: int
    labels: LabelConfig
    thresholds: Mapping[str, float]
    high_resolution: Mapping[str, tuple[HighResolution, ...]]


ASK_FOR_BOXES = (
    "Output the grounding bounding box of Region of Interest for the question. IMPORTANT: The "
    "output MUST be raw text, one box per line. DO NOT use JSON. Follow this exact format: x_min "
    "y_min x_max y_max {detail_label}."
)
"""What labels of natural pictures ask for instead of a short answer."""

Heads = Mapping[int, tuple[int, ...]]


def label_rules(
    grounding: Heads, sink: Heads, text_grounding: Heads, vicrop_layer: int
) -> LabelConfig:
    """The published rules of the family, with a model's heads by layer."""

    def listed(heads: Heads) -> tuple[LayerHeads, ...]:
        return tuple(LayerHeads(layer, own) for layer, own in heads.items())

    return LabelConfig(
        grounding=listed(grounding),
        sink=listed(sink),
        text_grounding=listed(text_grounding),
        instead=ASK_FOR_BOXES,
        vicrop_layer=vicrop_layer,
        sink_threshold=1e-2,
        box_margin=1,
        padding_background=True,
        floor=5e-3,
        read_cut_end=False,
    )


def _thresholds(**other: float) -> Mapping[str, float]:
    names = ("textvqa", "infovqa", "chartqa", "ocrbench", "docvqa", "pope", "vstar")
    return MappingProxyType(dict.fromkeys(names, THRESHOLD) | other)


SIZES = (
    Size(
        base="Qwen/Qwen2.5-VL-3B-Instruct",
        hidden_size=2048,
        layers=36,
        branch_layer=21,
        # The baseline's layer at the depth that it reads LLaVA-1.5 at: ours, as for 7B.
        labels=label_rules(
            {21: (9, 11), 22: (0, 7)}, {8: (1, 13)}, {20: (1, 4), 22: (14,)}, vicrop_layer=16
        ),
        thresholds=_thresholds(textvqa=0.15, ocrbench=0.03, vstar=0.175, hrbench=THRESHOLD),
        high_resolution=MappingProxyType(
            {
                "vstar": (HighResolution(0.075, 1024, 4096),),
                "hrbench4k": (
                    HighResolution(0.125, 1024, 3072),
                    HighResolution(0.05, 1024, 4096),
                ),
                "hrbench8k": (HighResolution(0.05, 1024, 4096),),
            }
        ),
    ),
    Size(
        base="Qwen/Qwen2.5-VL-7B-Instruct",
        hidden_size=3584,
        layers=28,
        branch_layer=16,
        labels=label_rules(
            {16: (1, 7, 17), 19: (17, 20)},
            {9: (4, 22)},
            {22: (1, 4), 23: (6, 11)},
            vicrop_layer=12,
        ),
        thresholds=_thresholds(textvqa=0.075, ocrbench=0.05, vstar=0.075),
        high_resolution=MappingProxyType(
            {
                "vstar": (HighResolution(0.05, 576, 3072),),
                "hrbench": (HighResolution(0.03, 576, 4096),),
            }
        ),
    ),
)


def size_of(hidden_size: int, layers: int | None = None) -> Size | None:
    """The published size of these dimensions; None for any other shape."""
    for size in SIZES:
        if size.hidden_size == hidden_size and layers in (None, size.layers):
            return size
    return None


def branch_layer(hidden_size: int, layers: int) -> int:
    """B for a model of these dimensions: the published one, or one at the same depth."""
    size = size_of(hidden_size, layers)
    return size.branch_layer if size else max(round(layers * BRANCH_SHARE), 1)
