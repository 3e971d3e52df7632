"""The gate: what passes, what fell, and what lmms-eval would have passed off as a result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.results.baseline import read_baseline
from sdrpn_eval.results.verdicts import Rules
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import tiny_vstar_rows, write
from tests.helpers.run_folders import (
    SCORER_SETTINGS,
    evaluate,
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)

N = 40


def rows(wrong: int = 0, n: int = N) -> list[dict[str, Any]]:
    return [sample(i, "blue" if i < wrong else "red") for i in range(n)]


def run_gate(run: Path, baseline: Path, *words: str) -> tuple[int, str]:
    """(exit code, the last line)."""
    done = CliRunner().invoke(app, ["gate", str(run), "--baseline", str(baseline), *words])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output.strip().splitlines()[-1]


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """From a run of two tasks, all right."""
    good = write_run(tmp_path / "good", {"x": rows(), "y": rows()})
    code, line = run_gate(good, tmp_path / "base" / "line.json", "--update")
    assert code == 0, line
    assert "x by accuracy,none, y by accuracy,none" in line
    return tmp_path / "base" / "line.json"


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


def test_tolerance_is_kept_in_the_baseline(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=3), "y": rows()})
    run_gate(tmp_path / "good", baseline, "--update", "--tolerance", "0.05")
    assert run_gate(run, baseline)[0] == 1
    run_gate(tmp_path / "good", baseline, "--update")
    assert read_baseline(baseline).tolerance == {"": 0.05}


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


# Too few images for the noise to decide


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


# What lmms-eval hides


def _cut(folder: Path, keep: int) -> None:
    path = next(folder.rglob("*_samples_x.jsonl"))
    path.write_text("".join(path.read_text().splitlines(True)[:keep]))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = next(folder.rglob("*_results.json"))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _nan(content: dict[str, Any]) -> None:
    content["results"]["x"]["accuracy,none"] = float("nan")


def _none(content: dict[str, Any]) -> None:
    content["results"]["x"]["accuracy,none"] = None


def _missing(content: dict[str, Any]) -> None:
    del content["configs"]["x"], content["results"]["x"]


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no results": (lambda f: next(f.rglob("*_results.json")).unlink(), "holds no *_results.json"),
    "no samples": (lambda f: next(f.rglob("*_samples_x.jsonl")).unlink(), "no samples of x"),
    "cut samples": (lambda f: _cut(f, 30), "holds 30 of 40 documents"),
    "empty samples": (lambda f: _cut(f, 0), "holds 0 of 40 documents"),
    "missing task": (lambda f: _edit(f, _missing), "has no results for x"),
    "no tasks": (lambda f: _edit(f, lambda c: c["configs"].clear()), "holds no task"),
    "nan": (lambda f: _edit(f, _nan), "accuracy,none is nan"),
    "no score": (lambda f: _edit(f, _none), "accuracy,none is missing"),
    "budget": (
        lambda f: _edit(f, lambda c: c.update(usage={"budget_exceeded": True})),
        "the token budget ended the run early",
    ),
    "other kind": (lambda f: _edit(f, lambda c: c.update(config=[])), "config: Input should be"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_lmms_eval_hides_is_broken(tmp_path: Path, baseline: Path, harm: str) -> None:
    run = write_run(tmp_path / "run", {"x": rows(), "y": rows()})
    assert run_gate(run, baseline)[0] == 0
    act, says = HARMS[harm]
    act(run)
    code, line = run_gate(run, baseline)
    assert code == 2
    assert line.startswith("gate: broken: ")
    assert says in line


def test_a_run_that_is_nowhere_is_broken(tmp_path: Path, baseline: Path) -> None:
    code, line = run_gate(tmp_path / "gone", baseline)
    assert code == 2
    assert "gone does not exist" in line


def test_a_half_written_line_is_broken(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(), "y": rows()})
    path = next(run.rglob("*_samples_x.jsonl"))
    path.write_text(path.read_text()[:-30])
    code, line = run_gate(run, baseline)
    assert code == 2
    assert "cut off or broken in line 40" in line


def test_fewer_documents_than_the_baseline_are_broken(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(n=10), "y": rows()}, limit=10)
    code, line = run_gate(run, baseline)
    assert code == 2
    assert "30 of the baseline's 40 documents are missing, such as 10" in line


def test_a_scorer_that_one_run_did_not_record_is_no_other(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    bare = write_run(tmp_path / "bare", {"toy": rows()})
    run_gate(bare, base, "--update")
    recorded = _recorded(tmp_path / "recorded")
    assert run_gate(recorded, base)[0] == 0
    run_gate(recorded, base, "--update")
    assert run_gate(bare, base)[0] == 0


@pytest.mark.parametrize("setting", SCORER_SETTINGS)
def test_each_setting_that_makes_a_score_is_held(
    tmp_path: Path, baseline: Path, setting: str
) -> None:
    run = write_run(
        tmp_path / "run", {"x": rows(), "y": rows()}, config={setting: SCORER_SETTINGS[setting]}
    )
    code, line = run_gate(run, baseline)
    assert code == 2
    assert "another scorer" in line


def test_more_documents_than_the_baseline_are_broken(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    run_gate(write_run(tmp_path / "ten", {"x": rows(n=10)}), base, "--update")
    assert run_gate(write_run(tmp_path / "all", {"x": rows()}), base) == (
        2,
        "gate: broken: x accuracy: 40 documents, the baseline has 10: run with the same --limit, "
        "or --update",
    )


@pytest.mark.parametrize("total", [0.99, 1.01, 0.9999])
def test_a_score_that_is_not_its_documents_mean_is_broken(
    tmp_path: Path, baseline: Path, total: float
) -> None:
    """A total that disagrees by as little as a hundredth of a percent is another metric."""
    totals = {"x": {"accuracy,none": total}, "y": {"accuracy,none": 1.0}}
    run = write_run(tmp_path / "run", {"x": rows(), "y": rows()}, totals)
    assert run_gate(run, baseline) == (
        2,
        "gate: broken: x accuracy: accuracy,none cannot be read document by document, the "
        "baseline's could",
    )
    code, line = run_gate(run, tmp_path / "other.json", "--update")
    assert code == 0
    assert line.endswith("without a score a document: x")


def test_a_score_over_other_documents_is_broken(tmp_path: Path, baseline: Path) -> None:
    some = rows()
    del some[3]["accuracy"]
    totals = {"x": {"accuracy,none": 1.0}, "y": {"accuracy,none": 1.0}}
    run = write_run(tmp_path / "run", {"x": some, "y": rows()}, totals)
    assert run_gate(run, baseline) == (
        2,
        "gate: broken: x accuracy: accuracy,none is scored on other documents than the baseline's",
    )


def test_other_prompts_images_and_scorers_are_broken(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    run_gate(_recorded(tmp_path / "good"), base, "--update")

    def says(folder: Path) -> str:
        code, line = run_gate(folder, base)
        assert code == 2, line
        return line

    assert run_gate(_recorded(tmp_path / "same"), base)[0] == 0
    prompt = rows()
    prompt[3] = prompt[3] | {"input": "else"}
    assert "another prompt or target in 1 document, such as 3" in says(
        write_run(tmp_path / "prompt", {"toy": prompt})
    )
    image = {"images": [{"hash": "else", "size": [1, 1]}]}
    assert "another image in 40 documents, such as 0" in says(
        _recorded(tmp_path / "image", **image)
    )
    settings = {"process_results": "<function strict at 0x7f>"}
    assert "another scorer" in says(
        write_run(tmp_path / "settings", {"toy": rows()}, config=settings)
    )
    source = _recorded(tmp_path / "source")
    write_facts(source, "other")
    assert "another scorer" in says(source)
    data = _recorded(tmp_path / "data")
    write_facts(data, "same", "7")
    told = f"({1:032x} and {7:032x})"
    assert f"other data, in columns that prompts do not show {told}" in says(data)
    failed = _recorded(tmp_path / "failed")
    write_facts(failed, "same", skipped={"toy": 3})
    assert "3 document(s) of toy were skipped" in says(failed)


def _recorded(folder: Path, **more: Any) -> Path:
    write_run(folder, {"toy": rows()})
    write_record(folder, [record_line(i, "red", **more) for i in range(N)])
    write_facts(folder, "same")
    return folder


def test_silent_failures_to_generate_are_broken(tmp_path: Path, baseline: Path) -> None:
    """lmms-eval's llava_hf answers "" when generation raises, such as out of memory."""
    mute = [sample(i, "", accuracy=0.0) for i in range(N)]
    code, line = run_gate(write_run(tmp_path / "run", {"x": mute, "y": rows()}), baseline)
    assert code == 2
    assert "40 of 40 answers are empty" in line


