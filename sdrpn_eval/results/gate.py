"""Checks a run against a baseline, for CI.

lmms-eval exits with 0 when it failed, so files decide and not the exit code: a run counts only if
it holds every document of the baseline, asked and scored as then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sdrpn.io.plurals import agree, counted
from sdrpn_eval.results.baseline import (
    Baseline,
    MetricBaseline,
    TaskBaseline,
    make_baseline,
    read_baseline,
    task_baseline,
)
from sdrpn_eval.results.comparability import Evidence, changes, other_data
from sdrpn_eval.results.compare import gather
from sdrpn_eval.results.read import BadRun, Run, is_number, read_run
from sdrpn_eval.results.records import unfinished_later_run
from sdrpn_eval.results.stats import images_needed, smallest_p
from sdrpn_eval.results.verdicts import (
    BROKEN,
    Rules,
    Verdict,
    beyond_noise,
    judge,
    largest_fall,
    metric_key,
    small,
)


class Broken(ValueError):
    """A task that cannot be compared with its baseline."""


def check(folder: Path, baseline: Baseline, rules: Rules) -> list[Verdict]:
    """Checks a run: returns a verdict per task, or one if the run cannot be read."""
    try:
        run = _any_run(folder, list(baseline.tasks))
        check_run(run, rules.max_age)
    except BadRun as error:
        return [Verdict("run", "", BROKEN, str(error))]
    verdicts = [_check_task(folder, name, baseline, rules) for name in baseline.tasks]
    return beyond_noise(verdicts, rules.alpha)


def safely_check(folder: Path, baseline: Baseline, rules: Rules) -> list[Verdict]:
    """`check`, with any other error as BROKEN: Python's own exit code of 1 would mean a fall."""
    check_rules(rules, baseline.tasks)
    try:
        return check(folder, baseline, rules)
    except Exception as error:
        reason = f"{folder} cannot be read as a run: {type(error).__name__}: {error}"
        return [Verdict("run", "", BROKEN, reason)]


def check_rules(rules: Rules, tasks: Mapping[str, TaskBaseline]) -> None:
    """Checks that rules can have an effect on the tasks of a baseline.

    Raises:
        ValueError: For rules that cannot mean anything; names the option and its value.
    """
    if not 0 < rules.alpha < 1:
        raise ValueError(f"--alpha must be in (0, 1), got {rules.alpha:g}")
    named = {"--tolerance": rules.tolerance, "--metric": rules.metrics}
    for option, given in named.items():
        for name in given:
            if name and name not in tasks:
                held = ", ".join(tasks)
                raise ValueError(
                    f"{option} {name}={given[name]}: the baseline has no task {name}, only {held}"
                )
    keys = {n: metric_key(n, task, rules.metrics.get(n)) for n, task in tasks.items()}
    for name, allowed in rules.tolerance.items():
        for task in [name] if name else [t for t in tasks if t not in rules.tolerance]:
            _check_tolerance(name, allowed, task, tasks[task].metrics[keys[task]])
    waiting = sum(rules.allowed(name) is None for name in tasks)
    if waiting and images_needed(rules.alpha, waiting) is None:
        least = waiting * smallest_p(100)
        raise ValueError(
            f"--alpha {rules.alpha:g} cannot be reached: the smallest p-value of {waiting} task(s) "
            f"is {least:g}; give a larger --alpha, or a --tolerance"
        )


def _check_tolerance(name: str, allowed: float, task: str, metric: MetricBaseline) -> None:
    given = f"--tolerance {name}={allowed:g}" if name else f"--tolerance {allowed:g}"
    if not (math.isfinite(allowed) and allowed >= 0):
        raise ValueError(f"{given} must be a finite number, 0 or more")
    largest = largest_fall(metric)
    if largest is not None and allowed >= largest:
        raise ValueError(
            f"{given} would pass every fall: scores of {task} can fall by {largest:g} at most; "
            f"give a value in [0, {largest:g})"
        )


def _any_run(folder: Path, tasks: Sequence[str]) -> Run:
    """The run with the first task that can be read. Raises BadRun if there is none."""
    problems: list[str] = []
    for task in tasks:
        try:
            return read_run(folder, tasks=[task])
        except BadRun as error:
            problems.append(str(error))
    raise BadRun("; ".join(dict.fromkeys(problems)) or f"{folder}: the baseline holds no task")


