"""Results for the Hub: evaluation entries, the model card's table, a leaderboard row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from sdrpn.io.atomic import atomic_write
from sdrpn.io.model_card import CARD_FILE, new_card, save_card, with_results
from sdrpn.io.plurals import counted
from sdrpn_eval.report.tables import markdown_table
from sdrpn_eval.report.text import metric_name, versions_line
from sdrpn_eval.results.comparability import Evidence
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.comparison import Comparison
from sdrpn_eval.results.stats import with_interval
from sdrpn_eval.schemas import HUB_ID
from sdrpn_eval.tasks_info import PROTOCOLS, threshold_origin

ENTRIES = ".eval_results"
"""Folder of a model's repository where the Hub looks for evaluation entries."""
HEADING = "## Evaluation"
HEADER = ("task", "metric", "score", "questions", "protocol", "threshold", "run")
LEADERBOARD = "leaderboard.md"


METHOD = (
    "Scores in [0, 1] are in percent, with 95 % intervals clustered by image. Measured with "
    "lmms-eval and [sdrpn](https://arxiv.org/abs/2509.16944); `threshold` is that on the RoI map."
)


@dataclass(frozen=True)
class Score:
    """A score of a run, with what a reader must know beside it.

    Attributes:
        dataset: Hub id of the dataset; None if it has none.
        part: Which part of the dataset was asked; empty for all of it.
        threshold: Threshold on the map, and its origin.
        setup: Model arguments, commit and versions of the run.
        date: When the run began, ISO 8601.
        main: Whether it decides about its task.
        value: In percent for scores in [0, 1].
        low, high: 95 % interval, like `value`; None if there is none.
        questions: Over how many; None if unknown.
    """

    run: str
    task: str
    dataset: str | None
    part: str
    protocol: str
    threshold: str
    setup: str
    date: str
    metric: str
    main: bool
    value: float
    low: float | None = None
    high: float | None = None
    questions: int | None = None

    @property
    def text(self) -> str:
        """The score with its interval."""
        if self.low is None:
            return f"{self.value:.4g}"
        return with_interval((self.value, self.low, self.high), 1, ".4g")

    @property
    def asked(self) -> str:
        """The number of questions, and which part of the dataset they are."""
        count = "" if self.questions is None else counted(self.questions, "question")
        return ", ".join(part for part in (count, self.part) if part)

    @property
    def notes(self) -> str:
        """All of it in one line."""
        interval = "no interval" if self.low is None else "95 % interval clustered by image"
        parts = [f"{self.metric} {self.text}, {interval}", self.asked]
        parts += [f"protocol: {self.protocol}" if self.protocol else ""]
        parts += [f"threshold: {self.threshold}", self.setup]
        return "; ".join(part for part in parts if part)


def scores_of(evidence: Evidence, datasets: Mapping[str, str], seed: int = 0) -> list[Score]:
    """Collect the scores of a run.

    Args:
        evidence: The run, with its record.
        datasets: Hub ids by task, for tasks whose own configuration names none.
        seed: Of bootstrap intervals.
    """
    comparison = compare([evidence], seed=seed)
    found = []
    for row in comparison.rows:
        scale, digits = (100, 2) if row.percent else (1, 4)
        of = row.scores[0]
        named = {"metric": metric_name(row), "main": row.main, "questions": row.questions}
        ends = {"value": of.mean, "low": of.low, "high": of.high}
        ends = {k: None if v is None else round(scale * v, digits) for k, v in ends.items()}
        found.append(_score(comparison, row.task, datasets, named | ends))
    for one in comparison.not_compared:
        total = one.totals[evidence.run.name]
        if total is not None:
            main = not any(score.main and score.task == one.task for score in found)
            measured = {"metric": one.metric, "main": main, "value": round(total, 4)}
            found.append(_score(comparison, one.task, datasets, measured))
    return found


def _score(
    comparison: Comparison, name: str, datasets: Mapping[str, str], measured: Mapping[str, Any]
) -> Score:
    """A score of a task or group, with what all its metrics share."""
    (evidence,) = comparison.evidence
    run = evidence.run
    members = run.groups.get(name) or [name]
    path = str(run.tasks[members[0]].config.get("dataset_path", ""))
    infos = [info for info in comparison.tasks if info.task in members]
    asked, every = sum(i.questions for i in infos), sum(i.original for i in infos)
    return Score(
        run=run.name,
        task=name,
        # Loaders of local files, such as `parquet`, have no namespace.
        dataset=datasets.get(name) or (path if HUB_ID.fullmatch(path) else None),
        part="" if asked == every else f"{asked} of {every} documents asked",
        protocol=PROTOCOLS.get(name, ""),
        threshold=_threshold(evidence, members),
        setup=_setup(evidence),
        date=run.began.isoformat(),
        **measured,
    )


