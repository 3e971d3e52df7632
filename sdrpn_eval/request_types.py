"""The two request types of lmms-eval: to answer in words, and to score words that are given.

A type knows how to ask the engine and what the record's line holds of it; what lmms-eval gets back
is made of that line, so it is the same whether the line is new or an earlier run's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lmms_eval.api.instance import GenerationResult, TokenCounts

from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn_eval.generation import translate
from sdrpn_eval.record import RecordLine, describe_answer
from sdrpn_eval.requests import Request

NO_ANSWER = describe_answer(Answer("", (), None, "not answered", 0, 0, 0, 0))

Fields = dict[str, Any]
"""Fields of a line of the record, by their names in JSON."""


class LossAndGreedy(tuple):
    """(loss, greedy) as lmms-eval 0.7.3 can carry it.

    Its evaluator turns a plain pair into text, so the pair travels in a GenerationResult; its
    response cache would give text back, so `strip` (which it calls) says: nothing to store.
    """

    def strip(self) -> tuple[()]:
        return ()


def result(line: RecordLine) -> GenerationResult:
    """What lmms-eval gets for a line of the record.

    A loss that could not be had is infinite: the least likely of the options.
    """
    if line.is_loss:
        loss = math.inf if line.loss is None else line.loss
        return GenerationResult(LossAndGreedy((loss, line.greedy)))  # type: ignore[arg-type]
    prompt = line.tokens["image"] + line.tokens["crop"] + line.tokens["question"]
    return GenerationResult(line.answer, TokenCounts(prompt, line.tokens["new"]))


class RequestType(Protocol):
    """How requests of one type are asked."""

    name: str

    def asked(self, request: Request) -> Any:
        """What decides the answer beside prompt and document, for JSON; None for chance."""
        ...

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Fields]:
        """Ask a batch of equal generation arguments."""
        ...

    def unanswered(self, request: Request) -> Fields:
        """The fields of a document that cannot be answered."""
        ...


class GenerateUntil:
    """Answers in words."""

    name = "generate_until"

    def __init__(self, requests: Sequence[Request]) -> None:
        self._arguments = {r.index: translate(r.extra) for r in requests}

    def asked(self, request: Request) -> Any:
        arguments = self._arguments[request.index]
        return None if arguments["do_sample"] else arguments

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Fields]:
        generation = self._arguments[requests[0].index]
        return [describe_answer(a) for a in engine.ask_batch(questions, generation=generation)]

    def unanswered(self, request: Request) -> Fields:
        return NO_ANSWER


class Loglikelihood:
    """Mean loss of each continuation and whether greedy decoding would give it.

    The loss and not its negative: lmms-eval's multiple-choice tasks take the smallest.
    """

    name = "loglikelihood"

    def __init__(self, continuation: Callable[[Request], str]) -> None:
        self._continuation = continuation

    def asked(self, request: Request) -> Any:
        try:
            return self._continuation(request)
        except Exception:  # raised again where it is asked, which knows what to do about it
            return None

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Fields]:
        continuations = [self._continuation(r) for r in requests]
        scored = engine.loss_batch(questions, continuations)
        return [
            {**describe_answer(seen), "continuation": text, "loss": loss, "greedy": greedy}
            for text, (loss, greedy, seen) in zip(continuations, scored, strict=True)
        ]

    def unanswered(self, request: Request) -> Fields:
        return {
            **NO_ANSWER,
            "continuation": self.asked(request),
            "loss": None,
            "greedy": False,
        }
