"""Handling of documents that fail: `on_error=raise`, `stock` or `empty`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import format_exception

from loguru import logger

from sdrpn.io.resumable import first_line

NAMED = 5
"""Number of failed documents that are named in the log; the record holds all."""

FIRST = 3
"""Number of documents failing alike at the start after which the run is considered broken."""


class BadDocument(RuntimeError):
    """Raised for a document that could not be answered; names it and its image."""


class BrokenRun(RuntimeError):
    """Raised if the first documents all fail with the same error."""


@dataclass
class Failures:
    """The documents of a run that were not answered as asked.

    Attributes:
        on_error: `raise`, `stock` or `empty`.
        reasons: By (task, document id).
    """

    on_error: str
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)

    def add(
        self, document: tuple[str, int], name: Callable[[], str], error: Exception, answered: bool
    ) -> str:
        """Adds a document that failed, (task, document id), and returns the reason in one line.

        `answered` says whether any document was answered as asked, also by an earlier run.

        Raises:
            BadDocument: With `on_error=raise`.
            BrokenRun: If nothing was answered and the first documents all fail alike.
        """
        if self.on_error == "raise":
            raise BadDocument(
                f"{name()}: {error}; on_error=stock or on_error=empty goes on without it"
            ) from error
        why = f"{type(error).__name__}: {first_line(error)}"
        self.reasons[document] = why
        # Numbers usually belong to the document.
        alike = len({re.sub(r"\d+", "#", one) for one in self.reasons.values()}) == 1
        if not answered and alike and len(self.reasons) >= FIRST:
            raise BrokenRun(
                f"the first {len(self.reasons)} documents all fail alike ({why}), so it is the run "
                f"that is broken and not a document; on_error={self.on_error} does not go on "
                "without them all"
            ) from error
        return why

    def report(self) -> None:
        """Logs which documents failed."""
        named = [f"{doc_id} of {task}: {why}" for (task, doc_id), why in self.reasons.items()]
        more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
        logger.warning(
            f"{len(named)} document(s) could not be answered as asked (on_error={self.on_error}): "
            f"{'; '.join(named[:NAMED])}{more}"
        )


@contextmanager
def ending_all(world_size: int) -> Iterator[None]:
    """Turns an error in one of several processes into exit code 1.

    lmms-eval logs an error and exits with 0, which launchers take for success while the other
    processes continue and then wait for this one. On exit code 1, torchrun and accelerate end them
    within seconds.
    """
    try:
        yield
    except Exception as error:
        if world_size == 1:
            raise
        told = "".join(format_exception(error))
        logger.error(f"{told}Ending all {world_size} processes.")
        raise SystemExit(1) from error