@pytest.mark.parametrize("blank", [" ", "\n\t ", "\u00a0", ["", " "], [" ", "\n", ""]])
def test_answers_of_blanks_are_empty(tmp_path: Path, baseline: Path, blank: Any) -> None:
    mute = [sample(i, accuracy=0.0) | {"filtered_resps": blank} for i in range(N)]
    code, line = run_gate(write_run(tmp_path / "run", {"x": mute, "y": rows()}), baseline)
    assert (code, line) == (
        2,
        "gate: broken: x accuracy: 40 of 40 answers are empty",
    )


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


def test_old_results_are_not_this_job_s(tmp_path: Path, baseline: Path) -> None:
    assert run_gate(tmp_path / "good", baseline, "--max-age", "1e9")[0] == 0
    code, line = run_gate(tmp_path / "good", baseline, "--max-age", "0.001")
    assert code == 2
    assert "hours old" in line


def test_a_baseline_is_not_made_of_a_broken_run(tmp_path: Path, baseline: Path) -> None:
    before = baseline.read_text()
    run = write_run(tmp_path / "run", {"x": rows(), "y": rows()})
    _cut(run, 30)
    assert run_gate(run, baseline, "--update")[0] == 2
    assert baseline.read_text() == before


@pytest.mark.parametrize("content", [None, "{", "{}", '{"format": 99, "tasks": {}}'])
def test_a_bad_baseline_is_named(tmp_path: Path, content: str | None) -> None:
    run = write_run(tmp_path / "run", {"x": rows()})
    path = tmp_path / "b.json"
    if content:
        path.write_text(content)
    code, line = run_gate(run, path)
    assert code == 2
    assert "--update" in line


