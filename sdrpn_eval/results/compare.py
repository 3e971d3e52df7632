"""Compares runs question by question: the numbers behind the table, the JSON and the page."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdrpn.boxes import PixelBox
from sdrpn_eval.results.comparability import Evidence, common_tasks, labels, refuse_moved
from sdrpn_eval.results.comparison import (
    RIGHT,
    SIGNIFICANT,
    Comparison,
    Difference,
    MetricRow,
    NotCompared,
    RunInfo,
    RunScore,
    TaskInfo,
)
from sdrpn_eval.results.documents import Documents, boxes_of
from sdrpn_eval.results.published import published_score
from sdrpn_eval.results.read import Run
from sdrpn_eval.results.records import averages, read_facts, read_looks, unfinished_later_run
from sdrpn_eval.results.regions import where_it_looked
from sdrpn_eval.results.scores import Document, Scores, all_scores
from sdrpn_eval.results.stats import clustered, clustered_difference, holm, images_needed, sign_flip
from sdrpn_eval.tasks_info import PROTOCOLS

FACTS = ("versions", "weights", "device", "seeds", "source")
"""The facts that reports show."""


def gather(run: Run) -> Evidence:
    """Reads the record and the facts of a run."""
    return Evidence(run, read_looks(run), read_facts(run))


def compare(
    runs: Sequence[Run | Evidence],
    data: Mapping[str, Documents] | None = None,
    boxes: Mapping[Document, PixelBox] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares runs with the first of them.

    Args:
        runs: Runs, or runs whose records have been read.
        data: Documents by task, for tasks that are on this machine.
        boxes: True boxes by document, in pixels of its image; they replace the documents' own.
        seed: Of intervals and tests.

    Raises:
        NotComparable: If runs differ in more than the model; names what differs.
    """
    evidence = [one if isinstance(one, Evidence) else gather(one) for one in runs]
    tasks, notes = common_tasks([one.run for one in evidence])
    for other in evidence[1:]:
        refuse_moved(evidence[0], other, tasks)
    scores = [all_scores(one.run, tasks) for one in evidence]
    clusters = {task: cluster_keys(evidence, task) for task in tasks}
    keys = {d: key for _, by_document in clusters.values() for d, key in by_document.items()}
    rows, missing = _rows(evidence, scores, keys, seed)
    true_boxes = boxes_of(data or {}, list(keys), boxes or {})
    comparison = Comparison(
        [_describe(e, evidence) for e in evidence],
        _adjusted(rows, tasks),
        [],
        missing,
        [*notes, *(note for e in evidence for note in _notes(e))],
        evidence,
        scores,
        true_boxes,
    )
    infos = [_task_info(comparison, task, clusters[task][0]) for task in tasks]
    return replace(comparison, tasks=infos)


def _describe(evidence: Evidence, every: Sequence[Evidence]) -> RunInfo:
    run, facts = evidence.run, evidence.facts
    config = run.results["config"]
    return RunInfo(
        name=run.name,
        file=str(run.file),
        model=run.model,
        model_args=config.get("model_args"),
        batch_size=config.get("batch_size"),
        limit=run.limit,
        date=run.results["date"],
        labels=labels(evidence, every),
        facts={name: getattr(facts, name) for name in FACTS} if facts else None,
    )


def _notes(evidence: Evidence) -> list[str]:
    notes = list(evidence.record.notes)
    skipped = evidence.facts.skipped if evidence.facts else {}
    notes += [
        f"{evidence.run.name}: {count} document(s) of {task} were skipped or answered without a "
        "second look (on_error; see `error` in the record)"
        for task, count in skipped.items()
        if count
    ]
    later = unfinished_later_run(evidence.run)
    if later:
        notes.append(f"{evidence.run.name}: a later run ({later}) left no results in its folder")
    return notes


def cluster_keys(evidence: Sequence[Evidence], task: str) -> tuple[str, dict[Document, Hashable]]:
    """Finds the clusters that intervals and tests treat as units.

    Clusters are images by content hash if a run's record covers the task, else the values of the
    task's own `cluster_key`, else single documents, whose intervals are too narrow if questions
    share images.

    Returns:
        What clusters are made of, in words; and the cluster of each document.
    """
    documents = [(task, doc_id) for doc_id in evidence[0].run.tasks[task].samples]
    for one in evidence:
        if all(d in one.record.looks and one.record.looks[d].images for d in documents):
            return "images", {d: one.record.looks[d].images for d in documents}
    key = evidence[0].run.tasks[task].config.get("cluster_key")
    for one in evidence if key else ():
        found = {d: _own_key(one.run, d, str(key)) for d in documents}
        if None not in found.values():
            return f"the task's {key}", {d: (task, value) for d, value in found.items()}
    return "single documents", {d: d for d in documents}


def _own_key(run: Run, document: Document, key: str) -> Any:
    values = run.tasks[document[0]].samples[document[1]].values.values()
    return next((v[key] for v in values if isinstance(v, Mapping) and key in v), None)


