"""Falls, noise and tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.results.baseline import TaskBaseline
from sdrpn_eval.results.verdicts import (
    BROKEN,
    FELL,
    PASSED,
    Rules,
    Verdict,
    beyond_noise,
    decided_by_noise,
    images_that_can_fall,
    judge,
    largest_fall,
    metric_key,
    small,
    too_few,
)
from tests.helpers.comparisons import N, metric, rows, run_gate, task
from tests.helpers.run_folders import (
    record_line,
    sample,
    write_record,
    write_run,
)


def test_the_same_run_passes(tmp_path: Path, baseline: Path) -> None:
    code, line = run_gate(tmp_path / "good", baseline)
    assert (code, line) == (0, "gate: passed, 2 task(s) stand")


def test_a_fall_beyond_the_noise_fails_and_is_named(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=9), "y": rows(wrong=1)})
    code, line = run_gate(run, baseline)
    assert code == 1
    assert line.startswith("gate: fell: x accuracy: 1.0000 -> 0.7750, fell by 0.2250, p = 0.00")
    assert "y" not in line.split("fell:")[1].split("p =")[1]


def test_rules_by_default() -> None:
    rules = Rules({})
    assert (rules.alpha, rules.skipped, rules.max_age, rules.metrics) == (0.05, 0, None, {})
    assert rules.allowed("x") is None


def test_a_fall_within_the_noise_passes(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=3), "y": rows()})
    assert run_gate(run, baseline)[0] == 0
    assert run_gate(run, baseline, "--alpha", "0.6")[0] == 1
    # Three of 40 from 1.7 %, by scipy.stats.beta; none gained, of 8.8 % at most: together 10.6 %.
    said = verdict_lines(run, baseline)
    assert "fell by 0.0750, within the noise of 0.1064 (p = 0.5)" in said


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--tolerance", "0.05"], 1),
        (["--tolerance", "0.075"], 0),
        (["--tolerance", "x=0.1"], 0),
        (["--tolerance", "x=0.01", "--tolerance", "0.5"], 1),
        (["--tolerance", "y=0.01"], 0),
    ],
)
def test_tolerances(tmp_path: Path, baseline: Path, words: list[str], code: int) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=3), "y": rows()})
    assert run_gate(run, baseline, *words)[0] == code


def test_a_tolerance_says_what_fell(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=3), "y": rows()})
    said = verdict_lines(run, baseline, "--tolerance", "0.1")
    assert said == (
        "passed: x accuracy: 1.0000 -> 0.9250, fell by 0.0750, tolerance 0.1 "
        "passed: y accuracy: 1.0000 -> 1.0000, did not fall, tolerance 0.1 "
        "gate: passed, 2 task(s) stand"
    )
    assert run_gate(run, baseline, "--tolerance", "0.05") == (
        1,
        "gate: fell: x accuracy: 1.0000 -> 0.9250, fell by 0.0750, more than the tolerance of 0.05",
    )


def test_a_gain_passes(tmp_path: Path, baseline: Path) -> None:
    worse = write_run(tmp_path / "worse", {"x": rows(wrong=20), "y": rows(wrong=20)})
    run_gate(worse, baseline, "--update")
    assert run_gate(tmp_path / "good", baseline)[0] == 0
    assert run_gate(tmp_path / "good", baseline, "--tolerance", "0")[0] == 0


def on_images(folder: Path, images: int, wrong: int = 0, right_before: int = N) -> Path:
    """A run of the task toy: N questions on so many images in order, the first ones wrong."""
    red = range(wrong, right_before)
    write_run(folder, {"toy": [sample(i, "red" if i in red else "blue") for i in range(N)]})
    lines = [record_line(i, "red" if i in red else "blue") for i in range(N)]
    for i, line in enumerate(lines):
        line["images"] = [{"hash": f"image{i * images // N}", "size": [100, 100]}]
    write_record(folder, lines)
    return folder


def test_images_and_not_questions_are_counted(tmp_path: Path) -> None:
    """Nine wrong questions on five images are less sure than on nine."""
    base = tmp_path / "b.json"
    run_gate(on_images(tmp_path / "good", 20), base, "--update")
    code, line = run_gate(on_images(tmp_path / "bad", 20, wrong=9), base)
    assert (code, line) == (0, "gate: passed, 1 task(s) stand")
    run_gate(on_images(tmp_path / "apart", 40), base, "--update")
    assert run_gate(on_images(tmp_path / "worse", 40, wrong=9), base)[0] == 1


def verdict_lines(run: Path, baseline: Path, *words: str) -> str:
    """All that the gate prints, on one line."""
    done = CliRunner().invoke(app, ["gate", str(run), "--baseline", str(baseline), *words])
    return " ".join(done.output.split())


@pytest.mark.parametrize("images", [1, 2, 3, 5, 6, 11, 12, 40])
def test_a_collapse_fails_whatever_the_number_of_images(tmp_path: Path, images: int) -> None:
    base = tmp_path / "b.json"
    run_gate(on_images(tmp_path / "good", images), base, "--update")
    code, line = run_gate(on_images(tmp_path / "bad", images, wrong=N), base)
    assert code == 1
    assert line.startswith("gate: fell: toy accuracy: 1.0000 -> 0.0000, fell by 1.0000")
    assert "noise of 0.0000" not in line
    assert "nan" not in line


@pytest.mark.parametrize(
    ("images", "why"),
    [
        (
            1,
            "only 1 image can fall, too few to tell a fall from noise (the smallest p-value that "
            "they can reach is 1, not below alpha = 0.05); at least 12 are needed",
        ),
        (
            3,
            "only 3 images can fall, too few to tell a fall from noise (the smallest p-value that "
            "they can reach is 0.25, not below alpha = 0.05); at least 12 are needed",
        ),
        (
            10,
            "only 10 images can fall, too few to tell a fall from noise (the smallest p-value "
            "where half of them fall is 0.062, not below alpha = 0.05); at least 12 are needed",
        ),
    ],
)
def test_any_fall_fails_where_images_are_too_few(tmp_path: Path, images: int, why: str) -> None:
    base = tmp_path / "b.json"
    good = on_images(tmp_path / "good", images)
    said = verdict_lines(good, base, "--update")
    assert f"note: toy: {why}; until then every fall fails, unless a --tolerance is given" in said
    code, line = run_gate(on_images(tmp_path / "bad", images, wrong=1), base)
    assert (code, line) == (
        1,
        f"gate: fell: toy accuracy: 1.0000 -> 0.9750, fell by 0.0250; {why}, or a --tolerance",
    )
    assert run_gate(good, base)[0] == 0
    assert f"passed: toy accuracy: 1.0000 -> 1.0000, did not fall; {why}" in verdict_lines(
        good, base
    )


def test_enough_images_are_held_by_their_noise_and_nothing_is_said(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    said = verdict_lines(on_images(tmp_path / "good", 12), base, "--update")
    assert "note:" not in said
    said = verdict_lines(on_images(tmp_path / "bad", 12, wrong=1), base)
    assert "fell by 0.0250, within the noise of 0." in said


def test_a_tolerance_needs_no_number_of_images(tmp_path: Path) -> None:
    base, bad = tmp_path / "b.json", on_images(tmp_path / "bad", 3, wrong=2)
    said = verdict_lines(on_images(tmp_path / "g", 3), base, "--update", "--tolerance", "0.05")
    assert "note:" not in said
    assert run_gate(bad, base) == (0, "gate: passed, 1 task(s) stand")
    assert run_gate(bad, base, "--tolerance", "0.04")[0] == 1


def test_images_that_cannot_fall_do_not_count(tmp_path: Path) -> None:
    """Of 40 images the baseline has ten right: their p-value of five is not below 0.05."""
    base = tmp_path / "b.json"
    said = verdict_lines(on_images(tmp_path / "good", 40, right_before=10), base, "--update")
    assert "note: toy: only 10 images can fall" in said
    code, line = run_gate(on_images(tmp_path / "bad", 40, wrong=1, right_before=10), base)
    assert code == 1
    assert "0.2500 -> 0.2250, fell by 0.0250; only 10 images can fall" in line


def test_a_baseline_at_the_worst_score_says_that_it_sees_nothing(tmp_path: Path) -> None:
    base, zero = tmp_path / "b.json", on_images(tmp_path / "zero", 40, wrong=40)
    worst = "the baseline's score is the worst there is, so no fall can be seen"
    assert f"note: toy: {worst}" in verdict_lines(zero, base, "--update")
    assert f"0.0000 -> 0.0000, did not fall; {worst}" in verdict_lines(zero, base)


def lower(folder: Path, values: list[float]) -> Path:
    lines = [sample(i, unparsed=v) for i, v in enumerate(values)]
    totals = {"toy": {"unparsed,none": sum(values) / len(values)}}
    return write_run(folder, {"toy": lines}, totals, better={"unparsed": False})


def test_of_a_score_that_should_be_low_the_images_below_one_can_fall(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    said = verdict_lines(lower(tmp_path / "a", [1.0] * 30 + [0.0] * 10), base, "--update")
    assert "note: toy: only 10 images can fall" in said
    said = verdict_lines(lower(tmp_path / "b", [1.0] * 10 + [0.0] * 30), base, "--update")
    assert "note:" not in said
    said = verdict_lines(lower(tmp_path / "c", [1.0] * 35 + [7.0] * 5), base, "--update")
    assert "note:" not in said  # of another scale: it can rise without end


def test_scores_of_another_scale_fall_to_nothing(tmp_path: Path) -> None:
    def run(name: str, points: list[float]) -> Path:
        lines = [sample(i, accuracy=p) for i, p in enumerate(points)]
        totals = {"toy": {"accuracy,none": sum(points) / len(points)}}
        return write_run(tmp_path / name, {"toy": lines}, totals)

    base = tmp_path / "b.json"
    said = verdict_lines(run("few", [0.0] * 30 + [20.0] * 10), base, "--update")
    assert "note: toy: only 10 images can fall" in said
    said = verdict_lines(run("good", [20.0] * 40), base, "--update")
    assert "note:" not in said
    # All alike: no interval, and the sentence names none.
    code, line = run_gate(run("same", [19.0] * 40), base)
    assert (code, line) == (
        1,
        "gate: fell: toy accuracy: 20.0000 -> 19.0000, fell by 1.0000, p = 0.0001",
    )
    said = verdict_lines(run("noise", [19.0, 22.0, 17.0] + [20.0] * 37), base)
    assert "fell by 0.0500, within the noise of 0." in said


def test_tasks_that_are_too_small_do_not_make_others_less_sure(tmp_path: Path) -> None:
    """Of 12 images six fall, p = 0.031: enough for one task, not for Holm's two."""
    base = tmp_path / "b.json"
    tasks = {"large": rows(n=12), "small": rows(n=4)}
    run_gate(write_run(tmp_path / "good", tasks), base, "--update")
    bad = write_run(tmp_path / "bad", {"large": rows(wrong=6, n=12), "small": rows(n=4)})
    said = verdict_lines(bad, base)
    assert "fell: large accuracy: 1.0000 -> 0.5000, fell by 0.5000, p = 0.031" in said
    corrected = "the smallest p-value that they can reach is 0.25, corrected for 2 tasks"
    assert "small accuracy: 1.0000 -> 1.0000, did not fall; only 4 images can fall" in said
    assert corrected in said
    assert "at least 14 are needed" in said