@pytest.mark.parametrize("text", ["much", "-1", "x=nan", "x=", "inf", "x=-inf", "-0.01"])
def test_a_bad_tolerance_is_named(tmp_path: Path, baseline: Path, text: str) -> None:
    for more in ([], ["--update"]):
        code, line = run_gate(tmp_path / "good", baseline, f"--tolerance={text}", *more)
        assert code == 2
        assert "must be 0 or more, and finite, got" in line
        assert line.endswith(text.rpartition("=")[2])


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown task": (
        ["--tolerance", "z=0.02"],
        "--tolerance z=0.02: the baseline has no task z, only x, y",
    ),
    "one task unknown": (
        ["--tolerance", "x=0.02", "--tolerance", "X=0.02"],
        "--tolerance X=0.02: the baseline has no task X, only x, y",
    ),
    "more than a score": (
        ["--tolerance", "2"],
        "--tolerance 2 would pass every fall: scores of x can fall by 1 at most; give a value in "
        "[0, 1)",
    ),
    "all of a score": (
        ["--tolerance", "y=1"],
        "--tolerance y=1 would pass every fall: scores of y",
    ),
    "percent": (["--tolerance", "x=5"], "--tolerance x=5 would pass every fall"),
    "no name": (["--tolerance", "=0.1"], "--tolerance =0.1: there is no task before the ="),
    "twice": (
        ["--tolerance", "0.1", "--tolerance", "0.2"],
        "--tolerance is given twice: 0.1 and 0.2",
    ),
    "a task twice": (
        ["--tolerance", "x=0.1", "--tolerance", "x=0.1"],
        "--tolerance of x is given twice: 0.1 and 0.1",
    ),
    "alpha 0": (["--alpha", "0"], "--alpha must be in (0, 1), got 0"),
    "alpha 1": (["--alpha", "1"], "--alpha must be in (0, 1), got 1"),
    "alpha 5": (["--alpha", "5"], "--alpha must be in (0, 1), got 5"),
    "alpha below 0": (["--alpha=-0.05"], "--alpha must be in (0, 1), got -0.05"),
    "alpha nan": (["--alpha", "nan"], "--alpha must be in (0, 1), got nan"),
    "alpha out of reach": (
        ["--alpha", "0.0002"],
        "--alpha 0.0002 cannot be reached: the smallest p-value of 2 task(s) is 0.0002; give a "
        "larger --alpha, or a --tolerance",
    ),
    "age 0": (["--max-age", "0"], "--max-age must be in (0, 24000000000) hours, got 0"),
    "age below 0": (["--max-age=-1"], "--max-age must be in (0, 24000000000) hours, got -1"),
    "age nan": (["--max-age", "nan"], "--max-age must be in (0, 24000000000) hours, got nan"),
    "age inf": (["--max-age", "inf"], "--max-age must be in (0, 24000000000) hours, got inf"),
    "age 1e300": (["--max-age", "1e300"], "hours, got 1e+300"),
    "skipped": (["--allow-skipped=-1"], "--allow-skipped must be 0 or more, got -1"),
    "metric of no task": (["--metric", "accuracy"], "--metric must be TASK=METRIC, got 'accuracy'"),
    "metric twice": (
        ["--metric", "x=accuracy", "--metric", "x=accuracy"],
        "--metric of x is given twice: accuracy and accuracy",
    ),
    "metric of an unknown task": (
        ["--metric", "z=accuracy"],
        "--metric z=accuracy: the baseline has no task z, only x, y",
    ),
}


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_mean_anything_are_refused(
    tmp_path: Path, baseline: Path, case: str, update: bool
) -> None:
    words, says = BAD_OPTIONS[case]
    before = baseline.read_text()
    run = write_run(tmp_path / "run", {"x": rows(wrong=1), "y": rows()})
    code, line = run_gate(run, baseline, *words, *(["--update"] if update else []))
    assert code == 2
    assert line.startswith("error: ")
    if not (update and case == "metric of an unknown task"):
        assert says in line
    assert baseline.read_text() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--junit", "gate.xml"], "--junit has no effect with --update"),
        (["--metric", "x=accuracy"], "--metric has no effect with --update"),
    ],
)
def test_options_of_a_check_are_refused_with_update(
    tmp_path: Path, baseline: Path, words: list[str], says: str
) -> None:
    code, line = run_gate(tmp_path / "good", baseline, "--update", *words)
    assert code == 2
    assert says in line


