"""The two kinds of requests: to answer in words, and to score words that are given.

A kind knows how to ask the engine and what the record's line holds of it; what lmms-eval gets back
is made of that line, so it is the same whether the line is new or an earlier run's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmms_eval.api.instance import GenerationResult, TokenCounts

from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn_eval.generation import translate
from sdrpn_eval.questions import Request
from sdrpn_eval.record import describe_answer

NO_ANSWER = Answer("", (), None, "not answered", 0, 0, 0, 0)


@dataclass(frozen=True)
class Said:
    """An answer, and what a line of the record holds beside it."""

    answer: Answer
    more: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """These fields of the record's line."""
        return describe_answer(self.answer) | dict(self.more)


class LossAndGreedy(tuple):
    """(loss, greedy) as lmms-eval 0.7.3 can carry it.

    Its evaluator turns a plain pair into text, so the pair travels in a GenerationResult; its
    response cache would give text back, so `strip` (which it calls) says: nothing to store.
    """

    def strip(self) -> tuple[()]:
        return ()


def result(line: Mapping[str, Any]) -> GenerationResult:
    """What lmms-eval gets for a line of the record.

    A loss that could not be had is infinite: the least likely of the options.
    """
    if "loss" in line:
        loss = math.inf if line["loss"] is None else line["loss"]
        return GenerationResult(LossAndGreedy((loss, line["greedy"])))  # type: ignore[arg-type]
    tokens = line["tokens"]
    prompt = tokens["image"] + tokens["crop"] + tokens["question"]
    return GenerationResult(line["answer"], TokenCounts(prompt, tokens["new"]))


class Kind(Protocol):
    """How requests of one type are asked."""

    name: str

    def asked(self, request: Request) -> Any:
        """What decides the answer beside prompt and document, for JSON; None for chance."""
        ...

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Said]:
        """Ask a batch of equal generation arguments."""
        ...

    def nothing(self, request: Request) -> Said:
        """What is said of a document that cannot be answered."""
        ...


class Words:
    """Answers in words, `generate_until`."""

    name = "generate_until"

    def __init__(self, requests: Sequence[Request]) -> None:
        self._arguments = {r.index: translate(r.extra) for r in requests}

    def asked(self, request: Request) -> Any:
        arguments = self._arguments[request.index]
        return None if arguments["do_sample"] else arguments

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Said]:
        generation = self._arguments[requests[0].index]
        return [Said(answer) for answer in engine.ask_batch(questions, generation=generation)]

    def nothing(self, request: Request) -> Said:
        return Said(NO_ANSWER)


class Losses:
    """Mean loss of each continuation and whether greedy decoding would give it, `loglikelihood`.

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
    ) -> list[Said]:
        continuations = [self._continuation(r) for r in requests]
        scored = engine.loss_batch(questions, continuations)
        return [
            Said(answer, {"continuation": text, "loss": loss, "greedy": greedy})
            for text, (loss, greedy, answer) in zip(continuations, scored, strict=True)
        ]

    def nothing(self, request: Request) -> Said:
        more = {"continuation": self.asked(request), "loss": None, "greedy": False}
        return Said(NO_ANSWER, more)
