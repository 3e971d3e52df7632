"""Score over threshold, task by task.

A run without `threshold=` used the published one of each task and has a row of its own; a run that
needs none (stock, ViCrop) is a horizontal line. Intervals are clustered by image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrpn_eval.args import ARGUMENTS, WITHOUT_THRESHOLD
from sdrpn_eval.results.comparability import Evidence, common_tasks, refuse_moved
from sdrpn_eval.results.compare import cluster_keys, gather
from sdrpn_eval.results.read import read_run
from sdrpn_eval.results.records import averages
from sdrpn_eval.results.scores import Document, Scores, all_scores
from sdrpn_eval.results.stats import clustered
from sdrpn_eval.tasks_info import threshold_of

NO_MATTER = ("threshold", "record", "batch_size", "max_batch_size", "prefix_cache", "device")
"""Arguments that do not start another series; a curve is over the first."""


@dataclass(frozen=True)
class Point:
    """A run's score on a task, with its 95 % interval.

    Attributes:
        series: The arguments that it shares with the runs that it is joined to.
        threshold: None for a run that needs none; `peak` follows each map's peak.
        published: Whether the run was given none and used the published one of each task.
        zoomed: Share of questions with a region; None without a record.
    """

    run: str
    series: str
    threshold: float | str | None
    published: bool
    mean: float
    low: float | None
    high: float | None
    zoomed: float | None


@dataclass(frozen=True)
class Curve:
    """The points of a task or group; `percent`: scores lie in [0, 1] and are shown times 100."""

    task: str
    metric: str
    percent: bool
    questions: int
    images: int
    published_threshold: float | str
    points: list[Point]


def curves(folders: Sequence[Path], tasks: Sequence[str] = (), seed: int = 0) -> list[Curve]:
    """The curve of every task that the runs have in common, by its first metric.

    Raises:
        NotComparable: If the runs differ in documents, prompts or scorer.
        ValueError: If there are fewer than two runs, or two of them have the same threshold.
    """

    if len(folders) < 2:
        raise ValueError(f"a curve needs two runs or more, got {len(folders)}")
    evidence = [gather(read_run(f, str(f), tasks or None)) for f in folders]
    common, _ = common_tasks([one.run for one in evidence])
    for other in evidence[1:]:
        refuse_moved(evidence[0], other, common)
    scores = [all_scores(one.run, common) for one in evidence]
    keys = {d: k for t in common for d, k in cluster_keys(evidence, t)[1].items()}
    names = series_names([arguments(one) for one in evidence])
    found = []
    for key in _main_metrics(scores):
        same = [by_key[key] for by_key in scores]
        found.append(_curve(evidence, same, names, keys, seed))
        _refuse_twins(found[-1])
    return found


def arguments(evidence: Evidence) -> Mapping[str, Any]:
    """Model arguments: as resolved if the run left its facts, else as given, with defaults."""
    if evidence.run.model not in ARGUMENTS:
        return {"model": evidence.run.model, "proposer": "none"}
    return ARGUMENTS[evidence.run.model].defaults() | dict(evidence.arguments)


def series_names(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each run, the arguments other than the threshold in which the runs differ."""
    names = dict.fromkeys(n for one in every for n in one if n not in NO_MATTER)
    telling = [n for n in names if len({str(one.get(n)) for one in every}) > 1]
    return [", ".join(f"{n}={one[n]}" for n in telling if n in one) for one in every]


def _main_metrics(
    scores: Sequence[Mapping[tuple[str, str, str], Scores]],
) -> list[tuple[str, str, str]]:
    """The first metric of each task and group that is better when higher and has values."""
    chosen: dict[str, tuple[str, str, str]] = {}
    for key, first in scores[0].items():
        values = [s.values for by_key in scores if (s := by_key.get(key)) and s.values]
        alike = len(values) == len(scores) and len({frozenset(v) for v in values}) == 1
        if first.higher_is_better and alike:
            chosen.setdefault(first.task, key)
    return list(chosen.values())


def _curve(
    evidence: Sequence[Evidence],
    scores: Sequence[Scores],
    names: Sequence[str],
    clusters: Mapping[Document, Hashable],
    seed: int,
) -> Curve:
    task = scores[0].task
    documents = list(scores[0].values or {})
    keys = [clusters[d] for d in documents]
    columns = [[(s.values or {})[d] for d in documents] for s in scores]
    points = []
    for one, name, column in zip(evidence, names, columns, strict=True):
        given = arguments(one)
        own = given.get("threshold")
        has_one = given["proposer"] not in WITHOUT_THRESHOLD
        points.append(
            Point(
                one.run.name,
                name,
                (own or threshold_of(task)) if has_one else None,
                has_one and own is None,
                *clustered(column, keys, seed),
                zoomed=averages(one.record, documents)["zoomed"],
            )
        )
    percent = all(0 <= value <= 1 for column in columns for value in column)
    counts = len(documents), len(set(keys))
    return Curve(task, scores[0].metric, percent, *counts, threshold_of(task), points)


def _refuse_twins(curve: Curve) -> None:
    seen: dict[tuple[str, float | str | None, bool], str] = {}
    for point in curve.points:
        place = (point.series, point.threshold, point.published)
        if place in seen:
            raise ValueError(
                f"{seen[place]} and {point.run} differ in no threshold: both have "
                f"{point.threshold} on {curve.task}; give one of them"
            )
        seen[place] = point.run