def test_old_results_make_no_baseline(tmp_path: Path, baseline: Path) -> None:
    code, line = run_gate(tmp_path / "good", baseline, "--update", "--max-age", "0.001")
    assert code == 2
    assert "hours old" in line


@pytest.mark.parametrize("allowed", [2.0, 1.0, -0.1])
def test_a_tolerance_in_the_baseline_is_checked_too(
    tmp_path: Path, baseline: Path, allowed: float
) -> None:
    content = json.loads(baseline.read_text()) | {"tolerance": {"x": allowed}}
    baseline.write_text(json.dumps(content))
    code, line = run_gate(tmp_path / "good", baseline)
    assert code == 2
    assert f"--tolerance x={allowed:g}" in line


def test_a_tolerance_has_the_scale_of_the_score(tmp_path: Path) -> None:
    """Points from 0 to 20: a fall of 5 can be allowed, one of 20 is a fall to nothing."""
    base = tmp_path / "b.json"

    def run(name: str, points: float) -> Path:
        lines = [sample(i, accuracy=points if i else 20.0) for i in range(N)]
        mean = (points * (N - 1) + 20) / N
        return write_run(tmp_path / name, {"toy": lines}, {"toy": {"accuracy,none": mean}})

    run_gate(run("good", 20), base, "--update")
    assert run_gate(run("less", 16), base, "--tolerance", "5")[0] == 0
    assert run_gate(run("less", 16), base, "--tolerance", "3")[0] == 1
    code, line = run_gate(run("less", 16), base, "--tolerance", "20")
    assert code == 2
    assert "scores of toy can fall by 20 at most; give a value in [0, 20)" in line


