"""ZoomModel: prefill an image, look for the relevant region, zoom in, answer.

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
from sdrpn.roi.postprocess import Region, region_from_box
from sdrpn.roi.proposers import BY_NAME, Look, Models, Proposal, relevant_cells
from sdrpn.rpn.checkpoint import RPN

logger = logging.getLogger(__name__)

PREFIX_CACHE_SHARE = 0.25
"""Default size of the prefix cache, as a share of the free memory after the model is loaded. A
prefix of LLaVA-1.5-7B in half precision takes 0.3 GiB."""


@dataclass(frozen=True)
class Question:
    """A question and its images.

    Questions with one image can zoom; those with none or several are answered by the stock model.

    Args:
        text: Text of the question, without `<image>`.
        images: Images of any mode, converted to RGB and rotated according to their EXIF data.
            Boxes and regions refer to the pixels of the converted images.
        box: Box to crop, in source pixels, instead of the proposer's.
        zoom: Zoom settings; default: the engine's.

    Raises:
        ValueError: If there is a box, but not exactly one image.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    box: PixelBox | None = None
    zoom: ZoomConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(as_shown(image) for image in self.images))
        if self.box is not None and len(self.images) != 1:
            raise ValueError(f"a box needs one image to crop, got {len(self.images)}")

    @cached_property
    def image_keys(self) -> tuple[str, ...]:
        """Content hash of each image, see `image_key`."""
        return tuple(image_key(image) for image in self.images)


@dataclass(frozen=True)
class Answer:
    """An answer and how it was obtained.

    Args:
        text: The answer.
        regions: Crops, in source pixels; empty without a zoom.
        roi_map: [rows, columns] float32 in [0, 1], blurred; None if the proposer has no map.
        reason: Why there was no zoom; None if there was one.
        image_tokens: Number of image tokens.
        crop_tokens: Number of crop tokens.
        question_tokens: Number of text tokens after the image.
        new_tokens: Number of generated tokens.
        seconds: The batch's time divided by its number of questions.
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

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON object, without the map.

        Returns:
            A dict with regions as [x0, y0, x1, y1] in source pixels.
        """
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
    """Intermediate results of one question in a batch."""

    prefix: Prefix
    question: tuple[int, ...]
    proposal: Proposal
    crops: Sequence[CropTokens]
    suffix: Segment


def _frozen(rpn: RPN, backbone: Backbone) -> RPN:
    """Attach the RPN to the backbone for inference; an RPN in training is copied."""
    if any(p.requires_grad for p in rpn.parameters()):
        rpn = copy.deepcopy(rpn)
    return rpn.attach(backbone).eval().requires_grad_(False)


