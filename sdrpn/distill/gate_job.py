"""The labelling job of the learned gate: views of every question as JSON lines, resumable."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from pydantic import TypeAdapter

from sdrpn.batch_inference import AnswerFile, AnswerJob, Line, as_line
from sdrpn.config import ZoomConfig
from sdrpn.distill.gate_labels import (
    NO_ANSWER,
    NO_CONTROL,
    NO_REGION,
    GateConfig,
    Losses,
    Views,
    control_boxes,
    label,
    needs_ladder,
    shrunk,
)
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.io.atomic import as_json, parsed
from sdrpn.io.questions import ImageQuestion
from sdrpn.roi.proposers import Look, last_states

COMMAND = "sdrpn train-gate"
LABELS_FILE = "gate_labels.jsonl"
FAILED = "the question could not be asked"

STATE = "state"
"""Key of the RPN's state in a line: float32, base64."""

VIEWS = TypeAdapter(Views)
VIEW_NAMES = tuple(field.name for field in fields(Views))

ALWAYS_STANDS = 1e-9
"""`ZoomConfig.gate` that any answer with a token passes."""
NO_CELL = 1 - 1e-9
"""`ZoomConfig.threshold` that no cell passes."""


def without_zoom(zoom: ZoomConfig) -> ZoomConfig:
    """Return settings that answer without a zoom and note how sure the answer is."""
    return replace(zoom, gate=ALWAYS_STANDS, threshold=NO_CELL, keep_tokens=None, thin_above=None)


@dataclass(frozen=True)
class GateSample:
    """A labelled question.

    Args:
        image: Name of its image.
        state: [C] state of the RPN at the last prompt token.
        label: 1 if a zoom helps, else 0.
        confidence: Smallest probability of a token of the answer without a zoom.
    """

    image: str
    state: Float32[np.ndarray, " width"]
    label: int
    confidence: float


class GateJob(AnswerJob):
    """Asks for the views of every question and writes them; see `AnswerJob`.

    A line has the views, and the RPN's state of questions with a region. A question that cannot be
    asked has a line with the error.

    Args:
        zoom: The model, with an RPN.
        questions: What to ask.
        images: Folder that the image paths start from.
        out: Folder for `gate_labels.jsonl`.
        config: The rule, which decides the views; and the thresholds of the zooms.
        batch_size: Questions at a time.
        max_new_tokens: Longest answer.

    Raises:
        ValueError: If an option is out of range, or `out` was begun with other settings.
    """

    def __init__(
        self,
        zoom: ZoomModel,
        questions: Sequence[ImageQuestion],
        images: Path,
        out: Path,
        config: GateConfig,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 128,
    ) -> None:
        self.config = config
        file = AnswerFile(out / LABELS_FILE, COMMAND)
        super().__init__(
            zoom,
            questions,
            images,
            file,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            on_error="empty",
        )

    def settings(self) -> dict[str, Any]:
        """What decides the lines; `kappa` only decides what is made of them."""
        thresholds = self.config.thresholds_for(self.zoom.zoom)
        return super().settings() | {"rule": self.config.rule, "thresholds": thresholds}

    def _ask(self, batch: Sequence[ImageQuestion], questions: Sequence[Question]) -> list[Line]:
        views, states = view_batch(self.zoom, questions, self.config, self.generation)
        return [
            as_line(asked, **asdict(view), **({} if state is None else {STATE: as_text(state)}))
            for asked, view, state in zip(batch, views, states, strict=True)
        ]


def view_batch(
    zoom: ZoomModel,
    questions: Sequence[Question],
    config: GateConfig,
    generation: dict[str, Any],
) -> tuple[list[Views], list[Float32[np.ndarray, " width"] | None]]:
    """Ask for the views of a batch that the rule needs.

    Args:
        zoom: The model, with an RPN.
        questions: Questions with one image each.
        config: The rule and the thresholds.
        generation: Arguments of `ZoomModel.ask_batch`.

    Returns:
        The views of each question, and the RPN's state, [C]; None without a region.
    """
    views = _Batch(zoom, questions, config, generation).run()
    asked = [i for i, one in enumerate(views) if one.reason is None]
    states: list[Any] = [None] * len(questions)
    if asked:
        some = [questions[i] for i in asked]
        for i, state in zip(asked, rpn_states(zoom, some), strict=True):
            states[i] = state
    return views, states


def rpn_states(
    zoom: ZoomModel, questions: Sequence[Question]
) -> Float32[np.ndarray, "questions width"]:
    """Compute the input of the learned gate: the RPN's state of the last prompt token.

    Args:
        zoom: The model, with an RPN.
        questions: Questions with one image each.

    Returns:
        [n, C].
    """
    backbone = zoom.backbone
    images = [question.images[0] for question in questions]
    looks = [
        Look(prefix, backbone.image_grid(image), backbone.prompt_ids(q.text).after, zoom.zoom)
        for prefix, image, q in zip(zoom.prefill(images), images, questions, strict=True)
    ]
    return last_states(zoom.models, looks).cpu().numpy()