def test_two_tasks_are_corrected_for(tmp_path: Path, baseline: Path) -> None:
    """Six of forty wrong, p = 2 / 64: beyond the noise of one task, not of one of two."""
    run = write_run(tmp_path / "run", {"x": rows(wrong=6), "y": rows()})
    assert run_gate(run, baseline)[0] == 0
    assert "x accuracy: 1.0000 -> 0.8500, fell by 0.1500, not more than chance (p = 0.062)" in (
        verdict_lines(run, baseline)
    )
    both = write_run(tmp_path / "both", {"x": rows(wrong=6), "y": rows(wrong=9)})
    said = verdict_lines(both, baseline)
    assert "fell: x accuracy: 1.0000 -> 0.8500, fell by 0.1500, p = 0.031" in said
    assert "fell: y accuracy: 1.0000 -> 0.7750, fell by 0.2250, p = 0.0078" in said
    alone = tmp_path / "alone.json"
    run_gate(write_run(tmp_path / "x", {"x": rows()}), alone, "--update")
    code, line = run_gate(write_run(tmp_path / "six", {"x": rows(wrong=6)}), alone)
    assert (code, line) == (
        1,
        "gate: fell: x accuracy: 1.0000 -> 0.8500, fell by 0.1500, p = 0.031",
    )
    assert run_gate(write_run(tmp_path / "five", {"x": rows(wrong=5)}), alone)[0] == 0


