"""The result of a comparison; compare.json has the fields of these classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdrpn.boxes import PixelBox
from sdrpn.io.atomic import as_json
from sdrpn_eval.results.comparability import Evidence
from sdrpn_eval.results.regions import Looking
from sdrpn_eval.results.scores import Document, Scores

SIGNIFICANT = 0.05
RIGHT = 0.5
"""Minimum score that counts as right, where an answer is either right or wrong."""


@dataclass(frozen=True)
class RunInfo:
    """A run in reports.

    Attributes:
        labels: Notes shown next to its name.
        facts: Its versions, weights, device, seeds and source, if it left them.
    """

    name: str
    file: str
    model: str
    model_args: Any
    batch_size: Any
    limit: float | None
    date: str
    labels: list[str]
    facts: dict[str, Any] | None


@dataclass(frozen=True)
class RunScore:
    """A run's mean score with its 95 % interval.

    Attributes:
        low, high: None if the scores give no interval, such as those of a single image.
        published: The paper's score, in percent.
    """

    run: str
    mean: float
    low: float | None
    high: float | None
    published: float | None


@dataclass(frozen=True)
class Difference:
    """A run minus the first run, over the same questions.

    Attributes:
        p: Of the sign-flip test.
        p_adjusted: Holm's, over the main metrics of all tasks and runs; None for other metrics.
        wins, losses: Questions that it answered better, and worse.
        images_needed: With fewer images, p could not fall below SIGNIFICANT if half of them
            changed, all in one direction; None if no number is enough.
    """

    run: str
    mean: float
    low: float | None
    high: float | None
    p: float
    wins: int
    losses: int
    ties: int
    p_adjusted: float | None = None
    images: int = 0
    images_needed: int | None = None

    @property
    def decisive_p(self) -> float:
        return self.p if self.p_adjusted is None else self.p_adjusted

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `same` if it may be chance, `few` if there are too few images to tell.

        Defined for metrics of which higher is better.
        """
        if self.decisive_p >= SIGNIFICANT:
            enough = self.images_needed is not None and self.images >= self.images_needed
            return "same" if enough else "few"
        return "better" if self.mean > 0 else "worse"


@dataclass(frozen=True)
class MetricRow:
    """A metric of a task or group.

    Attributes:
        protocol: How the benchmark is asked or scored, if there are several ways; else empty.
        main: Whether it is the metric that decides about the task.
        percent: Whether scores lie in [0, 1]; they are shown times 100.
    """

    task: str
    protocol: str
    metric: str
    filter: str
    main: bool
    higher_is_better: bool
    percent: bool
    questions: int
    images: int
    scores: list[RunScore]
    differences: list[Difference]


@dataclass(frozen=True)
class TaskInfo:
    """A task apart from its scores; `looks` and `boxes` are by run name."""

    task: str
    questions: int
    original: int
    clusters: str
    looks: dict[str, dict[str, Any]]
    boxes: dict[str, list[Looking]]


@dataclass(frozen=True)
class NotCompared:
    """A metric without a score per document: the runs' totals, and the reason."""

    task: str
    protocol: str
    metric: str
    reason: str
    totals: dict[str, float | None]
    published: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison; all runs are compared with runs[0]."""

    runs: list[RunInfo]
    rows: list[MetricRow]
    tasks: list[TaskInfo]
    not_compared: list[NotCompared]
    notes: list[str]
    evidence: list[Evidence] = field(repr=False, default_factory=list)
    scores: list[dict[tuple[str, str, str], Scores]] = field(repr=False, default_factory=list)
    boxes: Mapping[Document, PixelBox] = field(repr=False, default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What compare.json holds."""
        shown = replace(self, evidence=[], scores=[], boxes={})
        hidden = ("evidence", "scores", "boxes")
        return {k: v for k, v in asdict(shown).items() if k not in hidden}

    def main_row(self, task: str) -> MetricRow | None:
        """A task's first metric of which higher is better: decides what is fixed and broken."""
        return next((row for row in self.rows if row.task == task and row.main), None)

    def save(self, path: Path) -> None:
        """Write compare.json."""
        text = as_json(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
