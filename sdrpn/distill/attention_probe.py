"""A frozen model answers probe questions, and every head's attention to the image is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sdrpn.distill.label import respond
from sdrpn.distill.probes import Probe, box_cover, disc_cover
from sdrpn.distill.scores import Targets
from sdrpn.engine import ZoomModel
from sdrpn.inference.attention_rows import Rows, read_rows

COVERED = 0.1
"""A cell shows an object that covers this share of it."""


@dataclass(frozen=True)
class Asked:
    """One question on its way: its picture, its token ids, where one should look, the response."""

    image: Image.Image
    question: str
    words: tuple[int, ...]
    target: Targets
    response: tuple[int, ...] = ()


class Listener:
    """Puts questions to a model in batches. Memory does not grow with their number."""

    def __init__(self, zoom: ZoomModel, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.zoom, self.backbone, self.batch_size = zoom, zoom.backbone, batch_size

    def questions(self, probes: Sequence[Probe]) -> list[Asked]:
        """One question a disc, unanswered, picture by picture."""
        asked = []
        for number, probe in enumerate(probes):
            grid = self.backbone.image_grid(probe.image)
            shape = grid.rows, grid.columns
            covers = [disc_cover(disc, grid.extent, *shape).ravel() for disc in probe.discs]
            objects = np.any([cover > COVERED for cover in covers], axis=0)
            for disc, cover in zip(probe.discs, covers, strict=True):
                box = box_cover(disc.box, grid.extent, *shape).ravel()
                target = Targets(cover > COVERED, box, objects, number, shape)
                words = self.backbone.prompt_ids(disc.question).after
                asked.append(Asked(probe.image, disc.question, words, target))
        return asked

    def answer(self, asked: Sequence[Asked], max_new_tokens: int) -> list[Asked]:
        """The questions with the model's greedy responses.

        Those without a word, and those that do not fit the context, are left out.
        """
        answered = []
        for some in self._batches(asked, "Answering probes"):
            prefixes = self.zoom.prefill([one.image for one in some])
            said = respond(self.backbone, prefixes, [one.words for one in some], max_new_tokens)
            answered += [
                replace(one, response=tuple(r)) for one, r in zip(some, said, strict=True) if r
            ]
        return answered

    def listen(
        self, asked: Sequence[Asked], layers: Sequence[int], title: str
    ) -> Iterator[tuple[Sequence[Asked], Rows]]:
        """Attention of the responses to the image, mean over their tokens, batch by batch."""
        for some in self._batches(asked, title):
            prefixes = self.zoom.prefill([one.image for one in some])
            suffixes = [(*one.words, *one.response) for one in some]
            counts = [len(one.response) for one in some]
            yield some, read_rows(self.backbone, prefixes, suffixes, counts, layers)

    def text(self, one: Asked) -> str:
        """What the model said."""
        return self.backbone.tokenizer.decode(one.response, skip_special_tokens=True).strip()

    def _batches(self, asked: Sequence[Asked], title: str) -> Iterator[Sequence[Asked]]:
        with tqdm(total=len(asked), desc=title) as progress:
            for start in range(0, len(asked), self.batch_size):
                some = asked[start : start + self.batch_size]
                yield some
                progress.update(len(some))


def stacked(rows: Rows, layers: Sequence[int]) -> list[np.ndarray]:
    """Each row of a batch as one array: float32 [L, H, T]."""
    by_row = zip(*(rows.by_layer[layer] for layer in layers), strict=True)
    return [torch.stack(list(one)).cpu().numpy() for one in by_row]