def test_another_metric_can_be_held(tmp_path: Path) -> None:
    def run(name: str, unparsed: float) -> Path:
        lines = [sample(i, accuracy=1.0, unparsed=unparsed) for i in range(N)]
        totals = {"toy": {"accuracy,none": 1.0, "unparsed,none": unparsed}}
        better = {"accuracy": True, "unparsed": False}
        return write_run(tmp_path / name, {"toy": lines}, totals, better=better)

    base = tmp_path / "b.json"
    run_gate(run("good", 0.0), base, "--update")
    bad = run("bad", 1.0)
    assert run_gate(bad, base)[0] == 0
    code, line = run_gate(bad, base, "--metric", "toy=unparsed")
    assert code == 1
    assert "toy unparsed: 0.0000 -> 1.0000, fell by 1.0000" in line
    for words in ("toy=nope", "nope=accuracy"):
        code, line = run_gate(bad, base, "--metric", words)
        assert code == 2
        assert "nope" in line


def test_silent_failures_to_generate_are_broken(tmp_path: Path, baseline: Path) -> None:
    """lmms-eval's llava_hf answers "" when generation raises, such as out of memory."""
    mute = [sample(i, "", accuracy=0.0) for i in range(N)]
    code, line = run_gate(write_run(tmp_path / "run", {"x": mute, "y": rows()}), baseline)
    assert code == 2
    assert "40 of 40 answers are empty" in line


