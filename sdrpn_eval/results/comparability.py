"""Decides whether runs may be compared, and if not, names what differs.

Task versions do not suffice: datasets, prompts and graders changed under the same version. So the
documents are compared (id, prompt, target, image), and the scorer by its source if both runs
recorded it, else by the task's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdrpn.io.plurals import counted
from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.provenance.fingerprints import without_addresses
from sdrpn_eval.provenance.model import Provenance, TaskFingerprints
from sdrpn_eval.results.read import Run
from sdrpn_eval.results.records import Record

SCORING = ("metric_list", "filter_list", "process_results", "output_type", "score_key")
SCORING += ("doc_to_choice", "doc_to_target", "repeats")
"""Parts of a task's configuration that decide its score."""

CALLED = ("metric", "name", "function")
"""Keys that identify the entries of a list in a configuration."""

PREPROCESSING = ("padding", "system_prompt", "min_pixels", "max_pixels", "short_answer")
"""Arguments of our models that change the base model's input."""


def _input_defaults(model: str) -> dict[str, Any]:
    defaults = ARGUMENTS[model].defaults()
    return {name: defaults[name] for name in PREPROCESSING if name in defaults}


class NotComparable(ValueError):
    """Runs that differ in more than the model; the message names what differs."""


@dataclass(frozen=True)
class Evidence:
    """A run with its record and its provenance, if it has them."""

    run: Run
    record: Record
    facts: Provenance | None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Model arguments by name: resolved if the run has provenance, else as given."""
        known = self.facts.arguments if self.facts else {}
        return known or self.run.arguments

    def fingerprints(self, task: str) -> TaskFingerprints | None:
        """Fingerprints of a task; None if the run did not record them."""
        return self.facts.tasks.get(task) if self.facts else None


def common_tasks(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Finds the tasks that all runs have, in the first run's order, and a sentence for each other.

    Raises NotComparable if there is none.
    """
    common = [t for t in runs[0].tasks if all(t in run.tasks for run in runs)]
    every = dict.fromkeys(t for run in runs for t in run.tasks)
    notes = [
        f"{task} is not compared: {', '.join(r.name for r in runs if task not in r.tasks)} "
        "has no such task"
        for task in every
        if task not in common
    ]
    if not common:
        held = "; ".join(f"{run.name}: {', '.join(run.tasks)}" for run in runs)
        raise NotComparable(f"the runs have no task in common ({held})")
    return common, notes


def refuse_moved(reference: Evidence, other: Evidence, tasks: Sequence[str]) -> None:
    """Raises NotComparable, with a clause for each difference, if two runs differ in a task."""
    moved = [clause for task in tasks for clause in moved_in_task(reference, other, task)]
    if moved:
        names = f"{reference.run.name} and {other.run.name}"
        raise NotComparable(f"{names} cannot be compared: {'; '.join(moved)}")


def moved_in_task(reference: Evidence, other: Evidence, task: str) -> list[str]:
    """What differs between two runs of a task apart from the model, a clause each."""
    clauses = [*_documents(reference, other, task), *_scorer(reference, other, task)]
    return [f"{task}: {clause}" for clause in clauses]


def _documents(a: Evidence, b: Evidence, task: str) -> list[str]:
    first, second = a.run.tasks[task].samples, b.run.tasks[task].samples
    only = [set(first) - set(second), set(second) - set(first)]
    if any(only):
        limits = ""
        if a.run.limit != b.run.limit:
            limits = f" (limits: {_limit(a.run)} and {_limit(b.run)})"
        counts, example = f"{len(first)} and {len(second)}", min(only[0] or only[1])
        return [f"other documents, {counts}, such as {example} in one only{limits}"]
    clauses = []
    for what in ("prompt", "target"):
        texts = {i: (getattr(first[i], what), getattr(second[i], what)) for i in first}
        ids = [i for i, (ours, others) in texts.items() if ours != others]
        if ids:
            ours, others = map(_short, texts[ids[0]])
            clauses.append(
                f"other {what}s in {counted(len(ids), 'document')}, such as {ids[0]}: "
                f"{ours!r} and {others!r}"
            )
    looks = ((d, line.images, b.record.looks.get(d)) for d, line in a.record.looks.items())
    # A document that could not be shown has no image in its record.
    both = ((d, ours, its.images) for d, ours, its in looks if ours and its and its.images)
    changed = [d[1] for d, ours, others in both if d[0] == task and ours != others]
    if changed:
        count = counted(len(changed), "document")
        clauses.append(f"other images in {count}, such as {min(changed)}")
    marks = (a.fingerprints(task), b.fingerprints(task))
    moved = other_data(*(mark.data if mark else None for mark in marks))
    return clauses or ([moved] if moved else [])


def other_data(before: str | None, after: str | None) -> str | None:
    """Compares fingerprints of data, which also cover columns that no prompt shows.

    Returns a clause if both are known and differ; for example because other answers count as right.
    """
    if None in (before, after) or before == after:
        return None
    return f"other data, in columns that prompts do not show ({before} and {after})"