def test_a_score_that_is_no_number_in_the_baseline_is_refused(
    tmp_path: Path, baseline: Path
) -> None:
    """NaN in a baseline passed every fall, "within the noise of nan"."""
    text = baseline.read_text().replace('"scores": [1.0, ', '"scores": [NaN, ')
    baseline.write_text(text)
    code, line = run_gate(tmp_path / "good", baseline)
    assert code == 2
    assert "is no baseline" in line


def test_a_submission_is_left_out_by_name(tmp_path: Path) -> None:
    hand_in = [sample(i, submission={"answer": "a"}) for i in range(3)]
    totals = {"test_half": {"submission,none": None}}
    run = write_run(tmp_path / "run", {"x": rows(), "test_half": hand_in}, totals)
    code, line = run_gate(run, tmp_path / "b.json", "--update")
    assert code == 0
    assert line.endswith("without a score a document: test_half")
    assert run_gate(run, tmp_path / "b.json")[0] == 0


# What it writes


def test_junit_and_step_summary(
    tmp_path: Path, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=9), "y": rows()})
    _cut_y = next(run.rglob("*_samples_y.jsonl"))
    _cut_y.write_text("")
    summary, junit = tmp_path / "summary.md", tmp_path / "reports" / "gate.xml"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert run_gate(run, baseline, "--junit", str(junit))[0] == 2
    suite = ElementTree.parse(junit).getroot()[0]
    assert [suite.get(k) for k in ("tests", "failures", "errors")] == ["2", "1", "1"]
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {"x accuracy,none": ["failure"], "y accuracy,none": ["error"]}
    text = summary.read_text()
    assert "### gate: broken: y accuracy" in text
    assert "| x | accuracy,none | 1.0000 | 0.7750 | fell: fell by 0.2250" in text
    run_gate(tmp_path / "good", baseline)
    assert "### gate: passed, 2 task(s) stand" in summary.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tolerence": {"": 0.1}}, "tolerence"), ({"format": 2}, "its format is 2, this version")],
)
def test_a_baseline_with_a_slip_of_the_pen_is_refused(
    tmp_path: Path, baseline: Path, change: dict[str, Any], message: str
) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(json.loads(baseline.read_text()) | change))
    with pytest.raises(ValueError, match=rf"own\.json is no baseline.*{message}"):
        read_baseline(own)


def test_baseline_holds_what_the_run_was_made_of(tmp_path: Path) -> None:
    folder = _recorded(tmp_path / "run")
    run_gate(folder, tmp_path / "b.json", "--update")
    made = read_baseline(tmp_path / "b.json")
    assert made.made_of
    assert made.made_of["versions"] == {"torch": "2"}
    assert made.made_of["weights"] == {"rpn/rpn.safetensors": "ab"}
    assert made.written_on["versions"]["torch"] == torch.__version__
    assert made.written_on["cpus"] >= 1
    assert made.model_args == "pretrained=tiny,proposer=rpn"
    task = made.tasks["toy"]
    assert task.documents == list(range(N))
    assert task.metrics["accuracy,none"].scores == [1.0] * N
    assert (task.scorer, task.clustered_by) == ("same", "images")


# With lmms-eval's evaluator


