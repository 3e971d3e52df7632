"""Baselines: a run's scores document by document, and its provenance, in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sdrpn.io.atomic import as_json, read_object, read_parsed
from sdrpn_eval.provenance.fingerprints import digest, without_addresses
from sdrpn_eval.results.comparability import SCORING, Evidence
from sdrpn_eval.results.compare import cluster_keys
from sdrpn_eval.results.read import BESIDE
from sdrpn_eval.results.scores import task_scores
from sdrpn_eval.schemas import EXACT, FINITE

FORMAT = 1
MARK = 8
"""Hex digits of a digest of a prompt and target, or of an image."""


@dataclass(frozen=True)
class MetricBaseline:
    """A metric's scores in the order of the task's documents; None for those it does not count."""

    __pydantic_config__ = FINITE
    higher_is_better: bool
    mean: float
    scores: list[float | None]


@dataclass(frozen=True)
class TaskBaseline:
    """A task's documents and scores.

    Attributes:
        questions: Digest of each document's prompt and target.
        images: Digest of each document's images; None without a record.
        clusters: A number per document, equal for questions on one image.
        scorer: Fingerprint of the scorer's source; None if the run left no facts.
        settings: Digest of `scoring`, the scorer's settings.
        metrics: By "metric,filter", in lmms-eval's order.
    """

    __pydantic_config__ = EXACT
    documents: list[int]
    questions: list[str]
    images: list[str | None]
    clusters: list[int]
    clustered_by: str
    empty_answers: int
    scorer: str | None
    settings: str
    metrics: dict[str, MetricBaseline]
    scoring: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """The content of a baseline file.

    Attributes:
        made_of: Versions, weights, arguments, device and seeds, if the run left its facts.
        written_on: Versions and machine that wrote the file.
        tolerance: The largest fall that passes, by task; "" for all others.
    """

    __pydantic_config__ = FINITE
    run: str
    date: str
    model: str
    model_args: str
    made_of: dict[str, Any] | None
    written_on: dict[str, Any]
    tasks: dict[str, TaskBaseline]
    tolerance: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    def data(self, task: str) -> str | None:
        """The fingerprint of a task's data; None if the run did not record it."""
        return ((self.made_of or {}).get("data") or {}).get(task)

    def save(self, path: Path) -> None:
        """Writes JSON that diffs well: a line per field, and a line per list."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_lines(asdict(self)) + "\n", encoding="utf-8")


READ = TypeAdapter(Baseline)


def make_baseline(evidence: Evidence, tolerance: Mapping[str, float]) -> Baseline:
    """The baseline of a run. Raises ValueError if no task has a score per document."""
    run, facts = evidence.run, evidence.facts
    tasks = {name: task_baseline(evidence, name) for name in run.tasks}
    scored = {name: task for name, task in tasks.items() if task.metrics}
    if not scored:
        raise ValueError(f"{run.folder}: no task has a score a document to hold later runs against")
    names = ("versions", "weights", "arguments", "device", "seeds", "source")
    made_of: dict[str, Any] | None = {n: getattr(facts, n) for n in names} if facts else None
    if facts and made_of:
        made_of["data"] = {name: task.data for name, task in facts.tasks.items()}
        made_of["prompts"] = {name: task.prompts for name, task in facts.tasks.items()}
    return Baseline(
        run=str(run.file),
        date=str(run.results["date"]),
        model=run.model,
        model_args=str(run.results["config"].get("model_args") or ""),
        made_of=made_of,
        written_on=_this_machine(),
        tasks=scored,
        tolerance=dict(tolerance),
    )


def _this_machine() -> dict[str, Any]:
    # Imported here: takes seconds, which a check against a baseline does not need.
    import torch

    from sdrpn_eval.provenance.collect import device_facts, versions

    return {"versions": versions(), **device_facts(torch.device("cpu"))}


def task_baseline(evidence: Evidence, name: str) -> TaskBaseline:
    """A task of a run in the form of a baseline, which is also how it is checked."""
    task = evidence.run.tasks[name]
    documents = sorted(task.samples)
    how, keys = cluster_keys([evidence], name)
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys[name, d] for d in documents))}
    looks = [evidence.record.looks.get((name, d)) for d in documents]
    samples = [task.samples[d] for d in documents]
    marks = evidence.fingerprints(name)
    scoring = {part: without_addresses(task.config.get(part)) for part in SCORING}
    return TaskBaseline(
        documents=documents,
        questions=[mark(s.prompt, s.target) for s in samples],
        images=[mark(*look.images) if look and look.images else None for look in looks],
        clusters=[numbers[keys[name, d]] for d in documents],
        clustered_by=how,
        # Blank, or each of several.
        empty_answers=sum(not s.answer.replace(BESIDE.strip(), "").strip() for s in samples),
        scorer=(marks.scorer or None) if marks else None,
        settings=mark(*scoring.values()),
        metrics={
            f"{one.metric},{one.filter}": MetricBaseline(
                one.higher_is_better,
                sum(one.values.values()) / len(one.values),
                [one.values.get((name, d)) for d in documents],
            )
            for one in task_scores(task)
            if one.values
        },
        scoring=scoring,
    )


def mark(*parts: str) -> str:
    """A short digest of texts."""
    return f"{digest(*parts):032x}"[:MARK]


def read_baseline(path: Path) -> Baseline:
    """Reads a baseline file. Raises ValueError, naming it, if it is missing or invalid."""
    try:
        made = read_object(path).get("format")
        if made != FORMAT:
            raise ValueError(f"its format is {made}, this version reads {FORMAT}")
        found = read_parsed(READ, path)
        for name, task in found.tasks.items():
            columns = [task.questions, task.images, task.clusters]
            columns += [metric.scores for metric in task.metrics.values()]
            if {*map(len, columns)} != {len(task.documents)} or not task.metrics:
                raise ValueError(
                    f"{name} has not one mark, cluster and score for each of its documents"
                )
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; make it from a good run with --update") from None
    except ValueError as error:
        raise ValueError(f"{path} is no baseline, make it anew with --update: {error}") from None
    return found


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line per key and a line per list."""
    if not isinstance(value, dict) or not value:
        return as_json(value, ensure_ascii=False)
    inner = indent + "  "
    parts = [f"{inner}{json.dumps(str(k))}: {_lines(v, inner)}" for k, v in value.items()]
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