@pytest.mark.parametrize(("empty", "code"), [(20, 1), (21, 2)])
def test_most_answers_must_be_empty_for_a_silent_failure(
    tmp_path: Path, baseline: Path, empty: int, code: int
) -> None:
    mute = [sample(i, "" if i < empty else "red", accuracy=float(i >= empty)) for i in range(N)]
    assert run_gate(write_run(tmp_path / "run", {"x": mute, "y": rows()}), baseline)[0] == code


def test_half_of_the_answers_empty_before_is_as_mute(tmp_path: Path) -> None:
    def run(name: str, empty: int) -> Path:
        lines = [sample(i, "" if i < empty else "red") for i in range(N)]
        return write_run(tmp_path / name, {"x": lines})

    run_gate(run("before", 20), tmp_path / "b.json", "--update")
    assert run_gate(run("after", 21), tmp_path / "b.json")[0] == 0
    run_gate(run("before", 19), tmp_path / "b.json", "--update")
    assert run_gate(run("after", 21), tmp_path / "b.json")[0] == 2


def test_a_model_that_was_as_mute_before_is_held_by_its_score(tmp_path: Path) -> None:
    mute = [sample(i, "" if i < 30 else "red", accuracy=float(i >= 30)) for i in range(N)]
    run = write_run(tmp_path / "run", {"x": mute})
    assert run_gate(run, tmp_path / "b.json", "--update")[0] == 0
    assert run_gate(run, tmp_path / "b.json")[0] == 0


