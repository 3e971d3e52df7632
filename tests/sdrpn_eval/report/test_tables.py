"""Tables for a terminal: 80 columns, no word broken."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn.cli import shared
from sdrpn_eval.cli import app
from sdrpn_eval.report.tables import columns
from tests.helpers.run_folders import record_line, sample, write_record, write_run

ROWS = [["stock", "1.0 [0.5, 1.0]", ""], ["second look", "0.5", "-0.5"]]


def test_all_columns_fit() -> None:
    assert columns(["run", "score", "won / lost"], ROWS, 80) == [
        "run                   score  won / lost",
        "stock        1.0 [0.5, 1.0]",
        "second look             0.5        -0.5",
    ]


def test_titles_are_broken_at_their_blanks_first() -> None:
    assert columns(["run", "score", "won / lost"], ROWS, 34) == [
        "                             won /",
        "run                   score   lost",
        "stock        1.0 [0.5, 1.0]",
        "second look             0.5   -0.5",
    ]


def test_columns_on_the_right_are_left_out_next() -> None:
    assert columns(["run", "score", "won / lost"], ROWS, 33) == [
        "run                   score",
        "stock        1.0 [0.5, 1.0]",
        "second look             0.5",
    ]


def test_a_name_that_is_too_long_has_a_line_of_its_own() -> None:
    rows = [["a", "1.0 [0.5, 1.0]"], ["a-name_of=thirty-five-letters-in-it", "0.5"]]
    assert columns(["run", "score"], rows, 40) == [
        "run                                score",
        "a                         1.0 [0.5, 1.0]",
        "a-name_of=thirty-five-letters-in-it",
        "                                     0.5",
    ]


def test_one_column_is_a_list() -> None:
    assert columns(["run"], [["a"], ["b"]], 80) == ["run", "a", "b"]


TASK = "docvqa_val_under_a_very_long_name"
METRIC = "relaxed_augmented_split"
RUNS = ["stock", "second-look_threshold=0.15_policy=strongest", "vicrop", "attention-at-its-best"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for number, name in enumerate(RUNS, start=2):
        tasks = {
            "toy": [sample(i, "red" if i % number else "blue") for i in range(40)],
            TASK: [sample(i, **{METRIC: float(i % number > 0)}) for i in range(40)],
        }
        mean = sum(row[METRIC] for row in tasks[TASK]) / 40
        totals = {TASK: {f"{METRIC},none": mean, "f1_of_the_whole,none": 0.25}}
        better = {"accuracy": True, METRIC: True, "f1_of_the_whole": True}
        made.append(write_run(tmp_path / name, tasks, totals, better=better))
        lines = [
            record_line(i, str(row["filtered_resps"]), task=task)
            for task, rows in tasks.items()
            for i, row in enumerate(rows)
        ]
        write_record(made[-1], lines)
    return made


def boxes(folder: Path) -> Path:
    path = folder / "boxes.json"
    each = ", ".join(f'"{i}": [0, 0, {9 + i}, {9 + i}]' for i in range(40))
    path.write_text(f'{{"toy": {{{each}}}}}')
    return path


def printed(monkeypatch: pytest.MonkeyPatch, words: list[Any], width: int = 80) -> str:
    monkeypatch.setattr(shared.console, "_width", width)
    done = CliRunner().invoke(app, list(map(str, words)), env={**os.environ, "COLUMNS": str(width)})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_comparison_breaks_no_word_in_80_columns(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    out = tmp_path / "out"
    words = ["compare", *folders[:count], "--out", out, "--boxes", boxes(tmp_path)]
    said = printed(monkeypatch, words)
    tables = said.split("is not compared question by question")[0].splitlines()
    assert max(map(len, said.splitlines()[:-1])) <= 80  # the last one has a path of this test
    seen = set(re.findall(r"[^\s:,()]+", said))
    for name in (*RUNS[:count], TASK, METRIC, "toy", "accuracy", "questions", "images"):
        assert name in seen
    for word in ("score", "difference", "p", "zoomed", "region", "looked", "answer", "question"):
        assert word in seen
    scored = r" 65\.0 \[47\.7, 79\.8\] +\+15\.0 \[\+0\.4, \+29\.6\] "
    assert any(re.search(scored, line) for line in tables)
    assert "| won / lost |" in (out / "compare.md").read_text()  # what four runs leave no room for


@pytest.mark.slow
def test_a_wide_terminal_has_all_columns(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = printed(monkeypatch, ["compare", *folders[:2], "--out", tmp_path / "out"], 140)
    assert "won / lost" in said


def test_a_gate_says_a_task_in_a_line(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "b.json"
    printed(monkeypatch, ["gate", folders[0], "--baseline", base, "--update"])
    said = printed(monkeypatch, ["gate", folders[0], "--baseline", base]).splitlines()
    assert said == [
        "passed: toy accuracy: 0.5000 -> 0.5000, did not fall",
        f"passed: {TASK} {METRIC}: 0.5000 -> 0.5000, did not fall",
        "gate: passed, 2 task(s) stand",
    ]


def test_a_curve_breaks_no_word_in_80_columns(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, threshold in zip(folders, ("0.1", "0.2", "0.3", "0.4"), strict=True):
        path = next(folder.rglob("*_results.json"))
        path.write_text(path.read_text().replace("proposer=rpn", f"threshold={threshold}"))
    said = printed(monkeypatch, ["curve", *folders, "--out", tmp_path / "out"]).splitlines()
    assert said[:6] == [
        "toy, accuracy: 40 questions, 20 images",
        "threshold                score",
        "0.1 for all  50.0 [27.2, 72.8]",
        "0.2 for all  65.0 [47.7, 79.8]",
        "0.3 for all  75.0 [58.2, 87.7]",
        "0.4 for all  80.0 [63.7, 91.3]",
    ]
    assert f"{TASK}, {METRIC}: 40 questions, 20 images" in said
