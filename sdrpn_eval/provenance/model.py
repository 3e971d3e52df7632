"""The provenance of a run in its files, one per process: `run_facts_{run}_rank{r}.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, TypeAdapter

from sdrpn.io.atomic import read_parsed
from sdrpn_eval.provenance.fingerprints import combined
from sdrpn_eval.schemas import Count, Hex

FORMAT = 1
RUN_STAMP = "%Y%m%dT%H%M%S.%fZ"
"""Format of a run's name: the time at which it began, in UTC."""
FILES = "run_facts_*_rank*.json"
NAME = re.compile(r"run_facts_(?P<run>.+)_rank(?P<rank>\d+)\.json")


class TaskFingerprints(BaseModel):
    """Fingerprints of what the score of a task depends on, see `fingerprints`.

    Attributes:
        documents: Number of documents.
        scorer: Of the grader's source and settings; None for a task without one.
        scorer_source: Of its source alone; None in files of older versions.
    """

    model_config = ConfigDict(extra="allow")
    documents: Count = 0
    data: Hex
    prompts: Hex
    generation: str | None = None
    scorer: str | None
    scorer_source: str | None = None


class ParsedArguments(BaseModel):
    """`--model_args` as text and as parsed by lmms-eval, whose parser reports need not import."""

    text: str
    parsed: dict[str, Any]


class Provenance(BaseModel):
    """The provenance of one process of a run, or of all of them (`merge`).

    Attributes:
        run: Name of the run, the same on all ranks.
        arguments: Resolved, with defaults; as given until the model is loaded.
        evaluations: `date` in the results of lmms-eval's evaluations that asked the model; empty in
            files of older versions.
        weights: Hashes of the files of weights, by "use/file name".
        skipped: By task, the number of documents that were not answered as asked (`on_error`).
    """

    model_config = ConfigDict(extra="allow")
    format: int = FORMAT
    run: str
    rank: Count = 0
    world_size: int = 1
    versions: dict[str, str]
    source: dict[str, Any] | None
    arguments: dict[str, Any]
    model_args: ParsedArguments | None = None
    seeds: Any
    device: dict[str, Any]
    weights: dict[str, str]
    tasks: dict[str, TaskFingerprints]
    skipped: dict[str, Count] = {}
    evaluations: list[str] = []
    _files: tuple[Path, ...] = PrivateAttr(())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that this was read from, one a process."""
        return self._files


FACTS = TypeAdapter(Provenance)


def read_provenance(files: Sequence[Path]) -> Provenance:
    """Reads the provenance of one run from the files of its processes.

    Raises:
        ValueError: If a file cannot be read; names the file.
    """
    try:
        parts = [read_parsed(FACTS, file) for file in files]
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; a run without its facts is read too, so delete it") from None
    merged = merge(parts)
    merged._files = tuple(files)
    return merged


def merge(parts: Sequence[Provenance]) -> Provenance:
    """Merges the provenance of a run's processes, each with its share of the documents."""
    tasks: dict[str, list[TaskFingerprints]] = {}
    for part in parts:
        for name, task in part.tasks.items():
            tasks.setdefault(name, []).append(task)
    first = min(parts, key=lambda part: part.rank)
    whole = {
        name: shares[0].model_copy(
            update={
                "documents": sum(share.documents for share in shares),
                "data": combined(share.data for share in shares),
                "prompts": combined(share.prompts for share in shares),
            }
        )
        for name, shares in tasks.items()
    }
    skipped = {name: sum(part.skipped.get(name, 0) for part in parts) for name in tasks}
    return first.model_copy(update={"tasks": whole, "skipped": skipped})


def read_latest(folder: Path, *, asked: bool = False) -> Provenance | None:
    """Reads the provenance of the latest run in a record's folder; None if there is none.

    With `asked`, only of runs that got as far as to ask a question.
    """
    begun = begun_runs(folder)
    for name in sorted(begun, reverse=True):
        if moment(name) is not None:
            found = read_provenance(begun[name])
            if found.tasks or not asked:
                return found
    return None


def begun_runs(folder: Path) -> dict[str, list[Path]]:
    """The files of every run, one per process, by the run's name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(FILES)):
        match = NAME.fullmatch(path.name)
        if match:
            found.setdefault(match["run"], []).append(path)
    return found


def moment(name: str) -> datetime | None:
    """When a run of this name began; None for a name that is not a time."""
    try:
        return datetime.strptime(name, RUN_STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


def parsed_arguments(folders: Iterable[Path], model_args: Any) -> dict[str, Any] | None:
    """`--model_args` by name, as recorded in folders by a run that was given the same text.

    None if no run recorded them, as in version 0.1.
    """
    if not isinstance(model_args, str):
        return None
    for folder in folders:
        for files in begun_runs(folder).values():
            try:
                given = read_parsed(FACTS, files[0]).model_args
            except (OSError, ValueError):  # reported where the file itself is needed
                continue
            if given is not None and given.text == model_args:
                return given.parsed
    return None