class ZoomModel:
    """A vision-language model that can zoom into regions of an image; see the module's example.

    An image is prefilled once for all questions about it.

    Args:
        backbone: The base model.
        rpn: A trained RPN; required for proposer `rpn`.
        proposer: `rpn`, `attention`, `vicrop` or `none`.
        zoom: Default zoom settings; default: those saved with the RPN, else the family's.
        labels: Head lists for the attention proposer; default: those saved with the RPN, else the
            published ones.
        prefix_cache: Maximum size of cached image prefixes, in bytes; 0 disables the cache.
            Default: a quarter of the free memory.

    Raises:
        ValueError: If the proposer is unknown, or `rpn` without an RPN.
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
        # Other proposers only use the RPN's settings, and must not run it in prefill.
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
        self._warned_plain = False

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
        """Load a model and an RPN.

        Args:
            pretrained: Folder or Hub id of the base model.
            rpn: Folder or Hub id of an RPN saved by `RPN.save_pretrained` or published by the
                paper's authors.
            proposer: See the class.
            zoom: See the class.
            labels: See the class.
            prefix_cache: See the class.
            rpn_revision: Branch, tag or commit of the RPN's Hub id.
            load: Arguments of `load_backbone`, such as `revision` and `dtype`.

        Raises:
            ValueError: If a file or an argument is invalid.
            OSError: If a model cannot be found or downloaded.
        """
        # Fetch small files first, to fail before gigabytes are downloaded.
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
        """Answer one question about one image.

        Args:
            image: The image.
            question: Text of the question.
            box: Box to crop, in source pixels, instead of the proposer's.
            generation: Generation arguments; see `ask_batch`.

        Raises:
            ValueError: See `ask_batch`.
        """
        return self.ask_batch([Question(question, (image,), box)], generation)[0]

    def ask_batch(
        self, questions: Sequence[Question], generation: Mapping[str, Any] | None = None
    ) -> list[Answer]:
        """Answer a batch of questions, in any mix of images, lengths and zoom settings.

        Args:
            questions: The questions.
            generation: Arguments of transformers' generate() (max_new_tokens, do_sample,
                num_beams, ...; see `sdrpn.inference.generation_arguments`), and `stop`, a list of
                strings that end an answer. Decoding is greedy by default.

        Returns:
            An answer for each question.

        Raises:
            ValueError: If a generation argument is unknown, refused or invalid, or a prompt exceeds
                the model's context.
        """
        with self._discard_on_error(questions):
            generation = check_generation(generation or {}, len(questions))
        stop = generation.get("stop", [])

        def answer(rows: Sequence[_Row]) -> list[list[int]]:
            prefixes, suffixes = [r.prefix for r in rows], [r.suffix for r in rows]
            return generate(self.backbone, prefixes, suffixes, generation)

        def answer_plain(plain: Sequence[Question]) -> list[list[int]]:
            prompts = [self._plain_ids(q) for q in plain]
            images = [image for q in plain for image in q.images]
            return generate_plain(self.backbone, prompts, images, generation)

        start = time.perf_counter()
        with self._discard_on_error(questions):
            results = self._dispatch(questions, answer, answer_plain)
        share = (time.perf_counter() - start) / max(len(questions), 1)
        return [
            replace(result, text=self._decode(ids, stop), new_tokens=len(ids), seconds=share)
            for result, ids in results
        ]

    def _decode(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        text = self.backbone.tokenizer.decode(ids, skip_special_tokens=True)
        for string in stop:
            text = text.split(string)[0]
        return text.strip()

    def loss_batch(
        self, questions: Sequence[Question], continuations: Sequence[str]
    ) -> list[tuple[float, bool, Answer]]:
        """Score given answers.

        Args:
            questions: The questions.
            continuations: Answer to score for each question.

        Returns:
            For each question, the mean loss in nats per token, whether greedy decoding would
            generate the continuation, and an `Answer` without text.

        Raises:
            ValueError: If a continuation is empty, or a prompt exceeds the model's context.
        """
        with self._discard_on_error(questions):
            return self._losses(questions, continuations)

    def _losses(
        self, questions: Sequence[Question], continuations: Sequence[str]
    ) -> list[tuple[float, bool, Answer]]:
        targets = [
            self._continuation_ids(q, c) for q, c in zip(questions, continuations, strict=True)
        ]
        if not all(targets):
            empty = targets.index([])
            raise ValueError(
                f"continuations must not be empty, got {continuations[empty]!r} for question "
                f"{empty}"
            )
        pairs = list(zip(questions, targets, strict=True))
        single = [ids for question, ids in pairs if len(question.images) == 1]
        others = [ids for question, ids in pairs if len(question.images) != 1]

        def score(rows: Sequence[_Row]) -> list[tuple[float, bool]]:
            prefixes, suffixes = [r.prefix for r in rows], [r.suffix for r in rows]
            return losses(self.backbone, prefixes, suffixes, single)

        def score_plain(plain: Sequence[Question]) -> list[tuple[float, bool]]:
            prompts = [self._plain_ids(q) for q in plain]
            images = [image for q in plain for image in q.images]
            return losses_plain(self.backbone, prompts, images, others)

        results = self._dispatch(questions, score, score_plain)
        return [(loss, greedy, answer) for answer, (loss, greedy) in results]

    # --- stages ------------------------------------------------------------------------------

    def prefill(self, images: Sequence[Image.Image]) -> list[Prefix]:
        """Prefill images that are not in the prefix cache; duplicates are prefilled once.

        Args:
            images: The images.

        Returns:
            A prefix for each image.
        """
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
        """Build the cache key of an image's prefix from its content and preprocessing."""
        return f"{content} {dict(self.backbone.preprocessing)}"

    def _prepared(self, ready: ImageInput | None, image: Image.Image) -> ImageInput:
        return self.backbone.preprocess([image])[0] if ready is None else ready

    def prepare(self, questions: Sequence[Question]) -> None:
        """Prefetch: preprocess the images of upcoming questions.

        Thread-safe with the asking thread; the model is not used. The pixels are released when
        their question is asked, also if that fails, or by `forget_prepared`.

        Args:
            questions: Upcoming questions.
        """
        for question in questions:
            if len(question.images) == 1:
                key = self._key(question.image_keys[0])
                with self._ready_lock:
                    done = key in self._ready or key in self.prefixes
                if not done:
                    (ready,) = self.backbone.preprocess(question.images)  # slow: without the lock
                    with self._ready_lock:
                        self._ready[key] = ready

    def forget_prepared(self) -> None:
        """Release the pixels of `prepare`, for questions that are not asked after all."""
        with self._ready_lock:
            self._ready.clear()

    def _take_ready(self, keys: Iterable[str]) -> dict[str, ImageInput | None]:
        with self._ready_lock:
            return {key: self._ready.pop(key, None) for key in keys}

    @contextmanager
    def _discard_on_error(self, questions: Sequence[Question]) -> Iterator[None]:
        """Release the questions' prepared images on errors."""
        try:
            yield
        except BaseException:
            self._take_ready(self._key(q.image_keys[0]) for q in questions if len(q.images) == 1)
            raise

    def look(
        self,
        questions: Sequence[Question],
        prefixes: Sequence[Prefix],
        token_ids: Sequence[tuple[int, ...]],
    ) -> list[Proposal]:
        """Propose regions; a question's own box takes precedence over the proposer.

        Args:
            questions: Questions with one image each.
            prefixes: Prefilled image of each question.
            token_ids: Token ids after the image, for each question.

        Returns:
            A proposal for each question.

        Raises:
            ValueError: If a box exceeds its image.
        """
        proposals: list[Proposal | None] = []
        looks = []
        for question, prefix, ids in zip(questions, prefixes, token_ids, strict=True):
            grid = self.backbone.image_grid(question.images[0])
            if question.box is not None:
                rules = self.backbone.map_rules
                proposals.append(Proposal(region_from_box(question.box, grid, rules)))
                continue
            looks.append(Look(prefix, grid, ids, question.zoom or self.zoom))
            proposals.append(None)
        found = iter(BY_NAME[self.proposer](self.models, looks) if looks else [])
        return [next(found) if p is None else p for p in proposals]

    def _rows(self, questions: Sequence[Question]) -> list[_Row]:
        """Prefill, look and crop, up to generation."""
        images = [q.images[0] for q in questions]
        token_ids = [self.backbone.prompt_ids(q.text).after for q in questions]
        zooms = [q.zoom or self.zoom for q in questions]
        limits = [
            self._max_crop_tokens(image, ids, zoom)
            for image, ids, zoom in zip(images, token_ids, zooms, strict=True)
        ]
        prefixes = self._prefill(images, [q.image_keys[0] for q in questions])
        proposals = self.look(questions, prefixes, token_ids)
        regions = [p.region for p in proposals]
        crops = crop_tokens(self.backbone, images, regions, zooms, limits)
        parts = zip(questions, prefixes, token_ids, proposals, crops, strict=True)
        return [self._row(*part) for part in parts]

    def _max_crop_tokens(self, image: Image.Image, ids: Sequence[int], zoom: ZoomConfig) -> int:
        prefix_length = self.backbone.prefix_length(self.backbone.image_grid(image).cells)
        delimiters = 2 * self.backbone.crop_marks  # policies take two crops at most
        remaining = self._remaining_tokens(prefix_length + len(ids)) - delimiters
        return min(remaining, zoom.max_crop_tokens or self.backbone.context_length)

    def _row(
        self,
        question: Question,
        prefix: Prefix,
        ids: tuple[int, ...],
        proposal: Proposal,
        crops: Sequence[CropTokens],
    ) -> _Row:
        if not crops and proposal.region.boxes:
            reason = "no crop tokens left: the mask keeps none, or the context is full"
            proposal = replace(proposal, region=Region(reason=reason))
        zoom, image = question.zoom or self.zoom, question.images[0]
        prune = zoom.thin_above is not None and prefix.image_tokens > zoom.thin_above
        if crops and self.rpn and prune:
            look = Look(prefix, self.backbone.image_grid(image), ids, zoom)
            prefix = self._prune(look, image)
        suffix = self.backbone.suffix_segment(prefix.next_position, ids, crops)
        return _Row(prefix, ids, proposal, crops, suffix)

    def _prune(self, look: Look, image: Image.Image) -> Prefix:
        """Prefill an image again, without the cells that are irrelevant to the question."""
        keep = relevant_cells(self.models, look)
        (ready,) = self.backbone.preprocess([image])
        (features,) = self.backbone.encode([ready])
        segment = self.backbone.prefix_segment(ready, features).select_image_tokens(keep)
        return prefill_segments(self.backbone, None, [segment])[0]

    def _dispatch(self, questions: Sequence[Question], zoomed: Any, plain: Any) -> list[Any]:
        """Run `zoomed` for questions with one image and `plain` for the others.

        Returns (`Answer` without text, result) for each question.
        """
        single = [i for i, q in enumerate(questions) if len(q.images) == 1]
        others = [i for i, q in enumerate(questions) if len(q.images) != 1]
        results: dict[int, Any] = {}
        if single:
            rows = self._rows([questions[i] for i in single])
            pairs = zip(map(self._answer, rows), zoomed(rows), strict=True)
            results |= zip(single, pairs, strict=True)
        if others:
            self._warn_plain_once()
            without = [questions[i] for i in others]
            answers = [self._plain_answer(q) for q in without]
            results |= zip(others, zip(answers, plain(without), strict=True), strict=True)
        return [results[i] for i in range(len(questions))]

    def _answer(self, row: _Row) -> Answer:
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

    def _plain_answer(self, question: Question) -> Answer:
        reason = "several images" if question.images else "no image"
        images = sum(self.backbone.image_grid(image).cells for image in question.images)
        words = len(self._plain_ids(question)) - len(question.images)
        self._remaining_tokens(words + images)
        return Answer("", (), None, reason, images, 0, words, 0)

    # --- prompts -----------------------------------------------------------------------------

    def _plain_ids(self, question: Question) -> list[int]:
        return self.backbone.plain_ids(question.text, len(question.images))

    def _continuation_ids(self, question: Question, continuation: str) -> list[int]:
        prompt = self._plain_ids(question)
        answer = f" {continuation.strip()}"
        return self.backbone.plain_ids(question.text, len(question.images), answer)[len(prompt) :]

    def _remaining_tokens(self, tokens: int) -> int:
        """Subtract a prompt and one token of the answer from the context length."""
        limit = self.backbone.context_length
        if tokens + 1 > limit:
            raise ValueError(
                f"the prompt has {counted(tokens, 'token')}, {tokens + 1 - limit} too many for a "
                f"context of {limit} with one token to answer: shorten the question"
            )
        return limit - tokens - 1

    def _warn_plain_once(self) -> None:
        if not self._warned_plain and self.proposer != "none":
            logger.warning("prompts with no image or several are answered without a second look")
        self._warned_plain = True
