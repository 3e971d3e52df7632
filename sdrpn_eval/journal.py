"""The record as a journal: a restarted run does not repeat what an earlier one answered.

The key of a line is a hash of everything that its answer depends on: weights and the settings files
beside them, code, package versions, settings, document, prompt and generation arguments. Batch size
and device are left out: in float32 they change no answer, and in half precision no more than
another batch size within one run does.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loguru import logger

import sdrpn
from sdrpn.config import ZoomConfig
from sdrpn.io.plurals import agree, counted
from sdrpn_eval.provenance.collect import Collector, versions, weights_only
from sdrpn_eval.provenance.fingerprints import digest, visuals_fingerprint
from sdrpn_eval.record import RecordLine, RecordWriter, lines_of
from sdrpn_eval.request_types import RequestType
from sdrpn_eval.requests import Request

SETTINGS = ("proposer", "padding", "system_prompt", "attn_implementation", "load_in_4bit")
SETTINGS += ("min_pixels", "max_pixels", "short_answer")
"""Arguments that change an answer and are part of neither the weights nor a ZoomConfig."""


class Journal:
    """Writes the record of one process, and finds the lines of earlier runs in its folder.

    A model in memory has no weight files to hash, so its lines have no key and are not reused.

    Args:
        provenance: Of this process; its folder is the record's.
        uses: Which of the weights in `loading.sources` the model has: `pretrained`, `rpn`, `peft`.
        dtype: Data type of the model.
    """

    def __init__(self, provenance: Collector, uses: Sequence[str], dtype: str) -> None:
        self.provenance = provenance
        self.writer = RecordWriter(provenance.folder, provenance.rank)
        self._uses = uses
        self._dtype = dtype
        self._visuals: dict[str, str] = {}

    def key(self, request: Request, kind: RequestType, zoom: ZoomConfig) -> str | None:
        """The key of a request's line; None for sampled answers and for weights without a hash."""
        asked = kind.asked(request)
        if self._system is None or asked is None:
            return None
        if request.task not in self._visuals:
            self._visuals[request.task] = visuals_fingerprint(request.doc_to_visual)
        parts = [
            self._system,
            _text(asdict(zoom)),
            *(kind.name, request.task, request.split, str(request.doc_id)),
            str(self.provenance.documents[request.task][request.doc_id]),
            self._visuals[request.task],
            request.prompt,
            _text(asked),
        ]
        return f"{digest(*parts):032x}"

    def earlier(
        self, requests: Sequence[Request], key: Callable[[Request], str | None]
    ) -> dict[int, RecordLine]:
        """Copies lines of earlier runs that answer these requests to this run, by request index.

        `key` returns a request's key; not called if no earlier run left lines with keys.
        """
        known: dict[str | None, RecordLine] = {
            line.key: line
            for task in dict.fromkeys(r.task for r in requests)
            for line in lines_of(self.writer.folder, task)
            if line.run != self.provenance.run and line.key and not line.error
        }
        found = [(r, known[then]) for r in requests if known and (then := key(r)) in known]
        marks = {"run": self.provenance.run, "resumed": True}
        ours = [
            (r, line.model_copy(update=marks | {"origin": line.origin or line.run}))
            for r, line in found
        ]
        self.keep(ours)
        if found:
            logger.info(
                f"{len(found)} of {counted(len(requests), 'answer')} "
                f"{agree(len(found), 'stands', 'stand')} in the record of an earlier run, of the "
                "same weights, settings and prompts, and not asked again; resume=false asks all "
                "anew"
            )
        return {request.index: line for request, line in ours}

    def keep(self, lines: Iterable[tuple[Request, RecordLine]]) -> None:
        """Writes the lines of requests, except for those that only pad lmms-eval's batches."""
        self.writer.append(line for request, line in lines if not request.padding_only)

    @functools.cached_property
    def _system(self) -> str | None:
        """Hash of model, settings and code, once the weights are hashed; None without hashes."""
        hashes = self.provenance.hashes.result()
        self.provenance.write()  # now with the hashes
        hashed = {name.partition("/")[0] for name in weights_only(hashes)}
        if not self._uses or not hashed.issuperset(self._uses):
            return None
        settings = {name: self.provenance.arguments.get(name) for name in SETTINGS}
        made_of = [hashes, settings, self._dtype, versions(), source_digest()]
        return f"{digest(_text(made_of)):032x}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@functools.cache
def source_digest() -> str:
    """Hash of the source code: after a bug fix, old answers are not reused."""
    method, plugin = Path(sdrpn.__file__).parent, Path(__file__).parent
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted([*method.rglob("*.py"), *plugin.glob("*.py")]):
        whole.update(file.read_bytes())
    return whole.hexdigest()
