"""What a comparison holds; compare.json is these classes, field by field."""

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
"""A score from here on counts as right, where an answer is either right or wrong."""


@dataclass(frozen=True)
class RunScore:
    """A run's mean score with its 95 % interval; published: the paper's number, in percent.

    low, high: None where the scores give no interval, such as those of a single image.
    """

    run: str
    mean: float
    low: float | None
    high: float | None
    published: float | None


@dataclass(frozen=True)
class Difference:
    """A run minus the first one, over the same questions. p: of the sign-flip test.

    p_adjusted: Holm's, over the main metrics of all tasks and runs; None for other metrics.
    wins: questions it answered better; losses: worse. images_needed: fewer cannot tell whether
    there is a difference: were half of them to change, and all in one direction, p would not be
    below SIGNIFICANT.
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
        """`better`, `worse`, `same` where the difference may be chance, or `few` where there are
        too few images to tell; higher is better.
        """
        if self.decisive_p >= SIGNIFICANT:
            enough = self.images_needed is not None and self.images >= self.images_needed
            return "same" if enough else "few"
        return "better" if self.mean > 0 else "worse"


@dataclass(frozen=True)
class MetricRow:
    """A metric of a task or group. percent: scores lie in [0, 1] and are shown times 100.

    protocol: how the benchmark is asked or scored here, where there are several ways; else empty.
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
    """What is said of a task beside its scores. looks and boxes: by run name."""

    task: str
    questions: int
    original: int
    clusters: str
    looks: dict[str, dict[str, Any]]
    boxes: dict[str, list[Looking]]


@dataclass(frozen=True)
class NotCompared:
    """A metric without a score a document: the runs' totals, and why there is no more."""

    task: str
    protocol: str
    metric: str
    reason: str
    totals: dict[str, float | None]
    published: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Everything that is compared; runs[0] is what the others are compared with."""

    runs: list[dict[str, Any]]
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
        """The metric that decides fixed and broken: the first that goes up when better."""
        return next((row for row in self.rows if row.task == task and row.main), None)

    def save(self, path: Path) -> None:
        """Write compare.json."""
        text = as_json(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