# By hand, without files


def judged(before: TaskBaseline, after: TaskBaseline, allowed: float | None = None) -> Verdict:
    return judge("toy", "accuracy,none", before, after, allowed)


def test_a_verdict_that_waits_for_others() -> None:
    """Of four questions one fell, on one image of three; the image without a point cannot."""
    found = judged(task([1, 1, 0, 1], [0, 0, 1, 2]), task([1, 0, 0, 1], [0, 0, 1, 2]))
    assert (found.task, found.metric, found.code, found.reason) == ("toy", "accuracy,none", 0, "")
    assert (found.before, found.after, found.fall) == (0.75, 0.5, 0.25)
    assert (found.p, found.images) == (1.0, 2)
    one = judged(task([1, 1], [0, 0]), task([1, 0], [0, 0]))
    assert (one.fall, one.noise) == (0.5, None)  # one image gives no interval
    # Both of two fell, from 15.811 %; none gained, of 84.189 % at most: together 119.061 %.
    both = judged(task([1, 1]), task([0, 0]))
    assert both.noise == pytest.approx(1.19061, abs=1e-5)
    assert both.p == 0.5


def test_a_score_that_should_be_low_falls_by_rising() -> None:
    before, after = task([0, 0, 1], better=False), task([1, 0, 1], better=False)
    assert judged(before, after).fall == pytest.approx(1 / 3)
    assert judged(before, after).images == 2


def test_documents_that_a_metric_does_not_count_are_left_out() -> None:
    found = judged(task([1, None, 0, 1]), task([0, None, 0, 1]))
    assert (found.fall, found.images) == (pytest.approx(1 / 3), 2)
    other = judged(task([1, None]), task([1, 0]))
    assert (other.code, other.reason) == (
        BROKEN,
        "accuracy,none is scored on other documents than the baseline's",
    )
    assert (other.task, other.metric) == ("toy", "accuracy,none")


@pytest.mark.parametrize(
    ("before", "after", "code", "reason"),
    [
        (1, 3, BROKEN, "3 of 4 answers are empty"),
        (2, 3, PASSED, ""),  # half of them were
        (1, 2, PASSED, ""),  # no more than half are
    ],
)
def test_more_than_half_of_the_answers_empty(
    before: int, after: int, code: int, reason: str
) -> None:
    found = judged(task([1] * 4, empty=before), task([1] * 4, empty=after))
    assert (found.task, found.metric, found.code, found.reason) == (
        "toy",
        "accuracy,none",
        code,
        reason,
    )
    alone = judged(task([1]), task([1], empty=1))
    assert alone.reason == "1 of 1 answer is empty"


@pytest.mark.parametrize(
    ("allowed", "code", "reason"),
    [
        (0.25, PASSED, "fell by 0.2500, tolerance 0.25"),
        (0.2, FELL, "fell by 0.2500, more than the tolerance of 0.2"),
        (0.0, FELL, "fell by 0.2500, more than the tolerance of 0"),
    ],
)
def test_a_tolerance_is_the_most_that_passes(allowed: float, code: int, reason: str) -> None:
    found = judged(task([1] * 4), task([1, 1, 0, 1]), allowed)
    assert (found.code, found.reason) == (code, reason)


@pytest.mark.parametrize("fall", [0.0, 5e-10, -0.5])
def test_a_difference_by_rounding_is_no_fall(fall: float) -> None:
    found = judged(task([0.5] * 2), task([0.5 - fall] * 2), 0.0)
    assert (found.code, found.reason) == (PASSED, "did not fall, tolerance 0")


