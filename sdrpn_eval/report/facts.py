"""The run facts that belong to a run: those of all its processes put together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdrpn.files import read_parsed
from sdrpn_eval.fingerprints import combined
from sdrpn_eval.record import RUN_STAMP
from sdrpn_eval.report.runs import BadRun, Run
from sdrpn_eval.schemas import FACTS, TaskMarks

NAME = re.compile(r"run_facts_(?P<run>.+)_rank(?P<rank>\d+)\.json")


@dataclass(frozen=True)
class Facts:
    """See `run_facts`. data, prompts and scorers: fingerprints by task; documents: how many;
    skipped: how many of them were not answered as asked.

    files: one a process, which all this was read from.
    """

    run: str
    versions: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    seeds: Any = None
    source: Mapping[str, Any] | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    scorers: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    files: Sequence[Path] = ()


def read_facts(run: Run, folders: list[Path]) -> Facts | None:
    """The latest facts in the folders that were begun before the run's results were written.

    Another model may have written its results beside ours: it leaves no facts.
    """
    if run.model != "llava_sdrpn":
        return None
    for folder in folders:
        found = read_latest(folder, run.ended)
        if found is not None:
            return found
    return None


def read_latest(
    folder: Path, before: datetime | None = None, *, asked: bool = False
) -> Facts | None:
    """The latest facts in a folder, of those begun `before`; None without any.

    asked: only of runs that came as far as to ask something.
    """
    begun = begun_runs(folder)
    for name in sorted(begun, reverse=True):
        started = moment(name)
        if started is not None and (before is None or started <= before):
            found = _merged(begun[name])
            if found.documents or not asked:
                return found
    return None


def begun_runs(folder: Path) -> dict[str, list[Path]]:
    """Run name -> its facts files, one a process."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("run_facts_*_rank*.json")):
        match = NAME.fullmatch(path.name)
        if match:
            found.setdefault(match["run"], []).append(path)
    return found


def moment(name: str) -> datetime | None:
    """When a run of that name began; None for a name that is no time."""
    try:
        return datetime.strptime(name, RUN_STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


def _merged(files: Sequence[Path]) -> Facts:
    try:
        read = [read_parsed(FACTS, file) for file in files]
    except (OSError, ValueError) as error:
        raise BadRun(f"{error}; a run without its facts is read too, so delete it") from None
    first = min(read, key=lambda facts: facts["rank"])
    tasks: dict[str, list[TaskMarks]] = {}
    for facts in read:
        for task, marks in facts["tasks"].items():
            tasks.setdefault(task, []).append(marks)
    return Facts(
        run=first["run"],
        versions=first["versions"],
        weights=first["weights"],
        arguments=first["arguments"],
        device=first["device"],
        seeds=first["seeds"],
        source=first["source"],
        data={t: combined(m["data"] for m in marks) for t, marks in tasks.items()},
        prompts={t: combined(m["prompts"] for m in marks) for t, marks in tasks.items()},
        scorers={t: marks[0]["scorer"] for t, marks in tasks.items() if marks[0]["scorer"]},
        documents={t: sum(m.get("documents", 0) for m in marks) for t, marks in tasks.items()},
        skipped={t: sum(f.get("skipped", {}).get(t, 0) for f in read) for t in tasks},
        files=tuple(files),
    )
