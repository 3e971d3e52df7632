"""The run facts that belong to a run: those of all its processes put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sdrpn.io.atomic import read_parsed
from sdrpn_eval.arguments import ARGUMENTS, unquoted
from sdrpn_eval.fingerprints import combined
from sdrpn_eval.record import RUN_STAMP
from sdrpn_eval.results.read import BadRun, Run
from sdrpn_eval.schemas import FACTS, TaskMarks

SET_BACK = timedelta(seconds=2)
"""What a clock may be set back by while a run starts."""
NAME = re.compile(r"run_facts_(?P<run>.+)_rank(?P<rank>\d+)\.json")


@dataclass(frozen=True)
class Facts:
    """See `run_facts`. data, prompts and scorers: fingerprints by task; scorer_sources: of the
    scorers' code without their settings, None where an older version wrote the facts; documents:
    how many; skipped: how many of them were not answered as asked.

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
    scorer_sources: Mapping[str, str | None] = field(default_factory=dict)
    documents: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    files: Sequence[Path] = ()


def read_facts(run: Run, folders: list[Path]) -> Facts | None:
    """The run's own facts, see `own_name`; None where no folder holds them.

    Another model may have written its results beside ours: it leaves no facts.
    """
    if run.model != "llava_sdrpn":
        return None
    for folder in folders:
        begun = begun_runs(folder)
        name = own_name(run, begun, folder)
        if name is not None:
            return _merged(begun[name])
    return None


def own_name(run: Run, names: Iterable[str], folder: Path) -> str | None:
    """Which of the runs that left something in a folder is the one that left these results.

    A run is named by the time when its model was made. lmms-eval's command line makes it right
    after the time that stands in the results, so it is the first one of those that began while the
    evaluation ran, and that has its arguments: others may run in the same folder at the same time.
    From Python the model may be older, and a run scored anew has the record of the one it is from:
    there it is the last one that began before the results were written.

    Args:
        names: of runs, as in facts and records; those that are no time are left out.
        folder: where their facts are.

    Returns:
        One of the names; None where all are other runs'.
    """
    begun = sorted(name for name in set(names) if (at := moment(name)) and at <= run.ended)
    if not run.by_command_line:
        return begun[-1] if begun else None
    inside = [name for name in begun if _moment(name) >= run.began - SET_BACK]
    if len(inside) > 1:
        inside = [name for name in inside if not _has_other_arguments(run, name, folder)]
    # After its time stands before just before it.
    return min(inside, key=lambda name: (_moment(name) < run.began, name), default=None)


def _has_other_arguments(run: Run, name: str, folder: Path) -> bool:
    """Whether a run's facts tell of other arguments than the results do."""
    files = begun_runs(folder).get(name)
    recorded = _merged(files).arguments if files else {}
    for argument, value in run.arguments.items():
        # A prompt may be named by its file, and is recorded as its text.
        if argument in ARGUMENTS and argument in recorded and argument != "system_prompt":
            try:
                given = ARGUMENTS[argument].check(unquoted(value))
            except ValueError:  # of another version
                continue
            if given != recorded[argument]:
                return True
    return False


def read_latest(folder: Path, *, asked: bool = False) -> Facts | None:
    """The latest facts in a folder; None without any.

    asked: only of runs that came as far as to ask something.
    """
    begun = begun_runs(folder)
    for name in sorted(begun, reverse=True):
        if moment(name) is not None:
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


def _moment(name: str) -> datetime:
    at = moment(name)
    assert at is not None  # names that are no time are left out before
    return at


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
        scorer_sources={t: marks[0].get("scorer_source") for t, marks in tasks.items()},
        documents={t: sum(m.get("documents", 0) for m in marks) for t, marks in tasks.items()},
        skipped={t: sum(f.get("skipped", {}).get(t, 0) for f in read) for t in tasks},
        files=tuple(files),
    )