def test_scores_of_one_scale_in_one_run_only() -> None:
    """3 of [0, 5] is no share: the interval is a bootstrap's, over differences outside [-1, 1]."""
    found = judged(task([1.0, 1.0]), task([5.0, 1.0]))
    assert (found.fall, found.noise) == (-2.0, 2.0)


def test_what_can_fall() -> None:
    def images(scores: Sequence[float | None], better: bool = True) -> int:
        return images_that_can_fall(task(scores, [0, 0, 1, 2], better=better), "accuracy,none")

    assert images([0, 1, 0, 1]) == 2
    assert images([0, 0, None, 0.5]) == 1
    assert images([0, 1, 1, 1], better=False) == 1
    assert images([0, 20, 0, 20]) == 2
    assert images([0, 20, None, 20], better=False) == 2  # it can rise without end
    assert images([-1, 0, 0, 0]) == 3


def test_how_far_a_mean_can_fall() -> None:
    assert largest_fall(metric([0, 1])) == 1.0
    assert largest_fall(metric([0.25, None, 0.5])) == 1.0
    assert largest_fall(metric([0, 1], better=False)) == 1.0
    assert largest_fall(metric([0, None, 20])) == 20
    assert largest_fall(metric([0, 1.5])) == 1.5
    assert largest_fall(metric([0, 20], better=False)) is None
    assert largest_fall(metric([-1, 2])) is None
    assert largest_fall(metric([-0.5, 1])) is None


def test_tasks_that_noise_can_decide_about() -> None:
    """One task needs 12 images, each of two 14."""
    assert decided_by_noise({}, 0.05) == set()
    assert decided_by_noise({"a": 11}, 0.05) == set()
    assert decided_by_noise({"a": 12}, 0.05) == {"a"}
    assert decided_by_noise({"a": 13, "b": 14}, 0.05) == {"b"}
    assert decided_by_noise({"b": 14, "a": 13}, 0.05) == {"b"}
    assert decided_by_noise({"a": 14, "b": 14}, 0.05) == {"a", "b"}
    # Of drawn patterns the smallest p is 0.0001: below it for one task, not for two.
    assert decided_by_noise({"a": 100, "b": 101}, 0.00015) == {"b"}
    assert decided_by_noise({"a": 100}, 0.0001) == set()


def test_tasks_that_are_too_small() -> None:
    tasks = {"x": task([1.0] * 12), "y": task([1.0] * 4, unparsed=metric([1.0, 1, 1, 0], False))}
    why = "only 4 images can fall, too few to tell a fall from noise (the smallest p-value that "
    why += "they can reach is 0.25, corrected for 2 tasks, not below alpha = 0.05); at least 14 are"
    assert small(tasks, Rules({})) == {"y": f"{why} needed"}
    assert small(tasks, Rules({"y": 0.1})) == {}
    assert small(tasks, Rules({"": 0.1})) == {}
    one = small(tasks, Rules({}, metrics={"y": "unparsed"}))
    assert one["y"].startswith("only 1 image can fall")


@pytest.mark.parametrize(
    ("images", "alpha", "tests", "why", "needed"),
    [
        (11, 0.05, 1, "where half of them fall is 0.062", 12),
        (12, 0.05, 2, "where half of them fall is 0.062, corrected for 2 tasks", 14),
        (6, 0.03125, 1, "that they can reach is 0.031", 14),  # not below alpha
        (2, 0.05, 3, "that they can reach is 1, corrected for 3 tasks", 14),
    ],
)
def test_why_images_are_too_few(
    images: int, alpha: float, tests: int, why: str, needed: int
) -> None:
    assert too_few(images, alpha, tests) == (
        f"only {images} images can fall, too few to tell a fall from noise (the smallest p-value "
        f"{why}, not below alpha = {alpha:g}); at least {needed} are needed"
    )


def waiting(name: str, fall: float, p: float, images: int = 20, noise: Any = 0.2) -> Verdict:
    return Verdict(name, "accuracy,none", PASSED, "", 1.0, 1.0 - fall, fall, noise, p, images)


