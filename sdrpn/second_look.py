"""The second look at a batch of questions: gate, look, crop, and where the answer goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from sdrpn.backbones.base import CropTokens, Segment
from sdrpn.config import ZoomConfig
from sdrpn.inference.generation import generate, generate_with_confidence, loss, losses
from sdrpn.inference.prefix import Context, Prefix, prefill_segments
from sdrpn.inference.upper import (
    Lowered,
    complete,
    filled,
    last_token,
    resume,
    run_lower,
    thinned,
    thinned_states,
)
from sdrpn.question import Question
from sdrpn.roi.crops import crop_tokens
from sdrpn.roi.postprocess import Region, region_from_box
from sdrpn.roi.proposers import (
    BY_NAME,
    Look,
    Models,
    Proposal,
    by_rpn,
    lower_states,
    relevant_cells,
)


@dataclass(eq=False)
class Row:
    """A question on its way to an answer.

    Args:
        question: The question, with one image.
        zoom: Its zoom settings.
        prefix: Its prefilled image.
        ids: Token ids after the image.
        max_crop_tokens: Room for crop tokens in the model's context.
        proposal: The region, after `SecondLook.look`.
        crops: Crop tokens, after `SecondLook.crop`.
        lowered: States of the question behind layer B-1, if the RPN has read it.
        first_answer: Token ids of the answer without a zoom, if the gate asked for one.
        answer: Token ids of the answer, if it is known.
        confidence: Smallest probability of a token of the answer without a zoom.
    """

    question: Question
    zoom: ZoomConfig
    prefix: Prefix
    ids: tuple[int, ...]
    max_crop_tokens: int
    proposal: Proposal = field(default_factory=lambda: Proposal(Region()))
    crops: Sequence[CropTokens] = ()
    lowered: Lowered | None = None
    first_answer: list[int] | None = None
    answer: list[int] | None = None
    confidence: float | None = None

    @property
    def image(self) -> Image.Image:
        """The question's image."""
        return self.question.images[0]

    @property
    def thins(self) -> bool:
        """Whether the upper layers of the answer see only some of the image tokens."""
        known = self.proposal.logits is not None and self.prefix.hidden is not None
        return bool(self.crops) and known and self.zoom.keep_tokens is not None

    def stand_if_sure(self) -> None:
        """Make the first answer the answer if the gate says so."""
        gate, sure = self.zoom.gate, self.confidence
        if gate is not None and sure is not None and sure >= gate:
            self.answer = self.first_answer
            reason = f"the first answer is {sure:.2f} sure (gate={gate:g})"
            self.proposal = Proposal(Region(reason=reason))

    @property
    def kept(self) -> Bool[Tensor, " cells"]:
        """[T] bool, the `keep_tokens` image tokens with the highest RoI logits."""
        assert self.proposal.logits is not None
        logits = self.proposal.logits.ravel()
        keep = torch.zeros(len(logits), dtype=torch.bool)
        keep[np.argsort(-logits, kind="stable")[: self.zoom.keep_tokens]] = True
        return keep