def _rows(
    evidence: Sequence[Evidence],
    scores: Sequence[Mapping[tuple[str, str, str], Scores]],
    clusters: Mapping[Document, Hashable],
    seed: int,
) -> tuple[list[MetricRow], list[NotCompared]]:
    rows: list[MetricRow] = []
    missing, names = [], [one.run.name for one in evidence]
    for key, first in scores[0].items():
        same = [by_key.get(key) for by_key in scores]
        reasons = {one.reason for one in same if one and one.reason}
        values = [one.values for one in same if one and one.values]
        if not reasons and len({frozenset(v) for v in values}) > 1:
            reasons = {"is scored on other documents in each run"}
        if reasons or len(values) < len(evidence):
            totals = [one.total if one else None for one in same]
            published = [_published(one, first) for one in evidence]
            missing.append(
                NotCompared(
                    first.task,
                    PROTOCOLS.get(first.task, ""),
                    first.metric,
                    "; ".join(sorted(reasons)) or "is missing in a run",
                    dict(zip(names, totals, strict=True)),
                    dict(zip(names, published, strict=True)),
                )
            )
            continue
        main = first.higher_is_better and not any(r.main and r.task == first.task for r in rows)
        rows.append(_metric_row(evidence, first, values, clusters, main, seed))
    return rows, missing


def _published(of: Evidence, scores: Scores) -> float | None:
    return published_score(of.run.model, of.arguments, scores.task, scores.metric)


def _metric_row(
    evidence: Sequence[Evidence],
    first: Scores,
    values: Sequence[Mapping[Document, float]],
    clusters: Mapping[Document, Hashable],
    main: bool,
    seed: int,
) -> MetricRow:
    documents = list(values[0])
    keys = [clusters[d] for d in documents]
    columns = [[one[d] for d in documents] for one in values]
    own = [
        RunScore(of.run.name, *clustered(column, keys, seed), published=_published(of, first))
        for of, column in zip(evidence, columns, strict=True)
    ]
    percent = all(0 <= v <= 1 for column in columns for v in column)
    others = [
        _difference(of.run.name, column, columns[0], keys, first.higher_is_better, percent, seed)
        for of, column in zip(evidence[1:], columns[1:], strict=True)
    ]
    return MetricRow(
        first.task,
        PROTOCOLS.get(first.task, ""),
        first.metric,
        first.filter,
        main,
        first.higher_is_better,
        percent,
        len(documents),
        len(set(keys)),
        own,
        others,
    )


def _difference(
    name: str,
    column: Sequence[float],
    reference: Sequence[float],
    keys: Sequence[Hashable],
    higher_is_better: bool,
    shares: bool,
    seed: int,
) -> Difference:
    deltas = [a - b for a, b in zip(column, reference, strict=True)]
    signed = deltas if higher_is_better else [-d for d in deltas]
    wins, losses = sum(d > 0 for d in signed), sum(d < 0 for d in signed)
    return Difference(
        name,
        *clustered_difference(deltas, keys, seed, shares=shares),
        p=sign_flip(deltas, keys, seed),
        wins=wins,
        losses=losses,
        ties=len(deltas) - wins - losses,
        images=len(set(keys)),
        images_needed=images_needed(SIGNIFICANT),
    )


def _adjusted(rows: list[MetricRow], tasks: Sequence[str]) -> list[MetricRow]:
    """Applies Holm's correction over the main metrics of tasks; groups only repeat tasks."""
    places = [
        (i, j)
        for i, row in enumerate(rows)
        if row.main and row.task in tasks
        for j in range(len(row.differences))
    ]
    adjusted = holm([rows[i].differences[j].p for i, j in places])
    changed = [list(row.differences) for row in rows]
    for (i, j), p in zip(places, adjusted, strict=True):
        needed = images_needed(SIGNIFICANT, len(places))
        changed[i][j] = replace(changed[i][j], p_adjusted=p, images_needed=needed)
    return [replace(r, differences=d) for r, d in zip(rows, changed, strict=True)]


def _task_info(comparison: Comparison, task: str, clusters: str) -> TaskInfo:
    run = comparison.evidence[0].run
    documents = [(task, doc_id) for doc_id in run.tasks[task].samples]
    looks, boxes = {}, {}
    row = comparison.main_row(task)
    for evidence, scores in zip(comparison.evidence, comparison.scores, strict=True):
        name = evidence.run.name
        looks[name] = averages(evidence.record, documents)
        if row:
            values = scores[(task, row.metric, row.filter)].values or {}
            right = {d: v >= RIGHT for d, v in values.items()}
            boxes[name] = where_it_looked(evidence.record, comparison.boxes, right)
    found = {name: rows for name, rows in boxes.items() if rows}
    return TaskInfo(task, len(documents), run.tasks[task].original, clusters, looks, found)
