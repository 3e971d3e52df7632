"""What the throughput benchmark measures of a family: its systems and their formulas' inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from benchmarks.flops import Load, Sizes, Work
from benchmarks.flops_qwen import QwenSizes
from benchmarks.shapes_qwen import FIRST_TOKENS, with_tokens
from benchmarks.systems import (
    System,
    all_systems,
    engine_system,
    force_region,
    generation_of,
    middle_box,
    preset_zoom,
    stock,
    two_pass,
)
from benchmarks.workload import describe_shape
from sdrpn.backbones.base import Backbone
from sdrpn.backbones.llava15 import Llava15
from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.boxes import GridBox
from sdrpn.config import published_labels
from sdrpn.engine import ZoomModel
from sdrpn.roi.vicrop import NEUTRAL_QUESTION
from sdrpn.rpn.checkpoint import RPN

STOCK_TOKENS = (4096, 1024, FIRST_TOKENS)
"""Tokens per image of the stock Qwen2.5-VL; the others are compared with the first."""


@dataclass(frozen=True)
class Setup:
    """A model and its systems.

    Args:
        backbone: As sdrpn uses it.
        shape: Its sizes, for the JSON.
        systems: The systems to time.
        work: From questions per image, tokens of a question after the image, a system and its crop
            tokens per question to what the formulas need.
    """

    backbone: Backbone
    shape: dict[str, Any]
    systems: Sequence[System]
    work: Callable[[float, int, System, float], Work]


def llava_setup(
    llava: Llava15, rpn: RPN, *, cells: int, new_tokens: int, vicrop_batched: bool
) -> Setup:
    """Build the systems of LLaVA-1.5. cells: side of the region."""
    box, sizes = middle_box(llava.grid, cells), Sizes.of(llava, rpn.config)
    neutral = len(llava.prompt_ids(NEUTRAL_QUESTION).after)
    labels = published_labels(llava.num_layers, llava.text_config.hidden_size)
    layer = labels.vicrop_layer if labels else round(llava.num_layers * 14 / 32)

    def work(per_image: float, words: int, system: System, crop: float) -> Work:
        sure = int(system.preset or 0) / 100 if system.name == "gated" else 0.0
        zoom = preset_zoom(system.preset or "")
        kept = zoom.keep_tokens if system.name == "sdrpn" else None
        each = round(crop / (1 - sure))
        return sizes, Load(per_image, words, each, new_tokens, neutral, layer, 1, kept, sure)

    return Setup(
        llava,
        describe_shape(llava, rpn, llava.image_tokens) | {"side_pixels": llava.side},
        all_systems(llava, rpn, box, new_tokens, vicrop_batched=vicrop_batched),
        work,
    )


def qwen_setup(
    qwen: Qwen25VL,
    rpn: RPN,
    *,
    cells: int,
    new_tokens: int,
    image_size: tuple[int, int],
    stock_tokens: Sequence[int] = STOCK_TOKENS,
) -> Setup:
    """Build the systems of Qwen2.5-VL.

    Args:
        qwen: With the pixel limits of sdrpn's first look and crop.
        rpn: Its RPN.
        cells: Side of the region, in cells of the first look.
        new_tokens: New tokens per answer.
        image_size: (width, height) of every image.
        stock_tokens: Tokens per image of the stock models; the first is the reference.
    """
    first = qwen.image_rules.grid(image_size)
    box = middle_box(first.rows, cells, first.columns)
    columns, rows = qwen.image_rules.crop_cells(first.to_pixels(box))
    stocks = {tokens: with_tokens(qwen, tokens) for tokens in stock_tokens}

    def sizes_of(backbone: Qwen25VL) -> QwenSizes:
        grid = backbone.image_grid(Image.new("RGB", image_size))
        return QwenSizes.of_config(
            qwen.model.config,
            head_tokens=len(qwen.head_ids),
            branch_layer=rpn.config.branch_layer,
            depth=rpn.config.depth,
            grid=(grid.rows, grid.columns),
            crop_grid=(rows, columns),
        )

    presets = dict(zip([None, *map(str, stock_tokens[1:])], stocks.values(), strict=True))
    sizes = {("stock", preset): sizes_of(model) for preset, model in presets.items()}
    own = sizes_of(qwen)

    def work(per_image: float, words: int, system: System, crop: float) -> Work:
        load = Load(per_image, words, round(crop), new_tokens)
        return sizes.get((system.name, system.preset), own), load

    shape = describe_shape(qwen, rpn, first.cells) | {"stock_image_tokens": list(stock_tokens)}
    return Setup(qwen, shape, _qwen_systems(qwen, rpn, box, presets, new_tokens), work)


def _qwen_systems(
    qwen: Qwen25VL,
    rpn: RPN,
    box: GridBox,
    stocks: dict[str | None, Qwen25VL],
    new_tokens: int,
) -> list[System]:
    said, zoom = generation_of(new_tokens), qwen.default_zoom
    rpn = rpn.attach(qwen).eval().requires_grad_(False)
    ours = force_region(ZoomModel(qwen, rpn, zoom=zoom), box)
    return [
        *[stock(model, said, preset) for preset, model in stocks.items()],
        engine_system(ZoomModel(qwen, proposer="none"), "none", None, said),
        two_pass(qwen, rpn, box, zoom, said),
        engine_system(ours, "sdrpn", "paper", said),
    ]
