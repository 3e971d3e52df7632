"""Questions under many zoom settings, with everything computed once that the settings share.

The image, the RPN's map and the answer without a zoom do not depend on the settings, and settings
that insert the same crop tokens give the same answer.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.inference.generation_arguments import check_generation
from sdrpn.roi.proposers import from_logits
from sdrpn.second_look import Row


def ask_settings(
    engine: ZoomModel,
    questions: Sequence[Question],
    settings: Sequence[ZoomConfig],
    generation: Mapping[str, Any] | None = None,
) -> list[list[Answer]]:
    """Answer every question under every setting.

    Args:
        engine: An engine with proposer `rpn`.
        questions: Questions with one image each; their own zoom settings are not used.
        settings: Zoom settings.
        generation: As `ZoomModel.ask_batch`; sampled answers would not be shared fairly.

    Returns:
        For each setting, the answers that `ask_batch` would give. `Answer.seconds` is 0.

    Raises:
        ValueError: If a question does not have one image, the engine has no RPN, or sampling is
            asked for.
    """
    generation = check_generation(generation or {}, len(questions))
    _check(engine, questions, generation)
    look = engine.second_look
    thins = any(setting.keep_tokens is not None for setting in settings)
    base = engine.prepared_rows([replace(q, zoom=settings[0]) for q in questions], thins)
    look.look(base)
    found = [(row.proposal.logits, row.proposal.gate) for row in base]
    look.answer_first(base, generation)
    by_setting = [_rows(engine, base, found, setting) for setting in settings]
    every = [row for rows in by_setting for row in rows]
    _crop(engine, [row for row in every if row.answer is None])
    for row in every:
        if row.answer is None and not row.crops:
            row.answer = row.first_answer
        if row.zoom.gate is None:
            row.first_answer = row.confidence = None  # no part of this setting
    left = _grouped([row for row in every if row.answer is None], _tokens)
    look.answer([same[0] for same in left], generation)
    for first, *others in left:
        for row in others:
            row.answer = first.answer
    stop = generation.get("stop", [])
    return [[engine.as_answer(row, row.answer or [], stop) for row in rows] for rows in by_setting]


def _check(engine: ZoomModel, questions: Sequence[Question], generation: Mapping[str, Any]) -> None:
    if engine.rpn is None:
        raise ValueError(f"settings are swept for proposer 'rpn', got {engine.proposer!r}")
    if any(len(question.images) != 1 or question.box is not None for question in questions):
        raise ValueError("settings are swept for questions with one image and no box")
    if generation.get("do_sample"):
        raise ValueError("settings are swept with do_sample=False: samples differ by chance")


def _rows(
    engine: ZoomModel, base: Sequence[Row], found: Sequence[Any], setting: ZoomConfig
) -> list[Row]:
    """Rows under one setting, with what the stages before the crop give."""
    limits = [engine.crop_room(row.image, row.ids, setting) for row in base]
    rows = [
        replace(row, zoom=setting, max_crop_tokens=limit, answer=None)
        for row, limit in zip(base, limits, strict=True)
    ]
    looks = [engine.second_look.look_of(row) for row in rows]
    for row, proposal in zip(rows, from_logits(engine.models, looks, found), strict=True):
        row.proposal = proposal
        row.stand_if_sure()
    return rows


def _crop(engine: ZoomModel, rows: Sequence[Row]) -> None:
    """Encode every region once for all settings that make the same crop of it."""
    crops = _grouped(rows, _crop_settings)
    engine.second_look.crop([same[0] for same in crops])
    for first, *others in crops:
        for row in others:
            row.crops = first.crops
            row.proposal = replace(row.proposal, region=first.proposal.region)


def _grouped(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    """Group rows with equal keys; a key is computed once per row."""
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [*groups.values()]


def _crop_settings(row: Row) -> Hashable:
    """Equal for rows whose crops are equal by construction: same region, same settings of crops."""
    region, zoom = row.proposal.region, row.zoom
    masks = [None if mask is None else mask.tobytes() for mask in (region.keep, region.foreground)]
    return (
        *(row.question.image_keys, region.boxes, region.grid_boxes, region.reason, *masks),
        *(zoom.token_budget, zoom.crop_tokens, zoom.tiles, row.max_crop_tokens),
    )


def _tokens(row: Row) -> Hashable:
    """Equal for rows whose answers are equal by construction: same question, same tokens."""
    inserted = [
        hashlib.blake2b(crop.tokens.float().cpu().numpy().tobytes()).digest() for crop in row.crops
    ]
    places = [
        (c.rows, c.columns, None if c.keep is None else tuple(c.keep.tolist())) for c in row.crops
    ]
    limit = row.zoom.thin_above
    thinned = limit is not None and row.prefix.image_tokens > limit
    kept = tuple(row.kept.tolist()) if row.thins else None
    return row.question.image_keys, row.ids, *inserted, *places, kept, thinned
