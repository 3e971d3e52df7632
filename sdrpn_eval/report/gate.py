"""A run against a baseline, for CI: 0 it stands, 1 a task fell, 2 it cannot be believed.

lmms-eval exits with 0 when it failed, so the files are asked, not the exit code: a run counts only
when every document of the baseline is there, asked and scored as then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sdrpn.io.plurals import agree, counted
from sdrpn_eval.report.baseline import Baseline, MetricBaseline, TaskBaseline, task_baseline
from sdrpn_eval.report.checks import Evidence, changes, other_data
from sdrpn_eval.report.comparison import gather
from sdrpn_eval.report.facts import Facts
from sdrpn_eval.report.looks import unfinished_later_run
from sdrpn_eval.report.runs import BadRun, Run, is_number, read_run
from sdrpn_eval.stats import clustered_difference, holm, images_needed, sign_flip, smallest_p

PASSED, FELL, BROKEN = 0, 1, 2
ROUNDING = 1e-9
EMPTY = 0.5
"""More empty answers than this share, where the baseline had fewer: generation failed silently."""


@dataclass(frozen=True)
class Rules:
    """How far a task may fall. tolerance: by task, "" for all others; in the units of the score.

    Without a tolerance a fall counts when it is beyond the noise: p < alpha in the sign-flip test
    over images, after Holm's correction for several tasks. Where so few images can fall that their
    p tells nothing, every fall counts. metrics: the one to hold a task by, where it is not its
    first. max_age: of the results. skipped: documents of a task that may have been skipped, see
    the model's `on_error`.
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
    noise: how far the fall's 95 % interval, clustered by image, reaches below it; None where there
    is no interval. p: of the sign-flip test, adjusted where the task is judged by it. images: that
    can fall.
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
    images: int | None = None


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
    check_rules(rules, baseline.tasks)
    try:
        return check(folder, baseline, rules)
    except Exception as error:
        reason = f"{folder} cannot be read as a run: {type(error).__name__}: {error}"
        return [Verdict("run", "", BROKEN, reason)]


def check_rules(rules: Rules, tasks: Mapping[str, TaskBaseline]) -> None:
    """Raise ValueError, naming the option and its value, for rules that cannot mean anything.

    Args:
        rules: As given on the command line; tolerances may come from the baseline.
        tasks: Of the baseline, by name.
    """
    if not 0 < rules.alpha < 1:
        raise ValueError(f"--alpha must be in (0, 1), got {rules.alpha:g}")
    named = {"--tolerance": rules.tolerance, "--metric": rules.metrics or {}}
    for option, given in named.items():
        for name in given:
            if name and name not in tasks:
                held = ", ".join(tasks)
                raise ValueError(
                    f"{option} {name}={given[name]}: the baseline has no task {name}, only {held}"
                )
    keys = {n: metric_key(n, task, (rules.metrics or {}).get(n)) for n, task in tasks.items()}
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
    largest = _largest_fall(metric)
    if largest is not None and allowed >= largest:
        raise ValueError(
            f"{given} would pass every fall: scores of {task} can fall by {largest:g} at most; "
            f"give a value in [0, {largest:g})"
        )


def _largest_fall(metric: MetricBaseline) -> float | None:
    """How far a mean can fall at most, by the scale of its scores; None where it has no end."""
    scores = [score for score in metric.scores if score is not None]
    if all(0 <= score <= 1 for score in scores):
        return 1.0
    return max(scores) if metric.higher_is_better and min(scores) >= 0 else None


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
    if before.settings != after.settings:
        changed = changes(before.scoring, after.scoring) if before.scoring else {}
        told = "; ".join(f"{name} is {b}, was {a}" for name, (a, b) in changed.items())
        raise Broken(f"another scorer than the baseline's: {told or 'its settings changed'}")
    if before.scorer and after.scorer and before.scorer != after.scorer:
        raise Broken("another scorer than the baseline's: its source changed")


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
    shares = _largest_fall(old) == _largest_fall(new) == 1.0
    fall = clustered_difference(falls, clusters, shares=shares)
    verdict = Verdict(
        name,
        key,
        PASSED,
        "",
        old.mean,
        new.mean,
        fall.mean,
        None if fall.low is None else fall.mean - fall.low,
        sign_flip(falls, clusters),
        images_that_can_fall(before, key),
    )
    if allowed is None:
        return verdict  # judged with the other tasks, in _beyond_noise
    if fall.mean > allowed + ROUNDING:
        reason = f"fell by {fall.mean:.4f}, more than the tolerance of {allowed:g}"
        return replace(verdict, code=FELL, reason=reason)
    said = f"fell by {fall.mean:.4f}" if fall.mean > ROUNDING else "did not fall"
    return replace(verdict, reason=f"{said}, tolerance {allowed:g}")


