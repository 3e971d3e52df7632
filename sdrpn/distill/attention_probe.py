"""Ask a frozen model probe questions and read the attention of every head to the image."""

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
"""Share of a cell that an object must cover to count as visible there."""


@dataclass(frozen=True)
class ProbeQuestion:
    """A question about a probe picture.

    Args:
        image: The picture.
        question: Its text.
        token_ids: Prompt tokens after the image.
        target: Where the model should look.
        response: Token ids of the answer, empty before it is given.
    """

    image: Image.Image
    question: str
    token_ids: tuple[int, ...]
    target: Targets
    response: tuple[int, ...] = ()


class AttentionProbe:
    """Run probe questions through a model in batches; memory does not grow with their number."""

    def __init__(self, zoom: ZoomModel, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.zoom, self.backbone, self.batch_size = zoom, zoom.backbone, batch_size

    def questions(self, probes: Sequence[Probe]) -> list[ProbeQuestion]:
        """Build one question per disc, grouped by picture."""
        asked = []
        for number, probe in enumerate(probes):
            grid = self.backbone.image_grid(probe.image)
            shape = grid.rows, grid.columns
            covers = [disc_cover(disc, grid.extent, *shape).ravel() for disc in probe.discs]
            objects = np.any([cover > COVERED for cover in covers], axis=0)
            for disc, cover in zip(probe.discs, covers, strict=True):
                box = box_cover(disc.box, grid.extent, *shape).ravel()
                target = Targets(cover > COVERED, box, objects, number, shape)
                token_ids = self.backbone.prompt_ids(disc.question).after
                asked.append(ProbeQuestion(probe.image, disc.question, token_ids, target))
        return asked

    def answer(self, asked: Sequence[ProbeQuestion], max_new_tokens: int) -> list[ProbeQuestion]:
        """Return the questions with their greedy responses.

        Questions with an empty response, or that exceed the context, are left out.
        """
        answered = []
        for some in self._batches(asked, "Answering probes"):
            prefixes = self.zoom.prefill([one.image for one in some])
            token_ids = [one.token_ids for one in some]
            responses = respond(self.backbone, prefixes, token_ids, max_new_tokens)
            answered += [
                replace(one, response=tuple(response))
                for one, response in zip(some, responses, strict=True)
                if response
            ]
        return answered

    def read_attention(
        self, asked: Sequence[ProbeQuestion], layers: Sequence[int], title: str
    ) -> Iterator[tuple[Sequence[ProbeQuestion], Rows]]:
        """Yield each batch with the attention of its responses to the image.

        Args:
            asked: Answered questions.
            layers: Layers to read.
            title: Label of the progress bar.

        Yields:
            (questions, attention rows averaged over the response tokens).
        """
        for some in self._batches(asked, title):
            prefixes = self.zoom.prefill([one.image for one in some])
            suffixes = [(*one.token_ids, *one.response) for one in some]
            counts = [len(one.response) for one in some]
            yield some, read_rows(self.backbone, prefixes, suffixes, counts, layers)

    def text(self, one: ProbeQuestion) -> str:
        """Decode the response to a question."""
        return self.backbone.tokenizer.decode(one.response, skip_special_tokens=True).strip()

    def _batches(
        self, asked: Sequence[ProbeQuestion], title: str
    ) -> Iterator[Sequence[ProbeQuestion]]:
        with tqdm(total=len(asked), desc=title) as progress:
            for start in range(0, len(asked), self.batch_size):
                some = asked[start : start + self.batch_size]
                yield some
                progress.update(len(some))


def stack_layers(rows: Rows, layers: Sequence[int]) -> list[np.ndarray]:
    """Stack the layers of each row of a batch: one float32 [L, H, T] per question."""
    by_row = zip(*(rows.by_layer[layer] for layer in layers), strict=True)
    return [torch.stack(list(one)).cpu().numpy() for one in by_row]
