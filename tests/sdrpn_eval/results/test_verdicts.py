"""Falls, noise and tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.results.verdicts import Rules
from tests.helpers.comparisons import N, rows, run_gate
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
