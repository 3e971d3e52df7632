"""An engine that answers without a model: what ZoomModel's users see of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question


def echo(question: Question) -> str:
    return f"{question.text}|{len(question.images)}"


class FakeEngine:
    """Answers as told (default: with the question's own words); keeps what it was asked."""

    proposer = "rpn"
    zoom = ZoomConfig(policy="strongest")

    def __init__(self, say: Callable[[Question], str] = echo) -> None:
        self.say = say
        self.batches: list[list[Question]] = []
        self.generations: list[Mapping[str, Any]] = []
        self.prepared = 0

    def _answer(self, q: Question) -> Answer:
        roi_map = np.linspace(0, 0.5, 64, dtype=np.float32).reshape(8, 8) if q.images else None
        return Answer(
            text=self.say(q),
            regions=((1, 2, 3, 4),) if q.images else (),
            roi_map=roi_map,
            reason=None if q.images else "no image",
            image_tokens=64,
            crop_tokens=9,
            question_tokens=5,
            new_tokens=2,
            seconds=0.5,
        )

    def prepare(self, questions: Sequence[Question]) -> None:
        self.prepared += len(questions)

    def forget_prepared(self) -> None:
        """Does nothing, as nothing was kept."""

    def ask_batch(
        self, questions: Sequence[Question], generation: Mapping[str, Any] | None = None
    ) -> list[Answer]:
        self.batches.append(list(questions))
        self.generations.append(generation or {})
        return [self._answer(q) for q in questions]

    def loss_batch(
        self, questions: Sequence[Question], continuations: Sequence[str]
    ) -> list[tuple[float, bool, Answer]]:
        """The longer the continuation, the greater its loss."""
        self.batches.append(list(questions))
        return [
            (float(len(c)), c == " A", self._answer(q))
            for q, c in zip(questions, continuations, strict=True)
        ]
