"""A run against a baseline, for CI: 0 it stands, 1 a task fell, 2 it cannot be believed.

lmms-eval exits with 0 when it failed, so the files are asked, not the exit code: a run counts only
when every document of the baseline is there, asked and scored as then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sdrpn.plurals import agree, counted
from sdrpn_eval.report.baseline import Baseline, MetricBaseline, TaskBaseline, task_baseline
from sdrpn_eval.report.checks import Evidence, other_data
from sdrpn_eval.report.comparison import gather
from sdrpn_eval.report.facts import Facts
from sdrpn_eval.report.looks import unfinished_later_run
from sdrpn_eval.report.runs import BadRun, Run, is_number, read_run
from sdrpn_eval.stats import clustered, holm, sign_flip

PASSED, FELL, BROKEN = 0, 1, 2
ROUNDING = 1e-9
EMPTY = 0.5
"""More empty answers than this share, where the baseline had fewer: generation failed silently."""


@dataclass(frozen=True)
class Rules:
    """How far a task may fall. tolerance: by task, "" for all others; in the units of the score.

    Without a tolerance a fall counts when it is beyond the noise: p < alpha in the sign-flip test
    over images, after Holm's correction for several tasks. metrics: the one to hold a task by,
    where it is not its first. max_age: of the results. skipped: documents of a task that may have
    been skipped, see the model's `on_error`.
    """

    tolerance: Mapping[str, float]
    alpha: float = 0.05
    metrics: Mapping[str, str] | None = None
    max_age: timedelta | None = None
    skipped: int = 0

    def allowed(self, task: str) -> float | None:
        return self.tolerance.get(task, self.tolerance.get(""))


@dataclass(frozen=True)
class Verdict:
    """What became of one task (or of the whole run). code: PASSED, FELL or BROKEN.

    fall: how much worse than the baseline, in the units of the score; negative where better.
    noise: half the width of the fall's 95 % interval, clustered by image.
    """

    task: str
    metric: str
    code: int
    reason: str
    before: float | None = None
    after: float | None = None
    fall: float | None = None
    noise: float | None = None
    p: float | None = None


class Broken(ValueError):
    """A task that cannot be held against its baseline."""


def check(folder: Path, baseline: Baseline, rules: Rules) -> list[Verdict]:
    """Hold a run against a baseline: one verdict a task, or one for a run that is no run."""
    try:
        run = _any_run(folder, list(baseline.tasks))
        check_run(run, rules.max_age)
    except BadRun as error:
        return [Verdict("run", "", BROKEN, str(error))]
    verdicts = [_check_task(folder, name, baseline, rules) for name in baseline.tasks]
    return _beyond_noise(verdicts, rules.alpha)


def safely_check(folder: Path, baseline: Baseline, rules: Rules) -> list[Verdict]:
    """`check`, where files that nobody foresaw are broken too: Python's own exit code is 1."""
    unknown = [name for name in rules.metrics or {} if name not in baseline.tasks]
    if unknown:
        raise ValueError(f"the baseline has no task {unknown[0]}, only {', '.join(baseline.tasks)}")
    for name, wanted in (rules.metrics or {}).items():
        metric_key(name, baseline.tasks[name], wanted)
    try:
        return check(folder, baseline, rules)
    except Exception as error:
        reason = f"{folder} cannot be read as a run: {type(error).__name__}: {error}"
        return [Verdict("run", "", BROKEN, reason)]


def _any_run(folder: Path, tasks: Sequence[str]) -> Run:
    """The run with the first of its tasks that can be read; a run of which none can is broken."""
    problems: list[str] = []
    for task in tasks:
        try:
            return read_run(folder, tasks=[task])
        except BadRun as error:
            problems.append(str(error))
    raise BadRun("; ".join(dict.fromkeys(problems)) or f"{folder}: the baseline holds no task")


def check_run(run: Run, max_age: timedelta | None = None) -> None:
    """Raise BadRun for what lmms-eval hides about a whole run."""
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
    key = metric_key(name, before, (rules.metrics or {}).get(name))
    try:
        evidence = gather(read_run(folder, tasks=[name]))
        refuse_skipped(evidence, name, rules.skipped)
        after = task_baseline(evidence, name)
        _refuse_moved(before, after)
        _refuse_other_data(name, baseline, evidence.facts)
        _refuse_unscored(key, evidence.run.tasks[name].totals.get(key), after)
    except (BadRun, Broken) as error:
        return Verdict(name, key, BROKEN, str(error))
    return _judge(name, key, before, after, rules.allowed(name))


def metric_key(name: str, task: TaskBaseline, wanted: str | None = None) -> str:
    """The metric a task is held by: the one asked for, else its first that should be high."""
    if wanted is None:
        high = [key for key, metric in task.metrics.items() if metric.higher_is_better]
        return (high or list(task.metrics))[0]
    for key in task.metrics:
        if wanted in (key, key.rpartition(",")[0]):
            return key
    raise ValueError(f"{name} has no metric {wanted} in the baseline: {', '.join(task.metrics)}")


