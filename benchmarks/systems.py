"""The systems to time, each a function from a batch of questions to answers.

The region is given, since random weights produce random maps and a fair comparison needs a crop of
the same size for every question. No work is skipped: the RPN (or ViCrop's attention) runs for every
question, and its map is blurred, thresholded and boxed as usual; only then is the box replaced. All
following steps (crop, encode, shrink to the budget, prefill, decode) run unchanged. Likewise for
the gate: every first answer is generated and its confidence computed, and only then replaced, so
that a given share of the answers stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from sdrpn.backbones.base import Backbone, Segment
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import GridBox, ImageGrid
from sdrpn.config import ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.decoder import run_layers
from sdrpn.inference.generation import generate, generate_plain
from sdrpn.inference.prefix import Prefix, batch_rows
from sdrpn.roi.crops import crop_tokens
from sdrpn.roi.postprocess import Region, blur, propose
from sdrpn.rpn.checkpoint import RPN
from sdrpn.second_look import Row
from sdrpn_eval.args import LlavaArguments

PRESETS = ("paper", "fast", "fastest")
GATED_PERCENT = (0, 25, 50, 75)
"""Shares of the first answers that stand."""

GATE = 0.9


@dataclass(frozen=True)
class Said:
    """An answer and its number of crop tokens."""

    text: str
    crop_tokens: int


@dataclass(frozen=True)
class System:
    """A row of the table.

    run: answers a batch. cool: empties the caches of images. largest_batch: 1 for systems that are
    measured as published.
    """

    name: str
    preset: str | None
    run: Callable[[Sequence[Question]], list[Said]]
    cool: Callable[[], None]
    largest_batch: int | None = None

    @property
    def label(self) -> str:
        """Name and preset, as the command line takes them."""
        return self.name if self.preset is None else f"{self.name}-{self.preset}"


def middle_box(grid: int, cells: int, columns: int | None = None) -> GridBox:
    """Return a box of cells x cells in the centre of a grid, of `grid` rows and, if not square,
    `columns`.
    """
    columns = columns or grid
    if not 1 <= cells <= min(grid, columns):
        raise ValueError(f"cells must be from 1 to the grid's {min(grid, columns)}, got {cells}")
    top, left = (grid - cells) // 2, (columns - cells) // 2
    return GridBox(left, top, left + cells, top + cells)


def region_of(box: GridBox, view: ImageGrid) -> Region:
    """Return the region of a box of cells, as a proposer would."""
    return Region((view.to_pixels(box),), (box,))


def force_region(engine: ZoomModel, box: GridBox) -> ZoomModel:
    """Run an engine's proposer as usual, but replace its boxes by this one."""
    stages = engine.second_look
    look = stages.look

    def given(rows: Sequence[Row]) -> None:
        look(rows)
        for row in rows:
            region = region_of(box, engine.backbone.image_grid(row.image))
            row.proposal = replace(row.proposal, region=region)

    stages.look = given  # type: ignore[method-assign]
    return engine


class ForcedGate:
    """Run an engine's gate as usual, but replace the confidence in its first answers.

    Args:
        engine: With `ZoomConfig.gate`.
        share: Share of the first answers that stand, evenly spread over the questions.
    """

    def __init__(self, engine: ZoomModel, share: float) -> None:
        self.share, self.seen = share, 0
        self._answer_first = engine.second_look.answer_first
        engine.second_look.answer_first = self._given  # type: ignore[method-assign]

    def _given(self, rows: Sequence[Row], generation: Mapping[str, Any]) -> None:
        self._answer_first(rows, generation)
        for row in rows:
            before, self.seen = self.seen, self.seen + 1
            row.confidence = float(int(self.seen * self.share) - int(before * self.share))

    def restart(self) -> None:
        """Start the count of questions anew."""
        self.seen = 0


def forget_images(engine: ZoomModel) -> None:
    """Empty the prefix cache of an engine."""
    engine.prefixes.clear()


def preset_zoom(preset: str) -> ZoomConfig:
    """Return the zoom settings of a preset; the threshold has no effect here."""
    values = dict(LlavaArguments.presets.get(preset, {"policy": "mask"}))
    known = {f.name for f in fields(ZoomConfig)}
    return ZoomConfig(**{name: value for name, value in values.items() if name in known})


def generation_of(new_tokens: int) -> dict[str, Any]:
    """Return settings for greedy decoding of a fixed number of tokens, ignoring the end token."""
    return {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}


def engine_system(
    engine: ZoomModel,
    name: str,
    preset: str | None,
    generation: Mapping[str, Any],
    largest_batch: int | None = None,
) -> System:

    def run(batch: Sequence[Question]) -> list[Said]:
        answers = engine.ask_batch(batch, generation)
        return [Said(a.text, a.crop_tokens) for a in answers]

    return System(name, preset, run, lambda: forget_images(engine), largest_batch)


def zooming_engine(llava: Llava15, rpn: RPN, box: GridBox, preset: str) -> ZoomModel:
    """sdrpn with the settings of a preset and a given region."""
    return force_region(ZoomModel(llava, rpn, zoom=preset_zoom(preset)), box)


