"""Score over threshold, task by task.

A run without `threshold=` used the published one of each task; a run that needs none (stock,
ViCrop) is a horizontal line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from sdrpn_eval.args import ARGUMENTS, WITHOUT_THRESHOLD
from sdrpn_eval.results.comparability import Evidence
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.comparison import Comparison, MetricRow
from sdrpn_eval.results.read import read_run
from sdrpn_eval.results.records import averages
from sdrpn_eval.tasks_info import threshold_of

NO_MATTER = ("threshold", "record", "batch_size", "max_batch_size", "prefix_cache", "device")
"""Arguments that do not define a series."""


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

    @property
    def place(self) -> tuple[str, float | str | None, bool]:
        """Where it is drawn: no two runs may share it."""
        return self.series, self.threshold, self.published


@dataclass(frozen=True)
class Curve:
    """The points of a task or group.

    Attributes:
        percent: Whether scores lie in [0, 1]; they are shown times 100.
    """

    task: str
    metric: str
    percent: bool
    questions: int
    images: int
    published_threshold: float | str
    points: list[Point]


def curves(folders: Sequence[Path], tasks: Sequence[str] = (), seed: int = 0) -> list[Curve]:
    """The curve of every task that the runs have in common, by its main metric.

    Raises:
        NotComparable: If the runs differ in documents, prompts or scorer.
        ValueError: If there are fewer than two runs, or two of them have the same threshold.
    """
    if len(folders) < 2:
        raise ValueError(f"a curve needs two runs or more, got {len(folders)}")
    comparison = compare([read_run(f, str(f), tasks or None) for f in folders], seed=seed)
    names = series_names([arguments(one) for one in comparison.evidence])
    return [_curve(comparison, row, names) for row in comparison.rows if row.main]


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


def _curve(comparison: Comparison, row: MetricRow, names: Sequence[str]) -> Curve:
    points = []
    for one, name, score, by_key in zip(
        comparison.evidence, names, row.scores, comparison.scores, strict=True
    ):
        given = arguments(one)
        own = given.get("threshold")
        has_one = given["proposer"] not in WITHOUT_THRESHOLD
        documents = list(by_key[row.task, row.metric, row.filter].values or {})
        points.append(
            Point(
                score.run,
                name,
                (own or threshold_of(row.task)) if has_one else None,
                has_one and own is None,
                *(score.mean, score.low, score.high),
                zoomed=averages(one.record, documents)["zoomed"],
            )
        )
    for first, second in combinations(points, 2):
        if first.place == second.place:
            raise ValueError(
                f"{first.run} and {second.run} differ in no threshold: both have "
                f"{first.threshold} on {row.task}; give one of them"
            )
    counts = row.questions, row.images
    return Curve(row.task, row.metric, row.percent, *counts, threshold_of(row.task), points)
