"""The two request types of lmms-eval: to answer in words, and to score given words.

A type knows how to ask the engine, and gives the fields of the record's line. What lmms-eval gets
back is made from that line, so it is the same for a new line and for one of an earlier run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts

from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn_eval.generation import translate
from sdrpn_eval.record import RecordLine, describe_answer
from sdrpn_eval.requests import Request

NO_ANSWER = describe_answer(Answer("", (), None, "not answered", 0, 0, 0, 0))

Fields = dict[str, Any]
"""Fields of a line of the record, by their names in JSON."""


class LossAndGreedy(tuple):
    """(loss, greedy) in the form that lmms-eval 0.7.3 can carry.

    Its evaluator turns a plain pair into text, so the pair travels in a GenerationResult. Its
    response cache would return text, so `strip`, which it calls, returns nothing to store.
    """

    def strip(self) -> tuple[()]:
        return ()


def result(line: RecordLine) -> GenerationResult:
    """What lmms-eval gets for a line of the record.

    A loss that could not be computed is infinite: the least likely of the options.
    """
    if line.is_loss:
        loss = math.inf if line.loss is None else line.loss
        return GenerationResult(LossAndGreedy((loss, line.greedy)))  # type: ignore[arg-type]
    prompt = line.tokens["image"] + line.tokens["crop"] + line.tokens["question"]
    return GenerationResult(line.answer, TokenCounts(prompt, line.tokens["new"]))


class GenerateUntil:
    """Requests that are answered in words."""

    name = "generate_until"

    def __init__(self, requests: Sequence[Request]) -> None:
        self._arguments = {r.index: translate(r.extra) for r in requests}

    def asked(self, request: Request) -> Any:
        """What decides the answer apart from prompt and document, for JSON; None when sampling."""
        arguments = self._arguments[request.index]
        return None if arguments["do_sample"] else arguments

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Fields]:
        """Asks a batch of equal generation arguments."""
        generation = self._arguments[requests[0].index]
        return [describe_answer(a) for a in engine.ask_batch(questions, generation=generation)]

    def unanswered(self, request: Request) -> Fields:
        """The fields of a document that cannot be answered."""
        return NO_ANSWER


class Loglikelihood:
    """Requests for the mean loss of a continuation and whether greedy decoding would give it.

    The loss and not its negative: lmms-eval's multiple-choice tasks take the smallest.
    """

    name = "loglikelihood"

    def __init__(self, continuation: Callable[[Request], str]) -> None:
        self._continuation = continuation

    def asked(self, request: Request) -> Any:
        """The continuation; None if it cannot be had."""
        try:
            return self._continuation(request)
        except Exception:  # raised again in `ask`, whose caller knows what to do about it
            return None

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Fields]:
        """Scores a batch."""
        continuations = [self._continuation(r) for r in requests]
        scored = engine.loss_batch(questions, continuations)
        return [
            {**describe_answer(seen), "continuation": text, "loss": loss, "greedy": greedy}
            for text, (loss, greedy, seen) in zip(continuations, scored, strict=True)
        ]

    def unanswered(self, request: Request) -> Fields:
        """The fields of a document that cannot be scored."""
        continuation = self.asked(request)
        return {**NO_ANSWER, "continuation": continuation, "loss": None, "greedy": False}


RequestType = GenerateUntil | Loglikelihood
"""How requests of one type are asked."""