def refuse_skipped(evidence: Evidence, task: str, allowed: int) -> None:
    """Raise Broken where more documents of a task than allowed were not answered as asked."""
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
            f"{agree(len(missing), 'is', 'are')} "
            "missing, such "
            f"as {min(missing)}"
        )
    if len(after.documents) > len(before.documents):
        raise Broken(
            f"{counted(len(after.documents), 'document')}, the baseline has "
            f"{len(before.documents)}: run with "
            "the same --limit, or --update"
        )
    for what in ("questions", "images"):
        pairs = zip(before.documents, getattr(before, what), getattr(after, what), strict=True)
        moved = [d for d, old, new in pairs if old != new and None not in (old, new)]
        if moved:
            name = "prompt or target" if what == "questions" else "image"
            raise Broken(f"another {name} in {counted(len(moved), 'document')}, such as {moved[0]}")
    both = before.scorer and after.scorer
    if (both and before.scorer != after.scorer) or before.settings != after.settings:
        raise Broken("another scorer than the baseline's (its source or settings changed)")


def _refuse_other_data(name: str, baseline: Baseline, facts: Facts | None) -> None:
    before = ((baseline.made_of or {}).get("data") or {}).get(name)
    moved = other_data(before, facts.data.get(name) if facts else None)
    if moved:
        raise Broken(moved)


def _refuse_unscored(key: str, total: float | None, after: TaskBaseline) -> None:
    if not is_number(total):
        raise Broken(f"{key} is {'missing' if total is None else total}, the baseline has a number")
    if key not in after.metrics:
        raise Broken(f"{key} cannot be read document by document, the baseline's could")
    metric = after.metrics[key]
    if metric.scores.count(None) == len(metric.scores):
        raise Broken(f"{key} has no scored document")


def _judge(
    name: str, key: str, before: TaskBaseline, after: TaskBaseline, allowed: float | None
) -> Verdict:
    old, new = before.metrics[key], after.metrics[key]
    if [s is None for s in old.scores] != [s is None for s in new.scores]:
        return Verdict(name, key, BROKEN, f"{key} is scored on other documents than the baseline's")
    if after.empty_answers > EMPTY * len(after.documents) > before.empty_answers:
        empty, answers = after.empty_answers, counted(len(after.documents), "answer")
        reason = f"{empty} of {answers} {agree(empty, 'is', 'are')} empty"
        return Verdict(name, key, BROKEN, reason)
    falls, clusters = _paired(old, new, before.clusters)
    fall = clustered(falls, clusters)
    verdict = Verdict(
        name,
        key,
        PASSED,
        "",
        old.mean,
        new.mean,
        fall.mean,
        (fall.high - fall.low) / 2,
        sign_flip(falls, clusters),
    )
    if allowed is None:
        return verdict  # judged with the other tasks, in _beyond_noise
    if fall.mean > allowed + ROUNDING:
        reason = f"fell by {fall.mean:.4f}, more than the tolerance of {allowed:g}"
        return replace(verdict, code=FELL, reason=reason)
    said = f"fell by {fall.mean:.4f}" if fall.mean > 0 else "did not fall"
    return replace(verdict, reason=f"{said}, tolerance {allowed:g}")


def _paired(
    old: MetricBaseline, new: MetricBaseline, clusters: Sequence[int]
) -> tuple[list[float], list[int]]:
    """(how much worse each scored document is, its cluster)."""
    sign = 1 if old.higher_is_better else -1
    both = zip(old.scores, new.scores, clusters, strict=True)
    pairs = [(sign * (a - b), c) for a, b, c in both if a is not None and b is not None]
    return [fall for fall, _ in pairs], [cluster for _, cluster in pairs]


def _beyond_noise(verdicts: Sequence[Verdict], alpha: float) -> list[Verdict]:
    """Judge the tasks without a tolerance, together: of many, one falls by chance."""
    waiting = [i for i, v in enumerate(verdicts) if not v.reason]
    adjusted = holm([verdicts[i].p or 0.0 for i in waiting])
    judged = list(verdicts)
    for i, p in zip(waiting, adjusted, strict=True):
        judged[i] = _against_noise(verdicts[i], p, alpha)
    return judged


def _against_noise(verdict: Verdict, p: float, alpha: float) -> Verdict:
    fall, noise = verdict.fall or 0.0, verdict.noise or 0.0
    if fall <= 0:
        return replace(verdict, reason="did not fall", p=p)
    if p < alpha:
        return replace(verdict, code=FELL, reason=f"fell by {fall:.4f}, p = {p:.2g}", p=p)
    reason = f"fell by {fall:.4f}, within the noise of {noise:.4f} (p = {p:.2g})"
    return replace(verdict, reason=reason, p=p)
