"""Published settings of SD-RPN on Qwen2.5-VL: branches, heads, thresholds, training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sdrpn.config import LabelConfig, LayerHeads

CELL_PIXELS = 28 * 28
"""Pixels of an image token."""

PIXELS = 576 * CELL_PIXELS
"""Minimum and maximum size of a resized image: about 576 tokens, exactly 576 for a square."""

PREPROCESSING: Mapping[str, Any] = MappingProxyType(
    {"min_pixels": PIXELS, "max_pixels": PIXELS, "square": True}
)
"""Preprocessing of images in labelling and training."""

THRESHOLD = 0.1
"""Threshold of most published runs; the others are in `Size.thresholds`."""

DEPTH = 3
BRANCH_SHARE = 4 / 7
"""Share of the layers below the RPN in unpublished sizes (ours): 3B has 21 of 36, 7B 16 of 28."""

TRAINING: Mapping[str, Any] = MappingProxyType(
    {"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999}
)
GLOBAL_BATCH = 128


@dataclass(frozen=True)
class HighResolution:
    """A published run with more tokens.

    Args:
        threshold: On the blurred map.
        least: Minimum number of image tokens.
        most: Maximum number of image tokens.
    """

    threshold: float
    least: int
    most: int


@dataclass(frozen=True)
class Size:
    """Published settings of one model size.

    Args:
        base: Hub id of the base model.
        hidden_size: Width of the language model; with `layers` it identifies the size.
        layers: Number of decoder layers.
        branch_layer: The branch layer B.
        labels: Label rules, with the grounding heads of natural images (GQA) and of images of text
            (OCR-VQA).
        thresholds: Thresholds on the blurred map with 576 tokens, by benchmark.
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
"""Instruction that replaces that of a short answer when natural images are labelled."""

Heads = Mapping[int, tuple[int, ...]]


def label_rules(
    grounding: Heads, sink: Heads, text_grounding: Heads, vicrop_layer: int
) -> LabelConfig:
    """The family's published label rules, with the heads of a model by layer."""

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
        # ViCrop's layer is unpublished: at the relative depth of LLaVA-1.5's, as for 7B.
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
    """The published size with these dimensions; None for other models."""
    for size in SIZES:
        if size.hidden_size == hidden_size and layers in (None, size.layers):
            return size
    return None


def branch_layer(hidden_size: int, layers: int) -> int:
    """The branch layer B of a model: published, or else at the same relative depth."""
    size = size_of(hidden_size, layers)
    return size.branch_layer if size else max(round(layers * BRANCH_SHARE), 1)
