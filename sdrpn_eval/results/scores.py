"""Scores per document and metric, or the reason why there are none.

A metric is compared question by question only if the mean over its documents is the score that
lmms-eval reports. For POPE it is not: the `score` of its documents in `pope_f1_score` is the
accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrpn_eval.results.read import Run, TaskRun, as_number, is_number, read_totals

Document = tuple[str, int]
"""(task, document id): a group holds documents of several tasks."""

DIVIDED_BY: Mapping[str, float] = {"ocrbench_accuracy": 1000}
"""Metrics that lmms-eval sums and divides by the size of the whole data set, even with a limit."""

AGREE = 1e-6


@dataclass(frozen=True)
class Scores:
    """A metric of a task or group.

    Attributes:
        total: The score that lmms-eval printed.
        values: By document; None if they do not give the total.
        reason: Why `values` is None.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    total: float | None
    values: Mapping[Document, float] | None
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.metric, self.filter


def document_value(value: Any, score_key: str = "score") -> float | None:
    """A document's score: a number, or that under `score_key`; else None."""
    if isinstance(value, Mapping):
        value = value.get(score_key)
    return as_number(value)


def task_scores(task: TaskRun) -> list[Scores]:
    """All metrics of a task, in lmms-eval's order."""
    return [_metric(task, key, total) for key, total in task.totals.items()]


def _metric(task: TaskRun, key: str, total: float | None) -> Scores:
    metric, _, filter_name = key.rpartition(",")
    score_key = task.config.get("score_key") or "score"
    found = {
        (task.name, sample.doc_id): document_value(sample.values[key], score_key)
        for sample in task.samples.values()
        if key in sample.values
    }
    # An entry without a score is a document outside the metric's group.
    values = {document: v for document, v in found.items() if v is not None}
    reason = _why_not(metric, total, list(values.values()))
    better = task.higher_is_better.get(metric) is not False
    return Scores(task.name, metric, filter_name, better, total, None if reason else values, reason)


def _why_not(metric: str, total: float | None, values: list[float]) -> str:
    """Why the documents' scores do not give the metric; empty if they do."""
    if total is None:
        return "has no number, such as a file to hand in"
    if not values:
        return "its documents carry no number each"
    if not all(math.isfinite(v) for v in values):
        return "some of its documents have the score NaN"
    mean = float(np.mean(values))
    expected = [mean, 100 * mean]
    if metric in DIVIDED_BY:
        expected.append(sum(values) / DIVIDED_BY[metric])
    if not any(math.isclose(e, total, rel_tol=AGREE, abs_tol=AGREE) for e in expected):
        return f"is no mean over documents: theirs is {mean:.4g}, the score is {total:.4g}"
    return ""


def group_scores(run: Run, group: str) -> list[Scores]:
    """A group's metrics over the documents of all its tasks; empty if a task is missing."""
    names = run.groups[group]
    if not set(names) <= set(run.tasks):
        return []
    members = {s.key: s for name in names for s in task_scores(run.tasks[name])}
    found = []
    for key, total in read_totals(run.results["results"].get(group, {})).items():
        metric, _, filter_name = key.rpartition(",")
        parts = [members.get((name, metric, filter_name)) for name in names]
        values = {d: v for part in parts if part for d, v in (part.values or {}).items()}
        if not is_number(total):
            reason = "has no number"
        elif any(part is None or part.values is None for part in parts):
            reason = "not all of its tasks have a score a document"
        else:
            reason = _why_not(metric, total, list(values.values()))
        better, kept = all(p.higher_is_better for p in parts if p), None if reason else values
        found.append(Scores(group, metric, filter_name, better, total, kept, reason))
    return found


def all_scores(run: Run, tasks: list[str]) -> dict[tuple[str, str, str], Scores]:
    """All metrics of tasks, and of the groups that consist of them."""
    found = [s for name in tasks for s in task_scores(run.tasks[name])]
    found += [
        s
        for g, names in run.groups.items()
        if set(names) <= set(tasks)
        for s in group_scores(run, g)
    ]
    return {s.key: s for s in found}