class _Batch:
    """The views of a batch; later ones are only asked for where earlier ones need them."""

    def __init__(
        self,
        zoom: ZoomModel,
        questions: Sequence[Question],
        config: GateConfig,
        generation: dict[str, Any],
    ) -> None:
        self.zoom, self.questions, self.config = zoom, questions, config
        self.generation = generation
        base = replace(zoom.zoom, gate=None, learned_gate=None)
        first, second = config.thresholds_for(base)
        self.first, self.second = replace(base, threshold=first), replace(base, threshold=second)
        self.stock = without_zoom(base)

    def run(self) -> list[Views]:
        zoomed = self._answers(range(len(self.questions)), self.first)
        found = [Views(reason=NO_REGION) for _ in self.questions]
        some = [i for i, answer in zoomed.items() if answer.regions]
        for i, stock in self._answers(some, self.stock).items():
            reason = None if zoomed[i].text else NO_ANSWER
            found[i] = Views(zoomed[i].text, stock.text, confidence=stock.confidence, reason=reason)
        if self.config.rule == "agreement":
            return found
        some = [i for i in some if found[i].reason is None]
        for i, second in self._answers(some, self.second).items():
            found[i] = replace(found[i], second_zoom=second.text)
        self._climb(found, zoomed, [i for i in some if needs_ladder(found[i])])
        return found

    def _climb(self, found: list[Views], zoomed: dict[int, Answer], some: list[int]) -> None:
        """Ask about the shrunk image, and score the zoomed answer under all views."""
        grid = self.zoom.backbone.image_grid
        controls: dict[int, list[Question]] = {}
        for i in some:
            image, roi_map = self.questions[i].images[0], zoomed[i].roi_map
            assert roi_map is not None
            boxes = control_boxes(roi_map, grid(image), zoomed[i].regions)
            controls[i] = [replace(self.questions[i], box=box, zoom=self.first) for box in boxes]
            if not boxes:
                found[i] = replace(found[i], reason=NO_CONTROL)
        some = [i for i in some if controls[i]]
        small = {}
        for i in some:
            (image,) = self.questions[i].images
            small[i] = replace(self.questions[i], images=(shrunk(image, grid(image)),))
        for i, answer in self._answers(some, self.stock, small).items():
            found[i] = replace(found[i], shrunk=answer.text)
        for i, losses in self._losses(some, controls, found).items():
            found[i] = replace(found[i], losses=losses)

    def _answers(
        self,
        some: Iterable[int],
        settings: ZoomConfig,
        questions: dict[int, Question] | None = None,
    ) -> dict[int, Answer]:
        """Ask some questions of the batch with these settings."""
        chosen = list(some)
        asked = [replace((questions or self.questions)[i], zoom=settings) for i in chosen]
        if not asked:
            return {}
        return dict(zip(chosen, self.zoom.ask_batch(asked, self.generation), strict=True))

    def _losses(
        self, some: Sequence[int], controls: dict[int, list[Question]], found: Sequence[Views]
    ) -> dict[int, Losses]:
        """Losses of the zoomed answers under all views."""
        asked = [
            (i, replace(self.questions[i], zoom=settings))
            for i in some
            for settings in (self.stock, self.first)
        ]
        asked += [(i, one) for i in some for one in controls[i]]
        losses: dict[int, list[float]] = {i: [] for i in some}
        size = len(self.questions)
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            answers = [found[i].zoom or "" for i, _ in part]
            scored = self.zoom.loss_batch([one for _, one in part], answers)
            for (i, _), (loss, _, _) in zip(part, scored, strict=True):
                losses[i].append(round(loss, 6))
        return {i: Losses(own[0], own[1], tuple(own[2:])) for i, own in losses.items()}


def as_text(state: Float32[np.ndarray, " width"]) -> str:
    """Encode a state for a JSON line."""
    return b64encode(np.ascontiguousarray(state, dtype="<f4").tobytes()).decode()


def as_state(text: Any) -> Float32[np.ndarray, " width"]:
    """Decode a state of a JSON line; raises ValueError if it is none."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"{STATE} is missing")
    return np.frombuffer(b64decode(text), dtype="<f4").astype(np.float32)


def labelled(lines: Iterable[Line], config: GateConfig) -> tuple[list[GateSample], Counter[str]]:
    """Label the lines of a job.

    Args:
        lines: Lines of `GateJob`.
        config: The rule.

    Returns:
        The labelled questions, and the number of ignored ones by reason.

    Raises:
        ValueError: If a line is not one of `GateJob`.
    """
    samples, ignored = [], Counter[str]()
    for line in lines:
        if "error" in line:
            ignored[FAILED] += 1
            continue
        try:
            views = parsed(VIEWS, as_json({name: line.get(name) for name in VIEW_NAMES}))
            found, reason = label(views, config)
            if found is None:
                ignored[str(reason)] += 1
            elif views.confidence is None:
                raise ValueError("confidence is missing")
            else:
                state = as_state(line.get(STATE))
                samples.append(GateSample(line["image"], state, found, views.confidence))
        except ValueError as error:
            raise ValueError(
                f"the line of question {line['id']!r} in {LABELS_FILE} is broken ({error}); delete "
                "it and start the same command again"
            ) from None
    return samples, ignored