def _paired(
    old: MetricBaseline, new: MetricBaseline, clusters: Sequence[int]
) -> tuple[list[float], list[int]]:
    """(how much worse each scored document is, its cluster)."""
    sign = 1 if old.higher_is_better else -1
    both = zip(old.scores, new.scores, clusters, strict=True)
    pairs = [(sign * (a - b), c) for a, b, c in both if a is not None and b is not None]
    return [fall for fall, _ in pairs], [cluster for _, cluster in pairs]


def images_that_can_fall(task: TaskBaseline, key: str) -> int:
    """Images with a document whose score is not the worst there is, and so can get worse.

    The worst is 0 of scores that are never negative, 1 of shares that should be low; of other
    scores there is none.
    """
    metric = task.metrics[key]
    scored = [(s, c) for s, c in zip(metric.scores, task.clusters, strict=True) if s is not None]
    if _largest_fall(metric) is None:
        return len({cluster for _, cluster in scored})
    worst = 0 if metric.higher_is_better else 1
    return len({cluster for score, cluster in scored if score != worst})


def decided_by_noise(images: Mapping[str, int], alpha: float) -> dict[str, int]:
    """Tasks with enough images for the sign-flip test, with the images that each needs.

    The fewest go first, and then the others are fewer tests to correct for.

    Args:
        images: By task, how many can fall.
        alpha: Level that the p-values, after Holm's correction, are held against.

    Returns:
        By task, the images needed; only of tasks that have them.
    """
    left = dict(images)
    while left:
        needed = images_needed(alpha, len(left))
        fewest = min(left, key=lambda task: left[task])
        if needed is not None and left[fewest] >= needed:
            return dict.fromkeys(left, needed)
        del left[fewest]
    return {}


def small(tasks: Mapping[str, TaskBaseline], rules: Rules) -> dict[str, str]:
    """By task of a baseline, why the noise cannot decide about it; none where it can."""
    waiting = {
        name: images_that_can_fall(task, metric_key(name, task, (rules.metrics or {}).get(name)))
        for name, task in tasks.items()
        if rules.allowed(name) is None
    }
    enough = decided_by_noise(waiting, rules.alpha)
    return {
        name: too_few(images, rules.alpha, len(enough) + 1)
        for name, images in waiting.items()
        if name not in enough
    }


def too_few(images: int, alpha: float, tests: int) -> str:
    """Why the noise cannot decide about a task, and how many images it takes."""
    if not images:
        return "the baseline's score is the worst there is, so no fall can be seen"
    least, half = (min(1.0, tests * smallest_p(n)) for n in (images, images // 2))
    corrected = f", corrected for {tests} tasks" if tests > 1 else ""
    why = f"the smallest p-value that they can reach is {least:.2g}"
    if least < alpha:
        why = f"the smallest p-value where half of them fall is {half:.2g}"
    return (
        f"only {counted(images, 'image')} can fall, too few to tell a fall from noise "
        f"({why}{corrected}, not below alpha = {alpha:g}); at least "
        f"{images_needed(alpha, tests)} are needed"
    )


def _beyond_noise(verdicts: Sequence[Verdict], alpha: float) -> list[Verdict]:
    """Judge the tasks without a tolerance, together: of many, one falls by chance."""
    waiting = {v.task: v.images or 0 for v in verdicts if not v.reason}
    enough = decided_by_noise(waiting, alpha)
    order = [i for i, v in enumerate(verdicts) if not v.reason and v.task in enough]
    adjusted = dict(zip(order, holm([verdicts[i].p or 0.0 for i in order]), strict=True))
    judged = []
    for i, verdict in enumerate(verdicts):
        if verdict.reason:
            judged.append(verdict)
        elif i in adjusted:
            judged.append(_against_noise(verdict, adjusted[i], alpha))
        else:
            judged.append(_without_noise(verdict, alpha, len(enough) + 1))
    return judged


def _against_noise(verdict: Verdict, p: float, alpha: float) -> Verdict:
    fall, noise = verdict.fall or 0.0, verdict.noise
    if fall <= ROUNDING:
        return replace(verdict, reason="did not fall", p=p)
    if p < alpha:
        return replace(verdict, code=FELL, reason=f"fell by {fall:.4f}, p = {p:.2g}", p=p)
    by_chance = f"not more than chance (p = {p:.2g})"
    if noise is not None and fall <= noise:
        by_chance = f"within the noise of {noise:.4f} (p = {p:.2g})"
    return replace(verdict, reason=f"fell by {fall:.4f}, {by_chance}", p=p)


def _without_noise(verdict: Verdict, alpha: float, tests: int) -> Verdict:
    """Any fall counts: no p-value of so few images would be below alpha."""
    fall = verdict.fall or 0.0
    few = too_few(verdict.images or 0, alpha, tests)
    if fall <= ROUNDING:
        return replace(verdict, reason=f"did not fall; {few}")
    return replace(verdict, code=FELL, reason=f"fell by {fall:.4f}; {few}, or a --tolerance")