def gated_system(
    llava: Llava15, rpn: RPN, box: GridBox, percent: int, generation: Mapping[str, Any]
) -> System:
    """sdrpn with preset fast and the gate, whose first answers stand for a share of questions."""
    zoom = replace(preset_zoom("fast"), gate=GATE)
    engine = force_region(ZoomModel(llava, rpn, zoom=zoom), box)
    gate = ForcedGate(engine, percent / 100)
    system = engine_system(engine, "gated", str(percent), generation)

    def cool() -> None:
        system.cool()
        gate.restart()

    return replace(system, cool=cool)


def stock(backbone: Backbone, generation: Mapping[str, Any], preset: str | None = None) -> System:
    """transformers: the full prompt and the pixels of each row, left-padded.

    At batch size 1 the same as lmms-eval's own models; `generate_plain` only builds the inputs (the
    pixels and prompt of all systems here) and calls the model's generate(). preset: what sets it
    apart from the stock that others are compared with.
    """

    def run(batch: Sequence[Question]) -> list[Said]:
        prompts = [backbone.plain_ids(q.text, 1) for q in batch]
        images = [q.images[0] for q in batch]
        ids = generate_plain(backbone, prompts, images, generation)
        return _said(backbone, ids, [0] * len(batch))

    return System("stock", preset, run, lambda: None)


def two_pass(
    backbone: Backbone, rpn: RPN, box: GridBox, zoom: ZoomConfig, generation: Mapping[str, Any]
) -> System:
    """The published implementation: the map from the full prompt, then a second pass with the crop.

    The vision tower runs once for both passes, which favours this system.
    """
    empty = Prefix((), (), None, (), slice(0, 0), 0)

    @torch.no_grad()
    def answer(question: Question) -> Said:
        image, words = question.images[0], backbone.prompt_ids(question.text).after
        (ready,) = backbone.preprocess([image])
        before = backbone.prefix_segment(ready, backbone.encode([ready])[0])
        after = backbone.suffix_segment(before.next_position, words)
        roi_map = _map_of_prompt(backbone, rpn, before, after, ready.grid)
        propose(blur(roi_map), ready.grid, zoom, backbone.map_rules)
        region, room = region_of(box, ready.grid), backbone.context_length
        (crops,) = crop_tokens(backbone, [image], [region], [zoom], [room])
        inserted = sum(len(crop.tokens) for crop in crops)
        assert inserted
        zoomed = backbone.suffix_segment(before.next_position, words, crops)
        ids = generate(backbone, [empty], [before.followed_by(zoomed)], generation)
        return _said(backbone, ids, [inserted])[0]

    def run(batch: Sequence[Question]) -> list[Said]:
        return [answer(question) for question in batch]

    return System("two_pass", "paper", run, lambda: None, largest_batch=1)


def _map_of_prompt(
    backbone: Backbone, rpn: RPN, before: Segment, after: Segment, grid: ImageGrid
) -> np.ndarray:
    """Compute the RPN's map, [rows, columns], in one pass over the full prompt."""
    batch = batch_rows([before.followed_by(after)], [0])
    inputs = batch.attention(backbone)
    branch = run_layers(backbone.layers[: rpn.branch_layer], batch.embeds, inputs)
    states, (cos, sin) = rpn(branch, inputs), inputs.rotary
    keys = rpn.image_keys(states[:, before.image], (cos[:, before.image], sin[:, before.image]))
    logits = rpn.roi_logits(states[:, -1], (cos[:, -1:], sin[:, -1:]), keys)[0]
    return torch.sigmoid(logits).cpu().numpy().reshape(grid.rows, grid.columns)


def _said(backbone: Backbone, ids: Sequence[Sequence[int]], crops: Sequence[int]) -> list[Said]:
    texts = [backbone.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
    return [Said(text, crop) for text, crop in zip(texts, crops, strict=True)]


def all_systems(
    llava: Llava15, rpn: RPN, box: GridBox, new_tokens: int, *, vicrop_batched: bool = False
) -> list[System]:
    """Build all systems over the same weights, with a fixed number of new tokens.

    vicrop_batched: measure ViCrop at every batch size, not only at 1. Its search always finds a
    box, so none is given; it uses our prefix, which makes it faster than its published code, and
    inserts all 576 crop tokens.
    """
    said = generation_of(new_tokens)
    rpn = rpn.attach(llava).eval().requires_grad_(False)
    return [
        stock(llava, said),
        engine_system(ZoomModel(llava, proposer="none"), "none", None, said),
        two_pass(llava, rpn, box, preset_zoom("paper"), said),
        *[
            engine_system(zooming_engine(llava, rpn, box, preset), "sdrpn", preset, said)
            for preset in PRESETS
        ],
        *[gated_system(llava, rpn, box, percent, said) for percent in GATED_PERCENT],
        engine_system(
            ZoomModel(llava, proposer="vicrop", zoom=preset_zoom("paper")),
            "vicrop",
            None,
            said,
            None if vicrop_batched else 1,
        ),
    ]