def test_a_crash_in_the_middle_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tiny_vstar_rows(8), tmp_path / "data" / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    base, out = tmp_path / "b.json", tmp_path / "out"
    evaluate(out, FakeEngine(lambda q: "red level"), ["tiny_vstar"])
    assert run_gate(out, base, "--update")[0] == 0
    assert run_gate(out, base)[0] == 0
    asked = []

    def crash(question: Any) -> str:
        asked.append(question)
        if len(asked) > 4:
            raise RuntimeError("CUDA error")
        return "red level"

    fresh = tmp_path / "fresh"
    with pytest.raises(RuntimeError):
        evaluate(fresh, FakeEngine(crash), ["tiny_vstar"])
    assert list(fresh.rglob("record_*.jsonl"))
    code, line = run_gate(fresh, base)
    assert code == 2
    assert "holds no *_results.json" in line
    # In a folder that holds an older run's results, these must not pass for the new run's.
    asked.clear()
    _date_back(out)
    assert run_gate(out, base)[0] == 0
    with pytest.raises(RuntimeError):
        evaluate(out, FakeEngine(crash), ["tiny_vstar"])
    code, line = run_gate(out, base)
    assert code == 2
    assert "a run that began later" in line


def _date_back(folder: Path) -> None:
    """Make a run an hour older: its results and its record say when it was."""
    _edit(folder, lambda c: c.update(date="20200101_120000"))
    for path in folder.rglob("record_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        early = [line | {"run": "20200101T040000.000000Z"} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in early))
    for path in folder.rglob("run_facts_*.json"):
        facts = json.loads(path.read_text()) | {"run": "20200101T040000.000000Z"}
        path.unlink()
        path.with_name("run_facts_20200101T040000.000000Z_rank0.json").write_text(json.dumps(facts))


@pytest.mark.slow
def test_a_worse_rpn_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model, and the same with noise in its RPN's weights."""
    from sdrpn import ZoomModel
    from sdrpn_eval.demo import embedded_model

    monkeypatch.delenv("SDRPN_DATA", raising=False)
    folder, rpn = embedded_model()
    engine = ZoomModel.from_pretrained(folder, rpn, dtype="float32")
    engine.zoom = replace(engine.zoom, policy="strongest")
    base = tmp_path / "b.json"
    evaluate(tmp_path / "good", engine, ["tiny_vstar"], limit=60)
    assert run_gate(tmp_path / "good", base, "--update")[0] == 0
    evaluate(tmp_path / "again", engine, ["tiny_vstar"], limit=60)
    assert run_gate(tmp_path / "again", base, "--tolerance", "0")[0] == 0
    assert engine.rpn is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in engine.rpn.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
    evaluate(tmp_path / "worse", engine, ["tiny_vstar"], limit=60)
    code, line = run_gate(tmp_path / "worse", base)
    assert code == 1
    assert "gate: fell: tiny_vstar accuracy" in line


@pytest.mark.slow
def test_commands_of_the_guide_and_the_workflow_run(tmp_path: Path) -> None:
    """docs/ci.md's commands, then the workflow's, as written, in an empty folder."""
    docs = Path(__file__).parents[3] / "docs"
    guide = re.findall(r"```bash\n(.*?)```", (docs / "ci.md").read_text(), re.DOTALL)
    (job,) = yaml.safe_load((docs / "github-actions.yml").read_text())["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps.pop(0) == "pip install '.[eval]'"
    commands = [*guide, *steps]
    assert sum("sdrpn-eval gate" in command for command in commands) == 5
    programs = {"lmms-eval": "lmms_eval", "sdrpn-eval": "sdrpn_eval"}
    for name, module in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "ACCELERATE_USE_CPU": "1",
        **job["env"],
    }
    environment.pop("SDRPN_DATA", None)
    # The workflow evaluates and gates with the guide's own commands: once is enough here.
    assert len(set(commands)) == len(commands) - 2
    for command in dict.fromkeys(commands):
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "out" / "comparison" / "compare.html").stat().st_size > 20_000
    assert (tmp_path / "replay" / "tiny_vstar_7" / "crop_1.png").exists()
    summary = (tmp_path / "summary.md").read_text()
    assert summary.count("### gate: passed") == 3
    assert "### Scores" in summary