def check_run(run: Run, max_age: timedelta | None = None) -> None:
    """Raises BadRun for failures that lmms-eval's results do not show."""
    later = unfinished_later_run(run)
    if later:
        raise BadRun(
            f"{run.folder}: a run that began later ({later}) left no results: it crashed or still "
            "runs, and the results here are an older run's"
        )
    if (run.results.get("usage") or {}).get("budget_exceeded"):
        raise BadRun(f"{run.file}: the token budget ended the run early")
    age = datetime.now(UTC) - run.ended
    if max_age is not None and age > max_age:
        hours = age.total_seconds() / 3600
        raise BadRun(f"{run.file}: the results are {hours:.1f} hours old: this run left none")


def _check_task(folder: Path, name: str, baseline: Baseline, rules: Rules) -> Verdict:
    before = baseline.tasks[name]
    key = metric_key(name, before, rules.metrics.get(name))
    try:
        evidence = gather(read_run(folder, tasks=[name]))
        refuse_skipped(evidence, name, rules.skipped)
        after = task_baseline(evidence, name)
        _refuse_moved(before, after)
        now = evidence.fingerprints(name)
        moved = other_data(baseline.data(name), now.data if now else None)
        if moved:
            raise Broken(moved)
        total = evidence.run.tasks[name].totals.get(key)
        if not is_number(total):
            said = "missing" if total is None else total
            raise Broken(f"{key} is {said}, the baseline has a number")
        if key not in after.metrics:
            raise Broken(f"{key} cannot be read document by document, the baseline's could")
    except (BadRun, Broken) as error:
        return Verdict(name, key, BROKEN, str(error))
    return judge(name, key, before, after, rules.allowed(name))


def refuse_skipped(evidence: Evidence, task: str, allowed: int) -> None:
    """Raises Broken if more documents of a task than allowed were not answered as asked."""
    skipped = evidence.facts.skipped.get(task, 0) if evidence.facts else 0
    if skipped > allowed:
        raise Broken(
            f"{skipped} document(s) of {task} were skipped or answered without a second look "
            "(on_error; see `error` in the record); mend them, or allow as many: "
            f"--allow-skipped {skipped}"
        )


def _refuse_moved(before: TaskBaseline, after: TaskBaseline) -> None:
    missing = set(before.documents) - set(after.documents)
    if missing:
        raise Broken(
            f"{len(missing)} of the baseline's {counted(len(before.documents), 'document')} "
            f"{agree(len(missing), 'is', 'are')} missing, such as {min(missing)}"
        )
    if len(after.documents) > len(before.documents):
        raise Broken(
            f"{counted(len(after.documents), 'document')}, the baseline has "
            f"{len(before.documents)}: run with the same --limit, or --update"
        )
    for what in ("questions", "images"):
        pairs = zip(before.documents, getattr(before, what), getattr(after, what), strict=True)
        moved = [d for d, old, new in pairs if old != new and None not in (old, new)]
        if moved:
            name = "prompt or target" if what == "questions" else "image"
            raise Broken(f"another {name} in {counted(len(moved), 'document')}, such as {moved[0]}")
    if before.settings != after.settings:
        changed = changes(before.scoring, after.scoring) if before.scoring else {}
        told = "; ".join(f"{name} is {b}, was {a}" for name, (a, b) in changed.items())
        raise Broken(f"another scorer than the baseline's: {told or 'its settings changed'}")
    if before.scorer and after.scorer and before.scorer != after.scorer:
        raise Broken("another scorer than the baseline's: its source changed")


def update_baseline(folder: Path, baseline: Path, rules: Rules) -> list[str]:
    """Writes a baseline from a complete run; keeps the tolerance of a stored one unless given anew.

    Returns:
        Lines about tasks too small to be held by their noise, then one about the file.

    Raises:
        ValueError: For a run that is incomplete or has no score per document, and for rules that
            cannot mean anything.
    """
    stored = baseline.exists() and not rules.tolerance
    rules = replace(rules, tolerance=read_baseline(baseline).tolerance) if stored else rules
    run = read_run(folder)
    check_run(run, rules.max_age)
    evidence = gather(run)
    for name in run.tasks:
        refuse_skipped(evidence, name, rules.skipped)
    made = make_baseline(evidence, rules.tolerance)
    check_rules(rules, made.tasks)
    made.save(baseline)
    held = [f"{name} by {metric_key(name, task)}" for name, task in made.tasks.items()]
    left_out = [name for name in run.tasks if name not in made.tasks]
    more = f"; without a score a document: {', '.join(left_out)}" if left_out else ""
    told = [
        f"note: {name}: {why}; until then every fall fails, unless a --tolerance is given"
        for name, why in small(made.tasks, rules).items()
    ]
    return [*told, f"{baseline}: {', '.join(held)}, from {run.file}{more}"]
