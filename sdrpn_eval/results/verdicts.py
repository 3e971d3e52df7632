"""Verdicts on tasks: how far a score fell, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from sdrpn.io.plurals import agree, counted
from sdrpn_eval.results.baseline import MetricBaseline, TaskBaseline
from sdrpn_eval.results.stats import (
    clustered_difference,
    holm,
    images_needed,
    sign_flip,
    smallest_p,
)

PASSED, FELL, BROKEN = 0, 1, 2
ROUNDING = 1e-9
EMPTY = 0.5
"""Share of empty answers above which generation failed silently, if the baseline had fewer."""


@dataclass(frozen=True)
class Rules:
    """How far a task may fall.

    Without a tolerance, a fall counts if it is beyond the noise: p < alpha in the sign-flip test
    over images, after Holm's correction for several tasks. If too few images can fall for p to
    tell anything, every fall counts.

    Attributes:
        tolerance: By task, "" for all others; in the units of the score.
        alpha: Significance level.
        metrics: By task, the metric that decides, if it is not the first.
        max_age: Of the results.
        skipped: Documents of a task that `on_error` may have skipped.
    """

    tolerance: Mapping[str, float]
    alpha: float = 0.05
    metrics: Mapping[str, str] = field(default_factory=dict)
    max_age: timedelta | None = None
    skipped: int = 0

    def allowed(self, task: str) -> float | None:
        return self.tolerance.get(task, self.tolerance.get(""))


@dataclass(frozen=True)
class Verdict:
    """The verdict about a task, or about the whole run.

    Attributes:
        code: PASSED, FELL or BROKEN.
        fall: How much worse than the baseline, in the units of the score; negative if better.
        noise: How far the fall's clustered 95 % interval reaches below it; None without one.
        p: Of the sign-flip test; adjusted if it decides.
        images: Images that can fall.
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


def metric_key(name: str, task: TaskBaseline, wanted: str | None = None) -> str:
    """The metric that decides: the one asked for, else the first of which higher is better."""
    if wanted is None:
        high = [key for key, metric in task.metrics.items() if metric.higher_is_better]
        return (high or list(task.metrics))[0]
    for key in task.metrics:
        if wanted in (key, key.rpartition(",")[0]):
            return key
    raise ValueError(f"{name} has no metric {wanted} in the baseline: {', '.join(task.metrics)}")


def judge(
    name: str, key: str, before: TaskBaseline, after: TaskBaseline, allowed: float | None
) -> Verdict:
    """Compares a task of a run, with the same documents, with its baseline by one metric.

    Without an allowed fall, the verdict has no reason yet: `beyond_noise` decides later.
    """
    old, new = before.metrics[key], after.metrics[key]
    if [s is None for s in old.scores] != [s is None for s in new.scores]:
        return Verdict(name, key, BROKEN, f"{key} is scored on other documents than the baseline's")
    if after.empty_answers > EMPTY * len(after.documents) > before.empty_answers:
        empty, answers = after.empty_answers, counted(len(after.documents), "answer")
        reason = f"{empty} of {answers} {agree(empty, 'is', 'are')} empty"
        return Verdict(name, key, BROKEN, reason)
    sign = 1 if old.higher_is_better else -1
    both = zip(old.scores, new.scores, before.clusters, strict=True)
    pairs = [(sign * (a - b), c) for a, b, c in both if a is not None and b is not None]
    falls, clusters = [fall for fall, _ in pairs], [cluster for _, cluster in pairs]
    shares = largest_fall(old) == largest_fall(new) == 1.0
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
        return verdict  # decided together with the other tasks, in `beyond_noise`
    if fall.mean > allowed + ROUNDING:
        reason = f"fell by {fall.mean:.4f}, more than the tolerance of {allowed:g}"
        return replace(verdict, code=FELL, reason=reason)
    said = f"fell by {fall.mean:.4f}" if fall.mean > ROUNDING else "did not fall"
    return replace(verdict, reason=f"{said}, tolerance {allowed:g}")


def images_that_can_fall(task: TaskBaseline, key: str) -> int:
    """Counts images with a document whose score can still get worse.

    The worst score is 0 if scores are never negative, 1 for shares of which lower is better; other
    scores have none.
    """
    metric = task.metrics[key]
    worst = None if largest_fall(metric) is None else 0 if metric.higher_is_better else 1
    scored = zip(metric.scores, task.clusters, strict=True)
    return len({cluster for score, cluster in scored if score not in (None, worst)})


def decided_by_noise(images: Mapping[str, int], alpha: float) -> set[str]:
    """Finds the tasks with enough images for the sign-flip test at level alpha, Holm-corrected.

    Tasks with the fewest images that can fall are dropped first, which leaves fewer tests to
    correct for.
    """
    left = dict(images)
    while left:
        needed = images_needed(alpha, len(left))
        fewest = min(left, key=lambda task: left[task])
        if needed is not None and left[fewest] >= needed:
            return set(left)
        del left[fewest]
    return set()


def small(tasks: Mapping[str, TaskBaseline], rules: Rules) -> dict[str, str]:
    """By task of a baseline that is too small to be judged by its noise, the reason."""
    waiting = {
        name: images_that_can_fall(task, metric_key(name, task, rules.metrics.get(name)))
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
    """Why noise cannot decide about a task, and how many images it takes."""
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


def beyond_noise(verdicts: Sequence[Verdict], alpha: float) -> list[Verdict]:
    """Decides the tasks without a tolerance together: of many, one falls by chance."""
    waiting = {v.task: v for v in verdicts if not v.reason}
    enough = decided_by_noise({task: v.images or 0 for task, v in waiting.items()}, alpha)
    tested = [task for task in waiting if task in enough]
    p_values = dict(zip(tested, holm([waiting[t].p or 0.0 for t in tested]), strict=True))
    return [
        v if v.reason else _decided(v, p_values.get(v.task), alpha, len(enough) + 1)
        for v in verdicts
    ]


def _decided(verdict: Verdict, p: float | None, alpha: float, tests: int) -> Verdict:
    """Decides by a corrected p-value; without one, for want of images, every fall counts.

    `tests` is the number of tests if this one were made too.
    """
    fall, noise = verdict.fall or 0.0, verdict.noise
    if p is None:
        few = too_few(verdict.images or 0, alpha, tests)
        if fall <= ROUNDING:
            return replace(verdict, reason=f"did not fall; {few}")
        return replace(verdict, code=FELL, reason=f"fell by {fall:.4f}; {few}, or a --tolerance")
    if fall <= ROUNDING:
        return replace(verdict, reason="did not fall", p=p)
    if p < alpha:
        return replace(verdict, code=FELL, reason=f"fell by {fall:.4f}, p = {p:.2g}", p=p)
    by_chance = f"not more than chance (p = {p:.2g})"
    if noise is not None and fall <= noise:
        by_chance = f"within the noise of {noise:.4f} (p = {p:.2g})"
    return replace(verdict, reason=f"fell by {fall:.4f}, {by_chance}", p=p)


def largest_fall(metric: MetricBaseline) -> float | None:
    """How far a mean can fall at most, by the scale of its scores; None if unbounded."""
    scores = [score for score in metric.scores if score is not None]
    if all(0 <= score <= 1 for score in scores):
        return 1.0
    return max(scores) if metric.higher_is_better and min(scores) >= 0 else None
