"""The record as a journal: a run that is started again asks nothing that an earlier one answered.

A line's key hashes all its answer depends on: the weights and the files beside them, the code,
package versions, settings, document, prompt and generation arguments. Not in it: batch size and
device. In float32 they change no answer; in half precision a few, which the rest of an interrupted
run would have differed in at another batch size as well.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loguru import logger

import sdrpn
from sdrpn.config import ZoomConfig
from sdrpn.io.plurals import agree, counted
from sdrpn_eval.fingerprints import digest, visuals_fingerprint
from sdrpn_eval.kinds import Kind
from sdrpn_eval.questions import Request
from sdrpn_eval.record import RecordWriter, lines_of
from sdrpn_eval.run_facts import RunFacts, versions, weights_only

SETTINGS = ("proposer", "padding", "system_prompt", "attn_implementation", "load_in_4bit")
"""Arguments that change an answer and stand neither in the weights nor in a ZoomConfig."""


class Journal:
    """What one process of a run writes into its record folder, and finds there.

    sources: where the weights are, see `loading.sources`. dtype: the model's.
    A model in memory has no weights to hash, so its lines have no key and are never found again.
    """

    def __init__(
        self,
        writer: RecordWriter,
        facts: RunFacts,
        sources: Mapping[str, str | None],
        dtype: str,
    ) -> None:
        self.writer = writer
        self.facts = facts
        self._uses = [use for use, source in sources.items() if source]
        self._dtype = dtype
        self._visuals: dict[str, str] = {}

    def key(self, request: Request, kind: Kind, zoom: ZoomConfig) -> str | None:
        """The key of a request's line; None where its answer cannot be told from another's, or is
        left to chance."""
        asked = kind.asked(request)
        if self._system is None or asked is None:
            return None
        if request.task not in self._visuals:
            self._visuals[request.task] = visuals_fingerprint(request.doc_to_visual)
        parts = [
            self._system,
            _text(asdict(zoom)),
            *(kind.name, request.task, request.split, str(request.doc_id)),
            str(self.facts.documents[request.task][request.doc_id]),
            self._visuals[request.task],
            request.prompt,
            _text(asked),
        ]
        return f"{digest(*parts):032x}"

    def earlier(
        self, requests: Sequence[Request], key: Callable[[Request], str | None]
    ) -> dict[int, dict[str, Any]]:
        """Lines of earlier runs that answer these requests, by the request's index.

        key: gives a request its key; not called where no earlier run left any. The lines become
        this run's, so that its record is whole.
        """
        known: dict[str | None, str] = {
            then: text
            for task in dict.fromkeys(r.task for r in requests)
            for text, line in lines_of(self.writer.folder, task)
            if line["run"] != self.writer.run
            and (then := line.get("key"))
            and not line.get("error")
        }
        if not known:
            return {}
        found = {}
        for request in requests:
            text = known.get(key(request))
            if text is not None:
                line = json.loads(text)
                run = line.pop("run")
                found[request.index] = {"from": run, **line, "resumed": True}
        again = [r for r in requests if r.index in found]
        self.keep(again, [found[r.index] for r in again])
        if found:
            logger.info(
                f"{len(found)} of {counted(len(requests), 'answer')} "
                f"{agree(len(found), 'stands', 'stand')} in the record of an "
                "earlier run, "
                "of the same weights, settings and prompts, and not asked again; resume=false "
                "asks all anew"
            )
        return found

    def keep(self, requests: Sequence[Request], lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of requests; lmms-eval's padding repeats another's and has none."""
        both = zip(requests, lines, strict=True)
        self.writer.append(line for request, line in both if not request.padding_only)

    @functools.cached_property
    def _system(self) -> str | None:
        """What answers, hashed; waits for the weights' hashes. None where these are not known."""
        hashes = self.facts.hashes.result()
        self.facts.write()  # now with them
        hashed = {name.partition("/")[0] for name in weights_only(hashes)}
        if not self._uses or not hashed.issuperset(self._uses):
            return None
        settings = {name: self.facts.arguments[name] for name in SETTINGS}
        made_of = [hashes, settings, self._dtype, versions(), source_digest()]
        return f"{digest(_text(made_of)):032x}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@functools.cache
def source_digest() -> str:
    """Of the code that answers: a mended fault must not get the old answers."""
    method, plugin = Path(sdrpn.__file__).parent, Path(__file__).parent
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted([*method.rglob("*.py"), *plugin.glob("*.py")]):
        whole.update(file.read_bytes())
    return whole.hexdigest()
