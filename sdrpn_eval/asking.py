"""Batches asked so that neither memory nor one bad document ends the run.

A batch that does not fit the memory is halved, and so are all after it. In one that fails otherwise
each document is asked alone; what becomes of those that fail alone `on_error` decides:
`raise` ends the run, `stock` asks once more without a second look, `empty` gives an empty answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from loguru import logger

from sdrpn.engine import Question
from sdrpn.io.plurals import agree, counted
from sdrpn_eval.fingerprints import without_addresses
from sdrpn_eval.kinds import Said
from sdrpn_eval.questions import Request

NAMED = 5
"""Documents that failed and are named in the log; the record holds all."""

FIRST = 3
"""Documents that fail alike at the start of a run, by which the run is known to be broken."""

Ask = Callable[[Sequence[Request], Sequence[Question]], list[Said]]


class BadDocument(RuntimeError):
    """A document that could not be asked or answered; the message names it and its image."""


class BrokenRun(RuntimeError):
    """The first documents all fail alike: it is no document's fault; the message says how."""


class DoesNotFit(MemoryError):
    """A document that does not fit the memory, even alone."""


@dataclass(frozen=True)
class Outcome:
    """What was said of a request. error: why it was not answered as it was asked.

    question: None where it could not be made, of an image that cannot be decoded, say.
    """

    request: Request
    question: Question | None
    said: Said
    error: str | None = None


@dataclass
class Asker:
    """Asks batches of at most `batch_size`, which shrinks when the memory does not suffice.

    ask: asks a batch. ask_stock: the same without a second look.
    nothing: what is said of a document without an answer. name: a document in words.
    answered: whether any document was answered as it was asked, by an earlier run too.
    failed: (task, document) -> why it was not answered as it was asked.
    """

    ask: Ask
    ask_stock: Ask
    nothing: Callable[[Request], Said]
    name: Callable[[Request], str]
    on_error: str
    batch_size: int
    answered: bool = False
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    _too_many: int = 0

    def __call__(
        self, batch: Sequence[Request], questions: Sequence[Question | Exception]
    ) -> Iterator[list[Outcome]]:
        """Ask a batch; outcomes come in pieces, each to be kept before the next is asked.

        questions: an exception where one could not be made; these come last.
        Raises BadDocument, where `on_error` says so, BrokenRun and DoesNotFit.
        """
        both = list(zip(batch, questions, strict=True))
        waiting = [(r, q) for r, q in both if isinstance(q, Question)]
        while waiting:
            part = waiting[: self.batch_size]
            outcome = self._attempt(self.ask, part)
            if outcome is None:
                continue  # in smaller parts
            waiting = waiting[len(part) :]
            if isinstance(outcome, Exception):
                yield from self._one_by_one(part, outcome)
            else:
                self.answered = True
                yield outcome
        for request, question in both:
            if isinstance(question, Exception):
                yield [self._instead(request, None, question)]

    def _attempt(
        self, ask: Ask, part: Sequence[tuple[Request, Question]]
    ) -> list[Outcome] | Exception | None:
        """The outcomes, or the error; None where it did not fit and is to be tried in halves."""
        requests, questions = zip(*part, strict=True)
        try:
            said = ask(requests, questions)
        except Exception as error:
            if _is_lost(error):
                raise
            if not is_out_of_memory(error):
                return error
            if len(part) == 1:
                raise DoesNotFit(
                    f"{self.name(requests[0])}, with a prompt of {len(requests[0].prompt)} "
                    "characters, does not fit the memory even alone; give a smaller prefix_cache "
                    f"or max_crop_tokens ({_first_line(error)})"
                ) from error
        else:
            self._tell_once()
            return [Outcome(r, q, s) for r, q, s in zip(requests, questions, said, strict=True)]
        # Here, the error and the tensors its frames hold are gone.
        clear_device_cache(garbage_collection=True)
        self._too_many = self._too_many or len(part)
        self.batch_size = (len(part) + 1) // 2
        return None

    def _tell_once(self) -> None:
        if self._too_many:
            logger.warning(
                f"{counted(self._too_many, 'question')} at a time "
                f"{agree(self._too_many, 'does', 'do')} not fit the memory: going "
                "on with "
                f"{self.batch_size}"
            )
        self._too_many = 0

    def _one_by_one(
        self, part: Sequence[tuple[Request, Question]], error: Exception
    ) -> Iterator[list[Outcome]]:
        """Ask the documents of a batch that failed each alone: one of them is bad."""
        failed = 0
        for request, question in part:
            outcome = error if len(part) == 1 else self._attempt(self.ask, [(request, question)])
            if isinstance(outcome, Exception):
                failed += 1
                yield [self._instead(request, question, outcome)]
            elif outcome is not None:
                self.answered = True
                yield outcome
        if not failed:
            if self.on_error == "raise":
                raise error
            logger.warning(
                f"a batch of {counted(len(part), 'question')} failed ({_first_line(error)}), and "
                "each of them "
                "alone did not"
            )

    def _instead(self, request: Request, question: Question | None, error: Exception) -> Outcome:
        """What a document that failed gets, by `on_error`."""
        if self.on_error == "raise":
            raise BadDocument(
                f"{self.name(request)}: {error}; on_error=stock or on_error=empty goes on without "
                "it"
            ) from error
        told = f"{type(error).__name__}: {_first_line(error)}"
        self.failed[request.task, request.doc_id] = told
        self._refuse_broken_run(error, told)
        if self.on_error == "stock" and question is not None:
            plain = replace(question, box=None)
            outcome = self._attempt(self.ask_stock, [(request, plain)])
            if isinstance(outcome, list):
                answer = replace(outcome[0].said.answer, reason="the second look failed")
                return Outcome(request, question, replace(outcome[0].said, answer=answer), told)
        return Outcome(request, question, self.nothing(request), told)

    def _refuse_broken_run(self, error: Exception, told: str) -> None:
        if self.answered or len(self.failed) < FIRST:
            return
        # Numbers are those of a document, as a rule.
        if len({re.sub(r"\d+", "#", one) for one in self.failed.values()}) == 1:
            raise BrokenRun(
                f"the first {len(self.failed)} documents all fail alike ({told}), so it is the run "
                f"that is broken and not a document; on_error={self.on_error} does not go on "
                "without them all"
            ) from error

    def tell_failed(self) -> None:
        """Say which documents failed."""
        named = [f"{doc_id} of {task}: {told}" for (task, doc_id), told in self.failed.items()]
        more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
        logger.warning(
            f"{len(named)} document(s) could not be answered as asked (on_error={self.on_error}): "
            f"{'; '.join(named[:NAMED])}{more}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory did not suffice, the device's or the machine's."""
    kinds = torch.OutOfMemoryError | MemoryError
    if isinstance(error, kinds) or should_reduce_batch_size(error):
        return True
    return "could not create a primitive" in str(error)  # oneDNN's words for it, on a full CPU


def _is_lost(error: Exception) -> bool:
    """Whether the device is of no use any more: after such an error every document fails."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)


def _first_line(error: Exception) -> str:
    return next(iter(without_addresses(error).splitlines()), type(error).__name__)