def _scorer(a: Evidence, b: Evidence, task: str) -> list[str]:
    first, second = a.run.tasks[task], b.run.tasks[task]
    clauses = []
    for part in SCORING:
        for place, *pair in _differing(part, first.config.get(part), second.config.get(part)):
            clauses.append(f"other scorer, {place} is {' and '.join(map(_short, pair))}")
    mine, its = a.fingerprints(task), b.fingerprints(task)
    if mine and its and mine.scorer and its.scorer:
        if mine.scorer == its.scorer:
            return []
        sources = mine.scorer_source, its.scorer_source
        if None not in sources and sources[0] != sources[1]:
            clauses.append(f"other scorer (source {sources[0]} and {sources[1]})")
        return clauses or [f"other scorer (source {mine.scorer} and {its.scorer})"]
    if set(first.totals) != set(second.totals):
        odd = ", ".join(sorted(set(first.totals) ^ set(second.totals)))
        clauses.append(f"other metrics, {odd} in one only")
    return clauses


def _differing(place: str, first: Any, second: Any) -> Iterator[tuple[str, str, str]]:
    """Yields where two settings differ: ("metric_list[f1].higher_is_better", "True", "False").

    Entries of a list are matched by name if they have one.
    """
    if without_addresses(first) == without_addresses(second):
        return
    entries = [_entries(value) for value in (first, second)]
    if None in entries:
        yield place, without_addresses(first), without_addresses(second)
        return
    ours, others = (entry or {} for entry in entries)
    before = len({*ours} ^ {*others})
    for name in dict.fromkeys([*ours, *others]):
        inner = f"{place}[{name}]" if isinstance(first, list) else f"{place}.{name}"
        if name in ours and name in others:
            yield from _differing(inner, ours[name], others[name])
        else:
            there = ["there" if name in one else "missing" for one in (ours, others)]
            yield inner, there[0], there[1]
    if not before and list(ours) != list(others):
        yield f"the order of {place}", ", ".join(ours), ", ".join(others)


def _entries(value: Any) -> dict[str, Any] | None:
    """The parts of a setting by name; None if it has no parts."""
    if isinstance(value, Mapping):
        return {str(name): part for name, part in value.items()}
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        return None
    called = [
        next((str(one[k]) for k in CALLED if k in one), str(i)) for i, one in enumerate(value)
    ]
    if len(set(called)) < len(called):
        called = [str(i) for i in range(len(value))]
    return dict(zip(called, value, strict=True))


def established(evidence: Sequence[Evidence], tasks: Sequence[str]) -> list[str]:
    """Sentences about what is equal in all runs, and how this is known."""
    questions = sum(len(evidence[0].run.tasks[task].samples) for task in tasks)
    count = counted(questions, "question")
    lines = [f"Same documents, prompts and targets: {count}, checked one by one."]
    unseen = [e.run.name for e in evidence if not e.record.looks]
    if unseen:
        lines.append(f"Same images: not known, {', '.join(unseen)} left no record of them.")
    else:
        lines.append("Same images: by the content hash of each.")
    marks = [one.fingerprints(task) for one in evidence for task in tasks]
    by_source = all(mark is not None and mark.scorer for mark in marks)
    how = "source and settings" if by_source else "settings in the results file only"
    return [*lines, f"Same scorer: by its {how}."]


def labels(evidence: Evidence, every: Sequence[Evidence]) -> list[str]:
    """Notes about a run's differences from the first run, shown next to its name."""
    run, runs = evidence.run, [one.run for one in every]
    found = [f"scored anew, from {run.scored_from}"] if run.scored_from else []
    found += ["other preprocessing"] if _is_prepared_otherwise(evidence, every) else []
    for name in run.tasks:
        if name in runs[0].tasks:
            own, its = (one.tasks[name].config.get("generation_kwargs") for one in (run, runs[0]))
            moved = changes(own or {}, its or {})
            found += [f"other generation arguments: {key}={pair[0]}" for key, pair in moved.items()]
    return list(dict.fromkeys(found))


def _is_prepared_otherwise(evidence: Evidence, every: Sequence[Evidence]) -> bool:
    """Compares with the first run of one of our models if there is one, else with the first run."""
    ours = [one for one in every if one.run.model in ARGUMENTS] or list(every)
    pair = (evidence, ours[0])
    # Resolved arguments if both are known: a prompt may be given as text or as a file.
    resolved = all(
        one.facts and one.facts.arguments.keys() >= _input_defaults(one.run.model).keys()
        for one in pair
        if one.run.model in ARGUMENTS
    )
    mine, its = (preprocessing(one.run, one.facts if resolved else None) for one in pair)
    return mine != its


def preprocessing(run: Run, facts: Provenance | None = None) -> dict[str, Any]:
    """Settings of how images and questions reach the base model."""
    if run.model not in ARGUMENTS:
        return {"model": run.model}
    given = facts.arguments if facts else run.arguments
    values = {n: given.get(n, default) for n, default in _input_defaults(run.model).items()}
    return {"model": run.model, **{n: None if v == "" else v for n, v in values.items()}}


def changes(mine: Mapping[str, Any], its: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values."""
    keys = dict.fromkeys([*mine, *its])
    return {k: (mine.get(k), its.get(k)) for k in keys if mine.get(k) != its.get(k)}


def _limit(run: Run) -> str:
    return "none" if run.limit is None else f"{run.limit:g}"


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
