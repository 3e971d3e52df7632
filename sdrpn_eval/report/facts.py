"""The run facts that belong to a run: those of all its processes put together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdrpn_eval.fingerprints import combined
from sdrpn_eval.record import RUN_STAMP
from sdrpn_eval.report.runs import Run

NAME = re.compile(r"run_facts_(?P<run>.+)_rank(?P<rank>\d+)\.json")


@dataclass(frozen=True)
class Facts:
    """See `run_facts`. data, prompts and scorers: fingerprints by task."""

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


def read_facts(run: Run, folders: list[Path]) -> Facts | None:
    """The latest facts in the folders that were begun before the run's results were written."""
    for folder in folders:
        for name in sorted(begun_runs(folder), reverse=True):
            started = moment(name)
            if started is not None and started <= run.ended:
                return _merged([json.loads(p.read_text()) for p in begun_runs(folder)[name]])
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


def _merged(files: list[dict[str, Any]]) -> Facts:
    first = min(files, key=lambda facts: facts["rank"])
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for facts in files:
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
    )
