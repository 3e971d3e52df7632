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
from dataclasses import replace
from typing import Any, Self

from PIL import Image

from sdrpn.backbones.base import Backbone, ImageInput
from sdrpn.backbones.registry import check_reachable, load_backbone
from sdrpn.boxes import PixelBox
from sdrpn.config import PROPOSERS, LabelConfig, ZoomConfig
from sdrpn.inference.generation import generate_plain, losses_plain
from sdrpn.inference.generation_arguments import check_generation
from sdrpn.inference.prefix import Prefix, PrefixCache, free_memory, prefill
from sdrpn.io.checkpoint_files import CONFIG_FILE, Source
from sdrpn.io.images import image_key
from sdrpn.io.plurals import counted
from sdrpn.question import Answer, Question
from sdrpn.roi.proposers import Models, Proposal
from sdrpn.rpn.checkpoint import RPN
from sdrpn.second_look import Row, SecondLook

__all__ = ["Answer", "Question", "ZoomModel"]

logger = logging.getLogger(__name__)

PREFIX_CACHE_SHARE = 0.25
"""Default size of the prefix cache, as a share of the free memory after the model is loaded. A
prefix of LLaVA-1.5-7B in half precision takes 0.3 GiB."""


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
        self.second_look = SecondLook(self.models, proposer, self._keep_completed)
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

        def answer(rows: Sequence[Row]) -> list[list[int]]:
            return self.second_look.answer(rows, generation)

        def answer_plain(plain: Sequence[Question]) -> list[list[int]]:
            prompts = [self._plain_ids(q) for q in plain]
            images = [image for q in plain for image in q.images]
            return generate_plain(self.backbone, prompts, images, generation)

        start = time.perf_counter()
        with self._discard_on_error(questions):
            results = self._dispatch(questions, generation, answer, answer_plain)
        share = (time.perf_counter() - start) / max(len(questions), 1)
        return [self._in_words(result, ids, stop, share) for result, ids in results]

    def as_answer(self, row: Row, ids: Sequence[int], stop: Sequence[str] = ()) -> Answer:
        """Make an answer of a row after all stages and its token ids."""
        return self._in_words(self._answer(row), ids, stop)

    def _in_words(
        self, answer: Answer, ids: Sequence[int], stop: Sequence[str], seconds: float = 0.0
    ) -> Answer:
        text = self.backbone.tokenizer.decode(ids, skip_special_tokens=True)
        for string in stop:
            text = text.split(string)[0]
        return replace(answer, text=text.strip(), new_tokens=len(ids), seconds=seconds)

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

        def score(rows: Sequence[Row]) -> list[tuple[float, bool]]:
            return self.second_look.losses(rows, single)

        def score_plain(plain: Sequence[Question]) -> list[tuple[float, bool]]:
            prompts = [self._plain_ids(q) for q in plain]
            images = [image for q in plain for image in q.images]
            return losses_plain(self.backbone, prompts, images, others)

        results = self._dispatch(questions, {}, score, score_plain)
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

    def _prefill(
        self, images: Sequence[Image.Image], keys: Sequence[str], lower_only: Sequence[bool] = ()
    ) -> list[Prefix]:
        """Prefill images that are not cached; `lower_only` is one flag per image, see `prefill`."""
        keys = [self._key(key) for key in keys]
        lower = {key for key, flag in zip(keys, lower_only, strict=False) if flag}
        known = {key: self.prefixes.get(key) for key in keys}
        ready = self._take_ready(known)
        fresh = [
            key
            for key, prefix in known.items()
            if prefix is None or (key in lower and prefix.hidden is None)
        ]
        for chosen in ([k for k in fresh if k in lower], [k for k in fresh if k not in lower]):
            if not chosen:
                continue
            inputs = [self._prepared(ready[key], images[keys.index(key)]) for key in chosen]
            new = prefill(self.backbone, self.rpn, inputs, lower_only=chosen[0] in lower)
            for key, prefix in zip(chosen, new, strict=True):
                known[key] = prefix
                self.prefixes.put(key, prefix, replace=True)
        return [prefix for key in keys if (prefix := known[key]) is not None]

    def _keep_completed(self, row: Row) -> None:
        """Replace a cached prefix by one with more layers."""
        key = self._key(row.question.image_keys[0])
        if key in self.prefixes:
            self.prefixes.put(key, row.prefix, replace=True)

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
        rows = [
            Row(question, question.zoom or self.zoom, prefix, ids, 0)
            for question, prefix, ids in zip(questions, prefixes, token_ids, strict=True)
        ]
        self.second_look.look(rows)
        return [row.proposal for row in rows]

    def _rows(self, questions: Sequence[Question], generation: Mapping[str, Any]) -> list[Row]:
        """Prefill, gate, look and crop, up to the answer."""
        rows = self.prepared_rows(questions)
        self.second_look.run(rows, generation)
        return rows

    def prepared_rows(
        self, questions: Sequence[Question], keep_hidden: bool | None = None
    ) -> list[Row]:
        """Tokenize questions with one image each and prefill the images.

        Args:
            questions: The questions.
            keep_hidden: Whether prefixes hold the hidden states that thinned answers need; default:
                as their zoom settings say.

        Raises:
            ValueError: If a prompt exceeds the model's context.
        """
        images = [q.images[0] for q in questions]
        token_ids = [self.backbone.prompt_ids(q.text).after for q in questions]
        zooms = [q.zoom or self.zoom for q in questions]
        limits = [
            self.crop_room(image, ids, zoom)
            for image, ids, zoom in zip(images, token_ids, zooms, strict=True)
        ]
        lower_only = [
            self.rpn is not None
            and q.box is None
            and (zoom.keep_tokens is not None if keep_hidden is None else keep_hidden)
            for q, zoom in zip(questions, zooms, strict=True)
        ]
        prefixes = self._prefill(images, [q.image_keys[0] for q in questions], lower_only)
        parts = zip(questions, zooms, prefixes, token_ids, limits, strict=True)
        return [Row(*part) for part in parts]

    def crop_room(self, image: Image.Image, ids: Sequence[int], zoom: ZoomConfig) -> int:
        """Return the maximum number of crop tokens of a question.

        Args:
            image: Its image.
            ids: Token ids after the image.
            zoom: Its zoom settings.

        Raises:
            ValueError: If the prompt exceeds the model's context.
        """
        prefix_length = self.backbone.prefix_length(self.backbone.image_grid(image).cells)
        delimiters = 2 * self.backbone.crop_marks  # policies take two crops at most
        remaining = self._remaining_tokens(prefix_length + len(ids)) - delimiters
        return min(remaining, zoom.crop_tokens or self.backbone.context_length)

    def _dispatch(
        self,
        questions: Sequence[Question],
        generation: Mapping[str, Any],
        zoomed: Any,
        plain: Any,
    ) -> list[Any]:
        """Run `zoomed` for questions with one image and `plain` for the others.

        Returns (`Answer` without text, result) for each question.
        """
        single = [i for i, q in enumerate(questions) if len(q.images) == 1]
        others = [i for i, q in enumerate(questions) if len(q.images) != 1]
        results: dict[int, Any] = {}
        if single:
            rows = self._rows([questions[i] for i in single], generation)
            found = zoomed(rows)
            pairs = zip(map(self._answer, rows), found, strict=True)
            results |= zip(single, pairs, strict=True)
        if others:
            self._warn_plain_once()
            without = [questions[i] for i in others]
            answers = [self._plain_answer(q) for q in without]
            results |= zip(others, zip(answers, plain(without), strict=True), strict=True)
        return [results[i] for i in range(len(questions))]

    def _answer(self, row: Row) -> Answer:
        region = row.proposal.region
        return Answer(
            text="",
            regions=region.boxes,
            roi_map=row.proposal.roi_map,
            reason=region.reason,
            image_tokens=row.prefix.image_tokens,
            crop_tokens=sum(len(crop.tokens) for crop in row.crops),
            question_tokens=len(row.ids),
            new_tokens=0,
            confidence=row.confidence,
            gate=row.proposal.gate,
            first_tokens=len(row.first_answer or []),
            encoded_tokens=sum(crop.encoded for crop in row.crops),
            kept_tokens=int(row.kept.sum()) if row.thins else None,
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
