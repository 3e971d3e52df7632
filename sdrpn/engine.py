"""ZoomModel: prefill an image, look where the answer may be, zoom there, answer.

zoom = ZoomModel.from_pretrained("llava-hf/llava-1.5-7b-hf", rpn="path-or-hub-id")
answer = zoom.ask(image, "What is the number on the player's shirt?")
answer.text, answer.regions, answer.roi_map
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from PIL import Image

from sdrpn.backbones.base import Backbone, CropTokens, ImageInput, Segment
from sdrpn.backbones.registry import check_reachable, load_backbone
from sdrpn.boxes import PixelBox
from sdrpn.config import PROPOSERS, LabelConfig, ZoomConfig
from sdrpn.inference.generation import generate, generate_plain, losses, losses_plain
from sdrpn.inference.generation_arguments import check_generation
from sdrpn.inference.prefix import Prefix, PrefixCache, free_memory, prefill, prefill_segments
from sdrpn.io.checkpoint_files import CONFIG_FILE, Source
from sdrpn.io.images import as_shown, image_key
from sdrpn.io.plurals import counted
from sdrpn.roi.crops import crop_tokens
from sdrpn.roi.postprocess import Region, given
from sdrpn.roi.proposers import BY_NAME, Look, Models, Proposal, cells_looked_at
from sdrpn.rpn.checkpoint import RPN

logger = logging.getLogger(__name__)

PREFIX_CACHE_SHARE = 0.25
"""Of the memory that is free once the model is loaded, unless a number is given. A prefix of
LLaVA-1.5-7B in half precision takes 0.3 GiB."""


@dataclass(frozen=True)
class Question:
    """One question: its text (without `<image>`), its images, and how to zoom.

    One image is looked at twice; none or several are answered as stock LLaVA would.
    images: of any mode; kept as a viewer shows them, in RGB and turned as their EXIF data says,
    which is what boxes and regions count pixels of.
    box: crop this box (source pixels) and ask no proposer. zoom: overrides the engine's settings.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    box: PixelBox | None = None
    zoom: ZoomConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(as_shown(image) for image in self.images))
        if self.box is not None and len(self.images) != 1:
            raise ValueError(f"a box needs one image to be cut from, got {len(self.images)}")

    @cached_property
    def image_keys(self) -> tuple[str, ...]:
        """A name for each image's content, see `image_key`; made once."""
        return tuple(image_key(image) for image in self.images)


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it saw.

    regions: crops taken, in source pixels; empty without a zoom, and `reason` then says why.
    roi_map: [rows, columns] float32 in [0, 1], blurred, None where no map was asked for.
    seconds: this question's share of its batch's time.
    """

    text: str
    regions: tuple[PixelBox, ...]
    roi_map: np.ndarray | None
    reason: str | None
    image_tokens: int
    crop_tokens: int
    question_tokens: int
    new_tokens: int
    seconds: float = 0.0

    def described(self) -> dict[str, Any]:
        """All but the map, as a line of JSON holds it; regions are (x0, y0, x1, y1) in pixels."""
        return {
            "answer": self.text,
            "regions": [[int(edge) for edge in box] for box in self.regions],
            "no_zoom": self.reason,
            "tokens": {
                "image": self.image_tokens,
                "crop": self.crop_tokens,
                "question": self.question_tokens,
                "new": self.new_tokens,
            },
            "seconds": round(self.seconds, 4),
        }


@dataclass(frozen=True)
class _Row:
    """One question on its way through a batch."""

    prefix: Prefix
    question: tuple[int, ...]
    proposal: Proposal
    crops: Sequence[CropTokens]
    suffix: Segment


def _frozen(rpn: RPN, backbone: Backbone) -> RPN:
    """The RPN, ready to be asked; of one in training a copy, which its trainer does not notice."""
    if any(p.requires_grad for p in rpn.parameters()):
        rpn = copy.deepcopy(rpn)
    return rpn.attach(backbone).eval().requires_grad_(False)


class ZoomModel:
    """A vision-language model with a second look; see the module's example.

    Set it up once and ask many times: an image is prefilled once for all questions about it.

    proposer: rpn | attention | vicrop | none. zoom: default thresholds and policy; without one,
    those the RPN was saved with. labels: which heads point, for the attention proposer.
    prefix_cache: bytes of image prefixes kept for later questions; default: a quarter of the memory
    that is free; 0 turns it off.
    """

    def __init__(
        self,
        backbone: Backbone,
        rpn: RPN | None = None,
        *,
        proposer: str = "rpn",
        zoom: ZoomConfig | None = None,
        labels: LabelConfig | None = None,
        prefix_cache: int | None = None,
    ) -> None:
        if proposer not in PROPOSERS:
            raise ValueError(f"proposer must be one of {', '.join(PROPOSERS)}, got {proposer!r}")
        if proposer == "rpn" and rpn is None:
            raise ValueError("proposer 'rpn' needs an RPN: pass rpn=, or another proposer")
        self.backbone = backbone
        # Other proposers read an RPN's settings, and must not pay for running it.
        self.rpn = _frozen(rpn, backbone) if rpn and proposer == "rpn" else None
        self.proposer = proposer
        self.zoom = zoom or (rpn.config.zoom if rpn else backbone.default_zoom)
        labels = labels or (rpn.config.labels if rpn else None) or backbone.published_labels()
        self.models = Models(backbone, self.rpn, labels)
        if prefix_cache is None:
            prefix_cache = int(PREFIX_CACHE_SHARE * free_memory(backbone.device))
        self.prefixes = PrefixCache(prefix_cache)
        self._ready: dict[str, ImageInput] = {}
        self._ready_lock = threading.Lock()
        self._told_plain = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str,
        rpn: str | None = None,
        *,
        proposer: str = "rpn",
        zoom: ZoomConfig | None = None,
        labels: LabelConfig | None = None,
        prefix_cache: int | None = None,
        rpn_revision: str | None = None,
        **load: Any,
    ) -> Self:
        """Load a model and an RPN from folders or hub ids; `load` goes to `load_backbone`.

        rpn: ours, or a checkpoint published by the paper's authors, as it is. rpn_revision: branch,
        tag or commit of its Hub id; `revision` is the base model's.
        """
        # The small files first: gigabytes of one are not fetched where another is refused.
        if rpn and not os.path.isdir(rpn):
            Source(rpn, revision=rpn_revision).fetch(CONFIG_FILE, "an RPN checkpoint")
        check_reachable(pretrained, load.get("revision"), load.get("peft"))
        network = RPN.from_pretrained(rpn, revision=rpn_revision) if rpn else None
        backbone = load_backbone(pretrained, **load)
        return cls(
            backbone,
            network,
            proposer=proposer,
            zoom=zoom,
            labels=labels,
            prefix_cache=prefix_cache,
        )

    # --- asking ------------------------------------------------------------------------------

    def ask(
        self, image: Image.Image, question: str, *, box: PixelBox | None = None, **generation: Any
    ) -> Answer:
        """Answer one question about one image; `generation` as in `ask_batch`."""
        return self.ask_batch([Question(question, (image,), box)], generation)[0]

    def ask_batch(
        self, questions: Sequence[Question], generation: Mapping[str, Any] | None = None
    ) -> list[Answer]:
        """Answer a batch: any mixture of images, questions, lengths, zooms and plain prompts.

        generation: arguments of transformers' generate() (max_new_tokens, do_sample, num_beams,
        ...; `sdrpn.inference.generation_arguments` lists them) and `stop`, a list of strings that
        end an answer. Greedy by default. Raises ValueError for an argument that is unknown or
        cannot be used, and for a prompt that does not fit the model's context, saying by how many
        tokens.
        """
        with self._letting_go(questions):
            generation = check_generation(generation or {}, len(questions))
        stop = generation.get("stop", [])

        def answer(rows: Sequence[_Row]) -> list[list[int]]:
            prefixes, suffixes = [r.prefix for r in rows], [r.suffix for r in rows]
            return generate(self.backbone, prefixes, suffixes, generation)

        def answer_plain(asked: Sequence[Question]) -> list[list[int]]:
            prompts = [self._plain_ids(q) for q in asked]
            images = [image for q in asked for image in q.images]
            return generate_plain(self.backbone, prompts, images, generation)

        def finish(answer: Answer, ids: list[int]) -> Answer:
            text = self.backbone.tokenizer.decode(ids, skip_special_tokens=True)
            for string in stop:
                text = text.split(string)[0]
            return replace(answer, text=text.strip(), new_tokens=len(ids))

        started = time.perf_counter()
        with self._letting_go(questions):
            results = self._in_two_ways(questions, answer, answer_plain)
        share = (time.perf_counter() - started) / max(len(questions), 1)
        return [replace(finish(seen, ids), seconds=share) for seen, ids in results]

    def loss_batch(
        self, questions: Sequence[Question], continuations: Sequence[str]
    ) -> list[tuple[float, bool, Answer]]:
        """Score given answers: (mean loss in nats a token, greedy would say it, what it saw)."""
        with self._letting_go(questions):
            return self._losses(questions, continuations)

    def _losses(
        self, questions: Sequence[Question], continuations: Sequence[str]
    ) -> list[tuple[float, bool, Answer]]:
        wanted = [
            self._continuation_ids(q, c) for q, c in zip(questions, continuations, strict=True)
        ]
        if not all(wanted):
            raise ValueError("a continuation to score is empty")
        one = [ids for q, ids in zip(questions, wanted, strict=True) if len(q.images) == 1]
        others = [ids for q, ids in zip(questions, wanted, strict=True) if len(q.images) != 1]

        def score(rows: Sequence[_Row]) -> list[tuple[float, bool]]:
            prefixes, suffixes = [r.prefix for r in rows], [r.suffix for r in rows]
            return losses(self.backbone, prefixes, suffixes, one)

        def score_plain(asked: Sequence[Question]) -> list[tuple[float, bool]]:
            prompts = [self._plain_ids(q) for q in asked]
            images = [image for q in asked for image in q.images]
            return losses_plain(self.backbone, prompts, images, others)

        results = self._in_two_ways(questions, score, score_plain)
        return [(loss, greedy, seen) for seen, (loss, greedy) in results]

    # --- stations ----------------------------------------------------------------------------

    def prefill(self, images: Sequence[Image.Image]) -> list[Prefix]:
        """Prefill images, each distinct one once, from the cache where it is warm."""
        return self._prefill(images, [image_key(image) for image in images])

    def _prefill(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[Prefix]:
        keys = [self._key(key) for key in keys]
        known = {key: self.prefixes.get(key) for key in keys}
        ready = self._take_ready(known)
        fresh = [key for key, prefix in known.items() if prefix is None]
        if fresh:
            inputs = [self._prepared(ready[key], images[keys.index(key)]) for key in fresh]
            new = prefill(self.backbone, self.rpn, inputs)
            for key, prefix in zip(fresh, new, strict=True):
                known[key] = prefix
                self.prefixes.put(key, prefix)
        return [prefix for key in keys if (prefix := known[key]) is not None]

    def _key(self, content: str) -> str:
        """What an image's prefix is kept under: its content, and how it is preprocessed."""
        return f"{content} {dict(self.backbone.preprocessing)}"

    def _prepared(self, ready: ImageInput | None, image: Image.Image) -> ImageInput:
        return self.backbone.preprocess([image])[0] if ready is None else ready

    def prepare(self, questions: Sequence[Question]) -> None:
        """Preprocess the images of questions to come, ahead of time.

        Meant for a thread beside the one that asks: it touches the images, not the model. Pixels
        are kept until their question is asked, whatever becomes of it, or until `forget_prepared`.
        """
        for question in questions:
            if len(question.images) == 1:
                key = self._key(question.image_keys[0])
                with self._ready_lock:
                    needless = key in self._ready or key in self.prefixes
                if not needless:
                    (ready,) = self.backbone.preprocess(question.images)  # slow: without the lock
                    with self._ready_lock:
                        self._ready[key] = ready

    def forget_prepared(self) -> None:
        """Let go of what `prepare` made for questions that are not asked after all."""
        with self._ready_lock:
            self._ready.clear()

    def _take_ready(self, keys: Iterable[str]) -> dict[str, ImageInput | None]:
        with self._ready_lock:
            return {key: self._ready.pop(key, None) for key in keys}

    @contextmanager
    def _letting_go(self, questions: Sequence[Question]) -> Iterator[None]:
        """Let go of the questions' prepared images where asking fails before it takes them."""
        try:
            yield
        except BaseException:
            self._take_ready(self._key(q.image_keys[0]) for q in questions if len(q.images) == 1)
            raise

    def look(
        self,
        questions: Sequence[Question],
        prefixes: Sequence[Prefix],
        words: Sequence[tuple[int, ...]],
    ) -> list[Proposal]:
        """Ask the proposer where the answers are; a given box is taken as it is.

        words: token ids behind the image, question by question.
        """
        proposals: list[Proposal | None] = []
        looks = []
        for question, prefix, ids in zip(questions, prefixes, words, strict=True):
            grid = self.backbone.image_grid(question.images[0])
            if question.box is not None:
                rules = self.backbone.map_rules
                proposals.append(Proposal(given(question.box, grid, rules)))
                continue
            looks.append(Look(prefix, grid, ids, question.zoom or self.zoom))
            proposals.append(None)
        found = iter(BY_NAME[self.proposer](self.models, looks) if looks else [])
        return [next(found) if p is None else p for p in proposals]

    def _rows(self, questions: Sequence[Question]) -> list[_Row]:
        images = [q.images[0] for q in questions]
        words = [self.backbone.prompt_ids(q.text).after for q in questions]
        before = [self.backbone.prefix_length(self.backbone.image_grid(i).cells) for i in images]
        zooms = [q.zoom or self.zoom for q in questions]
        marks = 2 * self.backbone.crop_marks  # no policy takes more than two crops
        rooms = [
            min(
                self._room(start + len(w)) - marks,
                zoom.max_crop_tokens or self.backbone.context_length,
            )
            for start, w, zoom in zip(before, words, zooms, strict=True)
        ]
        prefixes = self._prefill(images, [q.image_keys[0] for q in questions])
        proposals = self.look(questions, prefixes, words)
        regions = [p.region for p in proposals]
        crops = crop_tokens(self.backbone, images, regions, zooms, rooms)
        parts = zip(questions, prefixes, words, proposals, crops, strict=True)
        return [self._row(*one) for one in parts]

    def _row(
        self,
        question: Question,
        prefix: Prefix,
        word: tuple[int, ...],
        proposal: Proposal,
        crops: Sequence[CropTokens],
    ) -> _Row:
        if not crops and proposal.region.boxes:
            reason = "no crop token left: none kept by the mask, or no room in the context"
            proposal = replace(proposal, region=Region(reason=reason))
        zoom, image = question.zoom or self.zoom, question.images[0]
        thins = zoom.thin_above is not None and prefix.image_tokens > zoom.thin_above
        if crops and self.rpn and thins:
            look = Look(prefix, self.backbone.image_grid(image), word, zoom)
            prefix = self._thinned(look, image)
        suffix = self.backbone.suffix_segment(prefix.next_position, word, crops)
        return _Row(prefix, word, proposal, crops, suffix)

    def _thinned(self, look: Look, image: Image.Image) -> Prefix:
        """The image read again, without the cells that the question does not look at."""
        keep = cells_looked_at(self.models, look)
        (ready,) = self.backbone.preprocess([image])
        (features,) = self.backbone.encode([ready])
        whole = self.backbone.prefix_segment(ready, features)
        return prefill_segments(self.backbone, None, [whole.keeping(keep)])[0]

    def _in_two_ways(self, questions: Sequence[Question], zoomed: Any, plain: Any) -> list[Any]:
        """Split a batch into questions on one image and the others; results in the given order."""
        one = [i for i, q in enumerate(questions) if len(q.images) == 1]
        others = [i for i, q in enumerate(questions) if len(q.images) != 1]
        results: dict[int, Any] = {}
        if one:
            rows = self._rows([questions[i] for i in one])
            results |= zip(one, zip(map(self._seen, rows), zoomed(rows), strict=True), strict=True)
        if others:
            self._tell_plain_once()
            asked = [questions[i] for i in others]
            seen = [self._seen_plain(q) for q in asked]
            results |= zip(others, zip(seen, plain(asked), strict=True), strict=True)
        return [results[i] for i in range(len(questions))]

    def _seen(self, row: _Row) -> Answer:
        region = row.proposal.region
        return Answer(
            text="",
            regions=region.boxes,
            roi_map=row.proposal.roi_map,
            reason=region.reason,
            image_tokens=row.prefix.image_tokens,
            crop_tokens=sum(len(crop.tokens) for crop in row.crops),
            question_tokens=len(row.question),
            new_tokens=0,
        )

    def _seen_plain(self, question: Question) -> Answer:
        reason = "several images" if question.images else "no image"
        images = sum(self.backbone.image_grid(image).cells for image in question.images)
        words = len(self._plain_ids(question)) - len(question.images)
        self._room(words + images)
        return Answer("", (), None, reason, images, 0, words, 0)

    # --- prompts -----------------------------------------------------------------------------

    def _plain_ids(self, question: Question) -> list[int]:
        return self.backbone.plain_ids(question.text, len(question.images))

    def _continuation_ids(self, question: Question, continuation: str) -> list[int]:
        asked = self._plain_ids(question)
        answer = f" {continuation.strip()}"
        return self.backbone.plain_ids(question.text, len(question.images), answer)[len(asked) :]

    def _room(self, tokens: int) -> int:
        """Tokens the context still holds behind a prompt, one kept for the answer."""
        limit = self.backbone.context_length
        if tokens + 1 > limit:
            raise ValueError(
                f"the prompt has {counted(tokens, 'token')}, {tokens + 1 - limit} too many for a "
                "context of "
                f"{limit} with one token to answer: shorten the question"
            )
        return limit - tokens - 1

    def _tell_plain_once(self) -> None:
        if not self._told_plain and self.proposer != "none":
            logger.warning("prompts with no image or several are answered without a second look")
        self._told_plain = True
