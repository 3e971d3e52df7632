"""The systems that are timed, each a function from a batch of questions to its answers.

The region is forced: random weights draw random maps, and a fair comparison needs a crop, of the
same size, on every question. Nothing is left out for it. The RPN (or ViCrop's attention) runs on
every question, its map is blurred, cut and boxed as ever; only then is the box exchanged. All that
follows (cut the original, encode, shrink to the budget, prefill, decode) runs as it is shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import GridBox, ImageGrid
from sdrpn.config import ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.decoder import run_layers
from sdrpn.inference.generation import generate_plain, generation_arguments
from sdrpn.inference.prefix import batch_rows
from sdrpn.roi.crops import crop_tokens
from sdrpn.roi.postprocess import Region, blur, propose
from sdrpn.roi.proposers import Proposal
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.args import LlavaArguments


@dataclass(frozen=True)
class Said:
    """An answer: its text and how many crop tokens stood before its question."""

    text: str
    crop_tokens: int


@dataclass(frozen=True)
class System:
    """One row of the table.

    run: answers a batch. cool: forgets every image it has read. largest_batch: 1 for systems that
    are shown as they are published.
    """

    name: str
    preset: str | None
    run: Callable[[Sequence[Question]], list[Said]]
    cool: Callable[[], None]
    largest_batch: int | None = None


def middle_box(grid: int, cells: int) -> GridBox:
    """A box of cells x cells in the middle of the grid."""
    if not 1 <= cells <= grid:
        raise ValueError(f"cells must be from 1 to the grid's {grid}, got {cells}")
    low = (grid - cells) // 2
    return GridBox(low, low, low + cells, low + cells)


def region_of(box: GridBox, view: ImageGrid) -> Region:
    """The region a proposer would give for this box of cells."""
    return Region((view.to_pixels(box),), (box,))


def force_region(engine: ZoomModel, box: GridBox) -> ZoomModel:
    """Let an engine's proposer work as ever, and put this box in place of what it found."""
    ask = engine.look

    def look(questions: Sequence[Question], *rest: Any) -> list[Proposal]:
        found = ask(questions, *rest)
        views = [engine.backbone.image_grid(q.images[0]) for q in questions]
        pairs = zip(found, views, strict=True)
        return [replace(one, region=region_of(box, view)) for one, view in pairs]

    engine.look = look  # type: ignore[method-assign]
    return engine


def forget_images(engine: ZoomModel) -> None:
    """Empty the engine's cache of images."""
    engine.prefixes.clear()


def preset_zoom(preset: str) -> ZoomConfig:
    """The zoom settings of one of the plugin's presets; the threshold plays no part here."""
    values = dict(LlavaArguments.presets.get(preset, {"policy": "mask"}))
    known = {f.name for f in fields(ZoomConfig)}
    return ZoomConfig(**{name: value for name, value in values.items() if name in known})


def generation_of(new_tokens: int) -> dict[str, Any]:
    """Greedy, exactly so many new tokens: an end token cannot end an answer early."""
    return {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}


def _engine_system(
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
    """Ours, with the settings of a preset and a forced region."""
    return force_region(ZoomModel(llava, rpn, zoom=preset_zoom(preset)), box)


def stock(llava: Llava15, generation: Mapping[str, Any]) -> System:
    """transformers' own way: the whole prompt and the pixels of each row, padded on the left.

    At batch size 1 what lmms-eval's llava_hf does; `generate_plain` makes the inputs (the pixels
    and the prompt of all systems here) and calls the model's generate(), nothing else.
    """

    def run(batch: Sequence[Question]) -> list[Said]:
        prompts = [llava.plain_ids(q.text) for q in batch]
        images = [q.images[0] for q in batch]
        return _said(llava, generate_plain(llava, prompts, images, generation), [0] * len(batch))

    return System("stock", None, run, lambda: None)


def _two_pass(llava: Llava15, rpn: RPN, box: GridBox, generation: Mapping[str, Any]) -> System:
    """As the published code works: look at the whole prompt, then begin again with the crop.

    The image goes through the vision tower once for both passes, which is generous to it.
    """
    zoom = preset_zoom("paper")
    arguments = generation_arguments(llava, generation)

    @torch.no_grad()
    def answer(question: Question) -> Said:
        image, words = question.images[0], llava.prompt_ids(question.text).after
        (ready,) = llava.preprocess([image])
        before = llava.prefix_segment(ready, llava.encode([ready])[0])
        after = llava.suffix_segment(before.next_position, words)
        batch = batch_rows([before.followed_by(after)], [0])
        inputs = batch.attention(llava)
        branch = run_layers(llava.layers[: rpn.branch_layer], batch.embeds, inputs)
        states = rpn(branch, inputs)
        keys = rpn.image_keys(states[:, before.image], inputs.rotary)
        logits = rpn.roi_logits(states[:, -1], inputs.rotary, keys)[0]
        grid = ready.grid
        roi_map = torch.sigmoid(logits).cpu().numpy().reshape(grid.rows, grid.columns)
        propose(blur(roi_map), grid, zoom)
        region, room = region_of(box, grid), llava.context_length
        (crops,) = crop_tokens(llava, [image], [region], [zoom], [room])
        inserted = sum(len(crop.tokens) for crop in crops)
        assert inserted
        zoomed = llava.suffix_segment(before.next_position, words, crops)
        whole = before.followed_by(zoomed).embeds[None]
        ids = llava.model.generate(
            inputs_embeds=whole, attention_mask=_ones(whole), **arguments
        ).tolist()
        return _said(llava, ids, [inserted])[0]

    def run(batch: Sequence[Question]) -> list[Said]:
        return [answer(question) for question in batch]

    return System("two_pass", "paper", run, lambda: None, largest_batch=1)


def _ones(embeds: Tensor) -> Tensor:
    return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)


def _said(llava: Llava15, ids: Sequence[Sequence[int]], crops: Sequence[int]) -> list[Said]:
    texts = [llava.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
    return [Said(text, crop) for text, crop in zip(texts, crops, strict=True)]


def all_systems(
    llava: Llava15, rpn: RPN, box: GridBox, new_tokens: int, *, vicrop_batched: bool = False
) -> list[System]:
    """Every system over the same weights, answering with so many new tokens.

    vicrop_batched: show ViCrop at every batch size, not at 1 alone. Its own search always finds a
    box, so nothing is forced there; it stands over our prefix, which makes it faster than its
    published code, and inserts all 576 crop tokens.
    """
    said = generation_of(new_tokens)
    rpn = rpn.attach(llava).eval().requires_grad_(False)
    return [
        stock(llava, said),
        _engine_system(ZoomModel(llava, proposer="none"), "none", None, said),
        _two_pass(llava, rpn, box, said),
        *[
            _engine_system(zooming_engine(llava, rpn, box, preset), "sdrpn", preset, said)
            for preset in ("paper", "fast")
        ],
        _engine_system(
            ZoomModel(llava, proposer="vicrop", zoom=preset_zoom("paper")),
            "vicrop",
            None,
            said,
            None if vicrop_batched else 1,
        ),
    ]
