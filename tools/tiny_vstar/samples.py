"""Training samples of the tiny LLaVA: views of scenes with questions and responses, in batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.tiny_vstar import scenes as sc
from tools.tiny_vstar.tiny_model import answer_logits, encode, pixel_values, split_prompt


@dataclass(frozen=True)
class Batch:
    """Questions on `n` samples of one or two views each.

    views: uint8 (n, views, 112, 112, 3). keep: bool (n, views * 64). turns: ids (n, k, m), each a
    question and its response; targets (n, k, r): the response and </s>, -100 where there is none.
    """

    views: np.ndarray
    keep: torch.Tensor
    turns: torch.Tensor
    targets: torch.Tensor


class Turns:
    """Token ids of every question and response, looked up by disc."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor
        self.prefix, suffix = split_prompt(processor, sc.QUESTION.format(colour="red"))
        self.length = len(suffix) + 2

    def of(self, discs: list[list[sc.Disc]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns (n, k, m) and targets (n, k, 3) for each sample's list of discs."""
        width = max(len(row) for row in discs)
        tokenizer = self.processor.tokenizer
        turns = torch.full((len(discs), width, self.length), tokenizer.pad_token_id)
        targets = torch.full((len(discs), width, 3), -100)
        for i, row in enumerate(discs):
            for j, disc in enumerate(row):
                response = tokenizer(disc.response, add_special_tokens=False)["input_ids"]
                suffix = split_prompt(self.processor, disc.question)[1]
                turns[i, j] = torch.tensor(suffix + response)
                targets[i, j] = torch.tensor([*response, tokenizer.eos_token_id])
        return turns, targets


def vision_batch(
    pool: list[sc.Scene], rng: np.random.Generator, size: int
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Views uint8 (4 * size, 112, 112, 3): a full one and three zoomed ones a scene; labels."""
    views, colours, patterns = [], [], []
    for index in rng.integers(0, len(pool), size):
        scene = pool[index]
        targets = [scene.discs[i] for i in rng.integers(0, len(scene.discs), 3)]
        for box in [sc.WHOLE, *(sc.random_zoom_box(rng, disc) for disc in targets)]:
            views.append(scene.view if box == sc.WHOLE else sc.zoomed_view(scene.image, box))
            colour, pattern = sc.patch_labels(scene.discs, box)
            colours.append(colour)
            patterns.append(pattern)
    return np.stack(views), torch.tensor(np.stack(colours)), torch.tensor(np.stack(patterns))


def dropped_tokens(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Which crop tokens stay, bool (n, 64): all, or in a third of the samples a blob of them."""
    keep = np.ones((samples, sc.GRID, sc.GRID), bool)
    y, x = np.mgrid[: sc.GRID, : sc.GRID]
    for i in np.flatnonzero(rng.random(samples) < 0.3):
        centre, radius = rng.uniform(2.5, 4.5, 2), rng.uniform(2.2, 4.5)
        keep[i] = np.hypot(y - centre[0], x - centre[1]) < radius
    return keep.reshape(samples, -1)


def one_view_batch(
    pool: list[sc.Scene], rng: np.random.Generator, turns: Turns, full: int, zoomed: int, easy: bool
) -> Batch:
    """Full views with a question on every disc, and zoomed ones with one on the disc they show."""
    views, asked = [], []
    while len(views) < full + zoomed:
        scene = pool[rng.integers(0, len(pool))]
        discs = [d for d in scene.discs if not (easy and d.fine)]
        if not discs:
            continue
        if len(views) < full:
            views.append(scene.view[None])
        else:
            discs = [discs[rng.integers(0, len(discs))]]
            box = sc.random_zoom_box(rng, discs[0])
            views.append(sc.zoomed_view(scene.image, box)[None])
        asked.append(discs)
    keep = torch.ones(len(views), sc.GRID**2, dtype=torch.bool)
    return Batch(np.stack(views), keep, *turns.of(asked))


def two_view_batch(
    pool: list[sc.Scene], rng: np.random.Generator, turns: Turns, size: int, easy: bool
) -> Batch:
    """A full view and a zoom on the asked disc; now and then another disc is asked for instead."""
    views, asked = [], []
    while len(views) < size:
        scene = pool[rng.integers(0, len(pool))]
        discs = [d for d in scene.discs if not (easy and d.fine)]
        if not discs:
            continue
        shown = asked_disc = discs[rng.integers(0, len(discs))]
        coarse = [d for d in discs if not d.fine]
        if coarse and rng.random() < 0.15:  # a wrong zoom: the full view still answers
            asked_disc = coarse[rng.integers(0, len(coarse))]
        zoom = sc.zoomed_view(scene.image, sc.random_zoom_box(rng, shown))
        views.append(np.stack([scene.view, zoom]))
        asked.append([asked_disc])
    keep = np.concatenate([np.ones((size, sc.GRID**2), bool), dropped_tokens(rng, size)], axis=1)
    return Batch(np.stack(views), torch.tensor(keep), *turns.of(asked))


def batch_logits(model: LlavaForConditionalGeneration, turns: Turns, batch: Batch) -> torch.Tensor:
    """Logits of the response tokens and </s>: (n, k, 3, vocabulary)."""
    tokens = encode(
        model, pixel_values(batch.views.reshape(-1, *batch.views.shape[2:]), turns.processor)
    )
    tokens = tokens.view(len(batch.views), -1, tokens.shape[-1])
    return answer_logits(model, turns.prefix, tokens, batch.keep, batch.turns)[:, :, -3:]
