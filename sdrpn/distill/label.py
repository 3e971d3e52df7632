"""Create pseudo-labels from the attention of a frozen model's own answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdrpn.backbones.base import Backbone
from sdrpn.boxes import ImageGrid
from sdrpn.config import LabelConfig
from sdrpn.distill.pseudo_labels import IGNORED, label_cells, padding_cells
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.generation import generate
from sdrpn.inference.prefix import Prefix
from sdrpn.roi.proposers import Look, require_labels, response_attention

EMPTY_RESPONSE = "empty response"
EXCEEDS_CONTEXT = "does not fit the context"
NO_MAP = (EMPTY_RESPONSE, EXCEEDS_CONTEXT)
"""Reasons for samples without maps."""


TEXT_FOLDERS = frozenset(
    {"ocr_vqa", "textvqa", "docvqa", "chartqa", "infovqa", "infographicsvqa", "stvqa", "dvqa"}
)
"""Folders of pictures of text, in LLaVA's data and in what follows its layout."""


@dataclass(frozen=True)
class Labelled:
    """Pseudo-labels of one question and the maps they are made from (docs/method.md).

    Args:
        response: The model's answer.
        grounding: float16 [rows, columns].
        sink: float16 [rows, columns].
        labels: int8 [rows, columns] of 1, 0, -100.
        grid: Position of the cells on the image.
        reason: Why the sample has no labels, or None.
    """

    response: str
    grounding: np.ndarray
    sink: np.ndarray
    labels: np.ndarray
    grid: ImageGrid
    reason: str | None = None


def label(
    zoom: ZoomModel, questions: Sequence[Question], *, batch_size: int = 16
) -> Iterator[Labelled]:
    """Label questions on one image each, with a progress bar.

    Args:
        zoom: Engine with head lists (`labels`); its proposer is not used.
        questions: Questions with one image each.
        batch_size: Questions per batch.

    Yields:
        One result per question, in order.
    """
    with tqdm(total=len(questions), desc="Labelling") as progress:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            yield from label_batch(zoom, batch)
            progress.update(len(batch))


def label_batch(
    zoom: ZoomModel, questions: Sequence[Question], kinds: Sequence[str] | None = None
) -> list[Labelled]:
    """Label one batch: answer greedily, then read the attention rows of the answers.

    Args:
        zoom: As in `label`.
        questions: Questions with one image each.
        kinds: Kind of each image, `natural` or `text`, where labels tell them apart; default:
            natural.
    """
    config = require_labels(zoom.models)
    every = kinds if kinds and config.text_grounding else ["natural"] * len(questions)
    found: dict[int, Labelled] = {}
    for kind in sorted(set(every)):
        own = [i for i, one in enumerate(every) if one == kind]
        made = _label_kind(zoom, [questions[i] for i in own], config.of(kind))
        found |= zip(own, made, strict=True)
    return [found[i] for i in range(len(questions))]


def kind_of(image: str) -> str:
    """The kind of an image, `natural` or `text`, by the folders in its path."""
    return "text" if TEXT_FOLDERS & {part.lower() for part in Path(image).parts} else "natural"


def _label_kind(
    zoom: ZoomModel, questions: Sequence[Question], config: LabelConfig
) -> list[Labelled]:
    """Label questions on images of one kind."""
    backbone = zoom.backbone
    prefixes = zoom.prefill([q.images[0] for q in questions])
    looks = [
        Look(
            prefix,
            backbone.image_grid(q.images[0]),
            backbone.prompt_ids(config.asked(q.text)).after,
            zoom.zoom,
        )
        for prefix, q in zip(prefixes, questions, strict=True)
    ]
    token_ids = [look.question for look in looks]
    responses = respond(backbone, prefixes, token_ids, config.max_new_tokens)
    answered = {i: _read(response, config) for i, response in enumerate(responses) if response}
    maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if answered:
        attention = response_attention(
            zoom.models, [looks[i] for i in answered], list(answered.values()), config
        )
        maps = dict(zip(answered, attention, strict=True))
    results = []
    for i, (look, response, question) in enumerate(zip(looks, responses, questions, strict=True)):
        text = backbone.tokenizer.decode(response or [], skip_special_tokens=True).strip()
        if i not in maps:
            shape = look.grid.rows, look.grid.columns
            empty, ignored = np.zeros(shape, np.float16), np.full(shape, IGNORED, np.int8)
            reason = EXCEEDS_CONTEXT if response is None else EMPTY_RESPONSE
            results.append(Labelled(text, empty, empty, ignored, look.grid, reason))
            continue
        # From the maps as they are stored, so that relabelling reproduces the labels.
        half = [look.shaped(one.astype(np.float16)) for one in maps[i]]
        shape = look.grid.rows, look.grid.columns
        padding = padding_of(question.images[0].size, look.grid.extent, shape, config)
        grounding, sink = (one.astype(np.float32) for one in half)
        labels, reason = label_cells(grounding, sink, config, padding)
        results.append(Labelled(text, half[0], half[1], labels, look.grid, reason))
    return results


def _read(response: list[int], config: LabelConfig) -> list[int]:
    """The tokens of an answer whose attention is read."""
    cut = len(response) >= config.max_new_tokens and not config.read_cut_end
    return response[:-1] or response if cut else response


def padding_of(
    size: Sequence[int], extent: Sequence[float], shape: tuple[int, int], config: LabelConfig
) -> np.ndarray | None:
    """The cells that show no picture, where labels tell them apart; None for none.

    Args:
        size: (width, height) of the picture in pixels; empty where it is not known.
        extent: Where the grid lies on it, (x0, y0, x1, y1) in its pixels.
        shape: (rows, columns).
        config: Whether padding counts.
    """
    is_padded = len(size) == 2 and any(edge < 0 for edge in extent[:2])
    if not (config.padding_background and is_padded and shape[0] == shape[1]):
        return None
    return padding_cells((size[0], size[1]), shape[0])


def respond(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    token_ids: Sequence[tuple[int, ...]],
    max_new_tokens: int,
) -> list[list[int] | None]:
    """Answer a batch greedily, each question within the model's context.

    Prompt, image tokens and answer must fit the context, since the model is not trained on the
    positions beyond it and its attention there is meaningless. An answer may be truncated by
    `max_new_tokens`, but not by the end of the context.

    Args:
        backbone: The model.
        prefixes: Prefix of each question's image.
        token_ids: Prompt tokens after the image, per question.
        max_new_tokens: Maximum length of an answer.

    Returns:
        Token ids of each answer without the end token, [] for an empty answer; None for a sample
        that exceeds the context.
    """
    budgets = [
        backbone.context_length - prefix.length - len(ids)
        for prefix, ids in zip(prefixes, token_ids, strict=True)
    ]
    # One token beyond the budget, to see whether an answer that fills it ends there.
    limits = [min(max_new_tokens, budget + 1) if budget > 0 else 0 for budget in budgets]
    responses: list[list[int] | None] = [None] * len(token_ids)
    for limit in sorted(set(limits) - {0}):
        group = [i for i, own in enumerate(limits) if own == limit]
        suffixes = [backbone.suffix_segment(prefixes[i].next_position, token_ids[i]) for i in group]
        answers = generate(
            backbone, [prefixes[i] for i in group], suffixes, {"max_new_tokens": limit}
        )
        for i, response in zip(group, answers, strict=True):
            responses[i] = response if len(response) <= budgets[i] else None
    return responses