class SecondLook:
    """The stages between prefill and answer.

    Args:
        models: The backbone, its RPN and head lists.
        proposer: `rpn`, `attention`, `vicrop` or `none`.
        completed: Called with a row whose prefix now has the KV of all layers.
    """

    def __init__(
        self, models: Models, proposer: str, completed: Callable[[Row], None] = lambda row: None
    ) -> None:
        self.models, self.backbone = models, models.backbone
        self.proposer, self.completed = proposer, completed

    # --- gate, look, crop --------------------------------------------------------------------

    def run(self, rows: Sequence[Row], generation: Mapping[str, Any]) -> None:
        """Run all stages before the answer.

        Args:
            rows: Rows with a prefix; their other fields are set.
            generation: Settings of the answers, for those without a zoom.

        Raises:
            ValueError: If a box exceeds its image, or a setting needs another RPN.
        """
        self.gate([row for row in rows if self._gates(row)], generation)
        self.look([row for row in rows if row.answer is None])
        self.crop([row for row in rows if row.answer is None])
        for row in rows:
            if not row.crops and row.answer is None:
                row.answer = row.first_answer

    def _gates(self, row: Row) -> bool:
        asked = row.question.box is None and self.proposer != "none"
        return asked and row.zoom.gate is not None

    def gate(self, rows: Sequence[Row], generation: Mapping[str, Any]) -> None:
        """Answer without a zoom; sure answers stand."""
        if not rows:
            return
        if "streamer" in generation:
            raise ValueError("streamer needs gate=None: the first answer may not stand")
        if self.models.rpn is not None:
            self._lower(rows)
        self.answer_first(rows, generation)
        for row in rows:
            row.stand_if_sure()

    def answer_first(self, rows: Sequence[Row], generation: Mapping[str, Any]) -> None:
        """Generate the answers without a zoom, and how sure the model is of them."""
        contexts, suffixes = self._without_zoom(rows)
        first = generate_with_confidence(self.backbone, contexts, suffixes, generation)
        for row, (ids, confidence) in zip(rows, first, strict=True):
            row.first_answer, row.confidence = ids, confidence

    def look(self, rows: Sequence[Row]) -> None:
        """Propose regions; a question's own box takes precedence over the proposer."""
        looking = []
        for row in rows:
            if row.question.box is None:
                looking.append(row)
                continue
            grid = self.backbone.image_grid(row.image)
            region = region_from_box(row.question.box, grid, self.backbone.map_rules)
            row.proposal = Proposal(region)
        if not looking:
            return
        looks = [self.look_of(row) for row in looking]
        if self.models.rpn is not None:
            self._lower([row for row in looking if row.lowered is None])
            lowered = [row.lowered for row in looking if row.lowered is not None]
            proposals = by_rpn(self.models, looks, lowered)
        else:
            self._complete(looking)
            proposals = BY_NAME[self.proposer](self.models, looks)
        for row, proposal in zip(looking, proposals, strict=True):
            row.proposal = proposal

    def look_of(self, row: Row) -> Look:
        """Make a proposer's input of a row."""
        return Look(row.prefix, self.backbone.image_grid(row.image), row.ids, row.zoom)

    def _lower(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        states = lower_states(self.models, [self.look_of(row) for row in rows])
        for row, lowered in zip(rows, states, strict=True):
            row.lowered = lowered

    def crop(self, rows: Sequence[Row]) -> None:
        """Encode the regions; a region without a token left is none."""
        crops = crop_tokens(
            self.backbone,
            [row.image for row in rows],
            [row.proposal.region for row in rows],
            [row.zoom for row in rows],
            [row.max_crop_tokens for row in rows],
        )
        for row, tokens in zip(rows, crops, strict=True):
            row.crops = tokens
            if not tokens and row.proposal.region.boxes:
                reason = "no crop tokens left: the mask keeps none, or the context is full"
                row.proposal = replace(row.proposal, region=Region(reason=reason))

    # --- answers -----------------------------------------------------------------------------

    def answer(self, rows: Sequence[Row], generation: Mapping[str, Any]) -> list[list[int]]:
        """Generate the answers that do not stand yet, in one batch.

        Args:
            rows: Rows after `run`.
            generation: Settings of the request; see `check_generation`.

        Returns:
            New token ids of each row, without the end token.
        """
        left = [row for row in rows if row.answer is None]
        if left:
            contexts, suffixes = self._contexts(left)
            found = generate(self.backbone, contexts, suffixes, generation)
            for row, ids in zip(left, found, strict=True):
                row.answer = ids
        return [row.answer or [] for row in rows]

    def losses(
        self, rows: Sequence[Row], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Compute the loss of continuations, as `sdrpn.inference.generation.losses`.

        Args:
            rows: Rows after `run`.
            continuations: Token ids to score, for each row.
        """
        found: dict[int, tuple[float, bool]] = {}
        thin = [i for i, row in enumerate(rows) if row.thins]
        if thin:
            some, targets = [rows[i] for i in thin], [continuations[i] for i in thin]
            segments = [
                suffix.followed_by(self.backbone.text_segment(suffix.next_position, ids))
                for suffix, ids in zip(map(self._suffix, some), targets, strict=True)
            ]
            states = thinned_states(
                self.backbone, self._lowered(some, segments), [row.kept for row in some]
            )
            pairs = zip(states, targets, strict=True)
            found |= zip(thin, (loss(self.backbone, s, ids) for s, ids in pairs), strict=True)
        whole = [i for i, row in enumerate(rows) if not row.thins]
        if whole:
            some = [rows[i] for i in whole]
            self._thin_as_published(some)
            self._complete(some)
            prefixes, suffixes = [row.prefix for row in some], [self._suffix(row) for row in some]
            targets = [continuations[i] for i in whole]
            found |= zip(whole, losses(self.backbone, prefixes, suffixes, targets), strict=True)
        return [found[i] for i in range(len(rows))]

    def _contexts(self, rows: Sequence[Row]) -> tuple[list[Prefix | Context], list[Segment]]:
        """The state from which generation continues, and the segment it starts with."""
        self._thin_as_published(rows)
        thin = [row for row in rows if row.thins]
        resumed = [row for row in rows if not row.crops and row.lowered is not None]
        whole = [row for row in rows if row not in thin and row not in resumed]
        self._complete(whole)
        if len(whole) == len(rows):
            return [row.prefix for row in rows], [self._suffix(row) for row in rows]
        done: dict[int, tuple[Context, Segment]] = {}
        if thin:
            suffixes = [self._suffix(row) for row in thin]
            contexts = thinned(
                self.backbone, self._lowered(thin, suffixes), [row.kept for row in thin]
            )
            done |= _by_row(thin, contexts, suffixes)
        if resumed:
            contexts, suffixes = self._without_zoom(resumed)
            done |= _by_row(resumed, contexts, suffixes)
        if whole:
            # Generation would pad all rows to the longest suffix.
            suffixes = [self._suffix(row) for row in whole]
            contexts = filled(self.backbone, [row.prefix for row in whole], suffixes)
            done |= _by_row(whole, contexts, suffixes)
        pairs = [done[id(row)] for row in rows]
        return [context for context, _ in pairs], [last_token(suffix) for _, suffix in pairs]

    def _without_zoom(self, rows: Sequence[Row]) -> tuple[list[Prefix | Context], list[Segment]]:
        """As `_contexts`, for the question without a crop."""
        self._complete(rows)
        suffixes = [self.backbone.suffix_segment(row.prefix.next_position, row.ids) for row in rows]
        lowered = [row.lowered for row in rows if row.lowered is not None]
        if len(lowered) < len(rows):
            return [row.prefix for row in rows], suffixes
        return [*resume(self.backbone, lowered)], [last_token(suffix) for suffix in suffixes]

    def _suffix(self, row: Row) -> Segment:
        return self.backbone.suffix_segment(row.prefix.next_position, row.ids, row.crops)

    def _lowered(self, rows: Sequence[Row], segments: Sequence[Segment]) -> list[Lowered]:
        assert self.models.rpn is not None  # rows are thinned by its map
        depth = self.models.rpn.branch_layer
        return run_lower(self.backbone, [row.prefix for row in rows], segments, depth)

    def _complete(self, rows: Sequence[Row]) -> None:
        """Give the rows prefixes with the KV of all layers."""
        layers = self.backbone.num_layers
        partial = {id(row.prefix): row.prefix for row in rows if len(row.prefix.kv) < layers}
        if not partial:
            return
        whole = dict(zip(partial, complete(self.backbone, [*partial.values()]), strict=True))
        for row in rows:
            if id(row.prefix) in whole:
                row.prefix = whole[id(row.prefix)]
                if row.lowered is not None:
                    row.lowered = replace(row.lowered, prefix=row.prefix)
                self.completed(row)

    def _thin_as_published(self, rows: Sequence[Row]) -> None:
        """Prefill images again, without the cells that are irrelevant to the question."""
        for row in rows:
            limit = row.zoom.thin_above
            large = limit is not None and row.prefix.image_tokens > limit
            if not (row.crops and large and self.models.rpn):
                continue
            keep = relevant_cells(self.models, self.look_of(row))
            (ready,) = self.backbone.preprocess([row.image])
            (features,) = self.backbone.encode([ready])
            segment = self.backbone.prefix_segment(ready, features).select_image_tokens(keep)
            (row.prefix,) = prefill_segments(self.backbone, None, [segment])


def _by_row(
    rows: Sequence[Row], contexts: Sequence[Any], suffixes: Sequence[Segment]
) -> dict[int, tuple[Any, Segment]]:
    return {
        id(row): pair for row, pair in zip(rows, zip(contexts, suffixes, strict=True), strict=True)
    }