def test_tasks_are_decided_together() -> None:
    """p of 0.01, 0.04, 0.03 and 0.015 are 0.04, 0.06, 0.06 and 0.045 after Holm.

    The tasks of four images do not count.
    """
    broken = Verdict("a", "", BROKEN, "its reason")
    few = "only 4 images can fall, too few to tell a fall from noise (the smallest p-value that "
    few += (
        "they can reach is 0.62, corrected for 5 tasks, not below alpha = 0.05); at least 16 are "
    )
    given = [
        broken,
        waiting("b", 0.5, 0.01),
        waiting("c", 0.1, 0.04),
        waiting("d", 0.0, 0.9, images=4),
        waiting("e", 0.3, 0.03),
        waiting("f", 0.25, 0.9, images=4),
        waiting("g", -0.1, 0.015),
    ]
    found = beyond_noise(given, 0.05)
    assert found[0] == broken
    assert [(v.task, v.code, v.reason, v.p) for v in found[1:]] == [
        ("b", FELL, "fell by 0.5000, p = 0.04", pytest.approx(0.04)),
        ("c", PASSED, "fell by 0.1000, within the noise of 0.2000 (p = 0.06)", pytest.approx(0.06)),
        ("d", PASSED, f"did not fall; {few}needed", 0.9),
        ("e", PASSED, "fell by 0.3000, not more than chance (p = 0.06)", pytest.approx(0.06)),
        ("f", FELL, f"fell by 0.2500; {few}needed, or a --tolerance", 0.9),
        ("g", PASSED, "did not fall", pytest.approx(0.045)),
    ]


@pytest.mark.parametrize(
    ("fall", "p", "noise", "code", "reason"),
    [
        (0.1, 0.05, 0.1, PASSED, "fell by 0.1000, within the noise of 0.1000 (p = 0.05)"),
        (0.1, 0.05, None, PASSED, "fell by 0.1000, not more than chance (p = 0.05)"),
        (0.1, 0.0499, 0.1, FELL, "fell by 0.1000, p = 0.05"),
        (1e-9, 0.001, 0.1, PASSED, "did not fall"),
        (-0.4, 0.001, 0.1, PASSED, "did not fall"),
        (0.0, 1.0, 0.1, PASSED, "did not fall"),
    ],
)
def test_one_task_is_decided_by_its_p(
    fall: float, p: float, noise: float | None, code: int, reason: str
) -> None:
    (found,) = beyond_noise([waiting("x", fall, p, noise=noise)], 0.05)
    assert (found.code, found.reason, found.p) == (code, reason, p)


def test_without_enough_images_rounding_is_no_fall() -> None:
    (found,) = beyond_noise([waiting("x", 1e-9, 1.0, images=3)], 0.05)
    assert (found.code, found.reason[:14]) == (PASSED, "did not fall; ")


def test_the_metric_that_decides() -> None:
    low, high = metric([0.5], better=False), metric([0.5])
    several = task([0.5], better=False, lower=low, higher=high, highest=high)
    assert metric_key("toy", several) == "higher,none"
    assert metric_key("toy", task([0.5], better=False, lower=low)) == "accuracy,none"
    assert metric_key("toy", several, "highest") == "highest,none"
    assert metric_key("toy", several, "lower,none") == "lower,none"
    commas = task([0.5], **{"f1,macro": high})
    assert metric_key("toy", commas, "f1,macro") == "f1,macro,none"
    with pytest.raises(ValueError, match="toy has no metric no in the baseline: accuracy,none, lo"):
        metric_key("toy", task([0.5], lower=low), "no")


def test_a_tolerance_of_a_task_goes_before_that_of_all() -> None:
    rules = Rules({"": 0.1, "x": 0.0})
    assert (rules.allowed("x"), rules.allowed("y")) == (0.0, 0.1)
