"""Make pseudo-labels: the frozen model answers, and its own attention says where it looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from sdrpn.backbones.base import Backbone
from sdrpn.boxes import ImageGrid
from sdrpn.distill.pseudo_labels import IGNORED, judge
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.generation import generate
from sdrpn.inference.prefix import Prefix
from sdrpn.roi.proposers import Look, known_labels, response_attention

EMPTY_RESPONSE = "empty response"
NOT_FITTING = "does not fit the context"
NO_MAP = (EMPTY_RESPONSE, NOT_FITTING)
"""Why a sample has no map that labels could be made from."""


@dataclass(frozen=True)
class Labelled:
    """One question's pseudo-labels and the maps they were made from (docs/method.md).

    grounding, sink: float16 [rows, columns]. labels: int8 [rows, columns] of 1, 0, -100.
    grid: how these cells lie on the image. reason: why a sample gave none.
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
    """Label questions on one image each, in their order, with a progress bar.

    zoom: an engine that knows which heads point (its `labels`); its proposer is not asked.
    """
    with tqdm(total=len(questions), desc="Labelling") as progress:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            yield from label_batch(zoom, batch)
            progress.update(len(batch))


def label_batch(zoom: ZoomModel, questions: Sequence[Question]) -> list[Labelled]:
    """Label one batch: answer greedily, then read the chosen attention rows of the answers."""
    backbone, config = zoom.backbone, known_labels(zoom.models)
    prefixes = zoom.prefill([q.images[0] for q in questions])
    looks = [
        Look(
            prefix,
            backbone.image_grid(q.images[0]),
            backbone.prompt_ids(q.text).after,
            zoom.zoom,
        )
        for prefix, q in zip(prefixes, questions, strict=True)
    ]
    words = [look.question for look in looks]
    responses = respond(backbone, prefixes, words, config.max_new_tokens)
    spoken = {i: response for i, response in enumerate(responses) if response}
    maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if spoken:
        asked = [looks[i] for i in spoken]
        read = response_attention(zoom.models, asked, list(spoken.values()))
        maps = dict(zip(spoken, read, strict=True))
    results = []
    for i, (look, response) in enumerate(zip(looks, responses, strict=True)):
        text = backbone.tokenizer.decode(response or [], skip_special_tokens=True).strip()
        if i not in maps:
            shape = look.grid.rows, look.grid.columns
            nothing, ignored = np.zeros(shape, np.float16), np.full(shape, IGNORED, np.int8)
            reason = NOT_FITTING if response is None else EMPTY_RESPONSE
            results.append(Labelled(text, nothing, nothing, ignored, look.grid, reason))
            continue
        # From the maps as they are kept, so that relabelling gives the same again.
        half = [look.shaped(one.astype(np.float16)) for one in maps[i]]
        labels, reason = judge(half[0].astype(np.float32), half[1].astype(np.float32), config)
        results.append(Labelled(text, half[0], half[1], labels, look.grid, reason))
    return results


def respond(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    words: Sequence[tuple[int, ...]],
    max_new_tokens: int,
) -> list[list[int] | None]:
    """Answer a batch greedily, each question within the model's context.

    A sample fits if its prompt, image tokens and answer do: the model has not learned the positions
    behind its context, and where it looks there means nothing. An answer that is cut at
    `max_new_tokens` fits; one that is cut at the end of the context does not.

    Args:
        prefixes: of each question's image.
        words: token ids behind the image, question by question.
        max_new_tokens: of an answer.

    Returns:
        The answers' token ids without their end token, [] for an empty answer; None for a sample
        that does not fit.
    """
    rooms = [
        backbone.context_length - prefix.length - len(ids)
        for prefix, ids in zip(prefixes, words, strict=True)
    ]
    # One token more than there is room for, to see whether an answer of this very length ends.
    limits = [min(max_new_tokens, room + 1) if room > 0 else 0 for room in rooms]
    responses: list[list[int] | None] = [None] * len(words)
    for limit in sorted(set(limits) - {0}):
        group = [i for i, own in enumerate(limits) if own == limit]
        asked = [prefixes[i] for i in group]
        suffixes = [backbone.suffix_segment(prefixes[i].next_position, words[i]) for i in group]
        said = generate(backbone, asked, suffixes, {"max_new_tokens": limit})
        for i, response in zip(group, said, strict=True):
            responses[i] = response if len(response) <= rooms[i] else None
    return responses
