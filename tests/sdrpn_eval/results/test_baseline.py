"""Baseline files: what they hold, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrpn_eval.results.baseline import read_baseline
from tests.helpers.comparisons import N, rows, run_gate
from tests.helpers.run_folders import (
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)


def test_tolerance_is_kept_in_the_baseline(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=3), "y": rows()})
    run_gate(tmp_path / "good", baseline, "--update", "--tolerance", "0.05")
    assert run_gate(run, baseline)[0] == 1
    run_gate(tmp_path / "good", baseline, "--update")
    assert read_baseline(baseline).tolerance == {"": 0.05}


def _cut(folder: Path, keep: int) -> None:
    path = next(folder.rglob("*_samples_x.jsonl"))
    path.write_text("".join(path.read_text().splitlines(True)[:keep]))


def _recorded(folder: Path, **more: Any) -> Path:
    write_run(folder, {"toy": rows()})
    write_record(folder, [record_line(i, "red", **more) for i in range(N)])
    write_facts(folder, "same")
    return folder


@pytest.mark.parametrize("blank", [" ", "\n\t ", "\u00a0", ["", " "], [" ", "\n", ""]])
def test_answers_of_blanks_are_empty(tmp_path: Path, baseline: Path, blank: Any) -> None:
    mute = [sample(i, accuracy=0.0) | {"filtered_resps": blank} for i in range(N)]
    code, line = run_gate(write_run(tmp_path / "run", {"x": mute, "y": rows()}), baseline)
    assert (code, line) == (
        2,
        "gate: broken: x accuracy: 40 of 40 answers are empty",
    )


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


def test_old_results_make_no_baseline(tmp_path: Path, baseline: Path) -> None:
    code, line = run_gate(tmp_path / "good", baseline, "--update", "--max-age", "0.001")
    assert code == 2
    assert "hours old" in line


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