def _threshold(evidence: Evidence, tasks: Sequence[str]) -> str:
    lines = [line for (task, _), line in evidence.record.looks.items() if task in tasks]
    used = sorted({str(line.threshold) for line in lines if line.threshold is not None})
    if not used:
        return "none"
    if evidence.run.arguments.get("threshold") is not None:
        rule = "given"
    elif evidence.run.model.startswith("qwen"):
        rule = "as published for its size and resolution"
    else:
        rule = threshold_origin(tasks[0], lines[0].proposer or "")
    return f"{', '.join(used)} ({rule})"


def _setup(evidence: Evidence) -> str:
    given = ", ".join(f"{k}={v}" for k, v in evidence.run.arguments.items())
    facts, parts = evidence.facts, [f"{evidence.run.model}: {given or 'defaults'}"]
    if facts is None:
        return f"{parts[0]}; versions unknown"
    if facts.source:
        changed = ", changed" if facts.source.get("changed") else ""
        parts.append(f"commit {str(facts.source.get('commit'))[:10]}{changed}")
    parts.append(versions_line(facts.versions))
    return "; ".join(parts)


def write_card(
    scores: Sequence[Score], folder: Path, name: str, source: str | None = None
) -> tuple[list[Path], list[str]]:
    """Write evaluation entries, the section of the model card, and a leaderboard row.

    Args:
        scores: Of one or several runs.
        folder: Of the model's repository; a card that is there is kept.
        name: Of the model.
        source: URL of the evaluation, such as a report page.

    Returns:
        The written files; and the tasks without an entry, for want of a dataset on the Hub.
    """
    main = [score for score in scores if score.main]
    if (folder / CARD_FILE).is_file():
        card = ModelCard.load(folder / CARD_FILE)
    else:
        card = new_card(ModelCardData(library_name="sdrpn"), f"# {name}\n")
    results = [_model_index(score, source) for score in scores]
    files = [save_card(with_results(card, name, results, _section(scores)), folder)]
    for score in main:
        if score.dataset:
            files.append(_write_entry(score, main, folder / ENTRIES, source))
    files.append(folder / LEADERBOARD)
    with atomic_write(files[-1]) as part:
        part.write_text(leaderboard(scores, name), encoding="utf-8")
    return files, list(dict.fromkeys(score.task for score in main if not score.dataset))


def _write_entry(score: Score, main: Sequence[Score], folder: Path, source: str | None) -> Path:
    assert score.dataset is not None
    entry = EvalResultEntry(
        dataset_id=score.dataset,
        task_id=score.task,
        value=score.value,
        date=score.date,
        source_url=source,
        notes=score.notes,
    )
    # The Hub wants variants of one benchmark in files of their own.
    several = sum(one.task == score.task for one in main) > 1
    path = folder / f"{score.task}{f'_{score.run}' if several else ''}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        part.write_text(text, encoding="utf-8")
    return path


def _model_index(score: Score, source: str | None) -> EvalResult:
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=score.dataset or score.task,
        dataset_name=score.task,
        metric_type=score.metric,
        metric_value=score.value,
        metric_name=f"{score.metric} ({score.run})",
        dataset_config=score.task,  # tasks on one dataset are told apart by it
        metric_args={"notes": score.notes},
        source_name="sdrpn-eval" if source else None,
        source_url=source,
    )


def _section(scores: Sequence[Score]) -> str:
    rows = [[s.task, s.metric, s.text, s.asked, s.protocol, s.threshold, s.run] for s in scores]
    setups = dict.fromkeys((score.run, score.setup, score.date) for score in scores)
    runs = "\n".join(f"- {run}, {date}: {setup}" for run, setup, date in setups)
    return f"{HEADING}\n\n{markdown_table(HEADER, rows)}\n\n{runs}\n\n{METHOD}"


def leaderboard(scores: Sequence[Score], name: str) -> str:
    """A Markdown table with a row for each run: the main score of every task."""
    main = [score for score in scores if score.main]
    tasks = list(dict.fromkeys(score.task for score in main))
    texts = {(score.run, score.task): score.text for score in reversed(main)}  # the first counts
    rows = [
        [f"{name}, {run}", *(texts.get((run, task), "") for task in tasks)]
        for run in dict.fromkeys(score.run for score in main)
    ]
    return markdown_table(["model", *tasks], rows) + "\n"
