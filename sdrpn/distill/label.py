"""Make pseudo-labels: the frozen model answers, and its own attention says where it looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdrpn.backbones.base import Backbone
from sdrpn.boxes import ImageGrid
from sdrpn.config import LabelConfig
from sdrpn.distill.pseudo_labels import IGNORED, judge, padding_cells
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.generation import generate
from sdrpn.inference.prefix import Prefix
from sdrpn.roi.proposers import Look, known_labels, response_attention

EMPTY_RESPONSE = "empty response"
NOT_FITTING = "does not fit the context"
NO_MAP = (EMPTY_RESPONSE, NOT_FITTING)
"""Why a sample has no map that labels could be made from."""


TEXT_FOLDERS = frozenset(
    {"ocr_vqa", "textvqa", "docvqa", "chartqa", "infovqa", "infographicsvqa", "stvqa", "dvqa"}
)
"""Folders of pictures of text, in LLaVA's data and in what follows its layout."""


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


def label_batch(
    zoom: ZoomModel, questions: Sequence[Question], kinds: Sequence[str] | None = None
) -> list[Labelled]:
    """Label one batch: answer greedily, then read the chosen attention rows of the answers.

    kinds: of each question's picture, `natural` (default) or `text`, where labels tell them apart.
    """
    config = known_labels(zoom.models)
    every = kinds or ["natural"] * len(questions)
    found: dict[int, Labelled] = {}
    for kind in sorted(set(every)):
        own = [i for i, one in enumerate(every) if one == kind]
        made = _label_kind(zoom, [questions[i] for i in own], config.of(kind))
        found |= zip(own, made, strict=True)
    return [found[i] for i in range(len(questions))]


def kind_of(image: str) -> str:
    """The kind of a picture by the folders that its path names: `natural` or `text`."""
    return "text" if TEXT_FOLDERS & {part.lower() for part in Path(image).parts} else "natural"


def _label_kind(
    zoom: ZoomModel, questions: Sequence[Question], config: LabelConfig
) -> list[Labelled]:
    """Label questions whose labels are made in one way."""
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
    words = [look.question for look in looks]
    responses = respond(backbone, prefixes, words, config.max_new_tokens)
    spoken = {i: _read(said, config) for i, said in enumerate(responses) if said}
    maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if spoken:
        asked = [looks[i] for i in spoken]
        read = response_attention(zoom.models, asked, list(spoken.values()), config)
        maps = dict(zip(spoken, read, strict=True))
    results = []
    for i, (look, response, question) in enumerate(zip(looks, responses, questions, strict=True)):
        text = backbone.tokenizer.decode(response or [], skip_special_tokens=True).strip()
        if i not in maps:
            shape = look.grid.rows, look.grid.columns
            nothing, ignored = np.zeros(shape, np.float16), np.full(shape, IGNORED, np.int8)
            reason = NOT_FITTING if response is None else EMPTY_RESPONSE
            results.append(Labelled(text, nothing, nothing, ignored, look.grid, reason))
            continue
        # From the maps as they are kept, so that relabelling gives the same again.
        half = [look.shaped(one.astype(np.float16)) for one in maps[i]]
        shape = look.grid.rows, look.grid.columns
        padding = padding_of(question.images[0].size, look.grid.extent, shape, config)
        maps32 = (one.astype(np.float32) for one in half)
        labels, reason = judge(*maps32, config, padding)
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
