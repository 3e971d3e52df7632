"""Baseline files: what they hold, and which are refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrpn_eval.results.baseline import Baseline, MetricBaseline, TaskBaseline, read_baseline
from tests.helpers.comparisons import N, metric, rows, run_gate, task
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


def test_a_baseline_names_its_run(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        {"toy": rows(), "mute": [sample(0, note="x")]},
        {"mute": {"note,none": None}},
        model_args="",
    )
    words = ["--update", "--tolerance", "toy=0.05"]
    assert run_gate(run, tmp_path / "deep" / "er" / "b.json", *words)[0] == 0
    found = read_baseline(tmp_path / "deep" / "er" / "b.json")
    assert found.run == str(run / "tiny" / "20260301_120000_results.json")
    assert (found.date, found.model, found.model_args) == ("20260301_120000", "llava_sdrpn", "")
    assert found.made_of is None
    assert set(found.written_on) > {"versions", "cpus"}
    assert (list(found.tasks), found.tolerance, found.format) == (["toy"], {"toy": 0.05}, 1)


def test_a_run_without_a_score_makes_no_baseline(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", {"mute": [sample(0, note="x")]}, {"mute": {"note,none": None}}
    )
    code, line = run_gate(run, tmp_path / "b.json", "--update")
    assert code == 2
    told = f"{run}: no task has a score a document to hold later runs against"
    assert line == f"error: {told}"


def test_a_baseline_is_written_a_line_a_field(tmp_path: Path) -> None:
    made = Baseline(
        run="r",
        date="d",
        model="m",
        model_args="naïve=1",
        made_of=None,
        written_on={"versions": {"torch": "2"}, "seeds": [0, 1], "empty": {}},
        tasks={"toy": task([1.0, None, 0.5])},
    )
    path = tmp_path / "a" / "b" / "b.json"
    made.save(path)
    made.save(path)  # over it
    assert (
        path.read_bytes().decode()
        == """{
  "run": "r",
  "date": "d",
  "model": "m",
  "model_args": "naïve=1",
  "made_of": null,
  "written_on": {
    "versions": {
      "torch": "2"
    },
    "seeds": [0, 1],
    "empty": {}
  },
  "tasks": {
    "toy": {
      "documents": [0, 1, 2],
      "questions": ["q", "q", "q"],
      "images": [null, null, null],
      "clusters": [0, 1, 2],
      "clustered_by": "images",
      "empty_answers": 0,
      "scorer": null,
      "settings": "s",
      "metrics": {
        "accuracy,none": {
          "higher_is_better": true,
          "mean": 0.75,
          "scores": [1.0, null, 0.5]
        }
      },
      "scoring": {}
    }
  },
  "tolerance": {},
  "format": 1
}
"""
    )
    assert read_baseline(path) == made


@pytest.mark.parametrize("column", ["documents", "questions", "images", "clusters", "scores"])
def test_a_column_that_is_too_short_is_named(tmp_path: Path, column: str) -> None:
    whole = task([1.0, 0.0, 1.0], other=metric([1.0, 1.0, 0.0]))
    made = Baseline("r", "d", "m", "", None, {}, {"right": task([1.0]), "toy": whole})
    path = tmp_path / "b.json"
    made.save(path)
    assert read_baseline(path) == made
    content = json.loads(path.read_text())
    held = content["tasks"]["toy"]
    (held["metrics"]["other,none"] if column == "scores" else held)[column].pop()
    path.write_text(json.dumps(content))
    told = r"b\.json is no baseline, make it anew with --update: toy has not one mark, cluster and "
    with pytest.raises(ValueError, match=told + "score for each of its documents$"):
        read_baseline(path)
    held["metrics"] = {}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="toy has not one mark"):
        read_baseline(path)


def test_a_baseline_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"/b\.json does not exist; make it from a good run with --"
    ):
        read_baseline(tmp_path / "b.json")


def digest(*parts: str) -> str:
    """As it stands in a baseline: the first 8 hex digits of BLAKE2b-128 over length and text."""
    text = b"".join(len(part).to_bytes(8, "big") + part.encode() for part in parts)
    return hashlib.blake2b(text, digest_size=16).hexdigest()[:8]


def test_a_task_in_a_baseline_field_by_field(tmp_path: Path) -> None:
    """Documents 2, 1 and 0, of which the first two share an image; 1 was not answered."""
    lines = [sample(2), sample(1, " ", accuracy=0.0, points=3.0), sample(0, accuracy=0.5)]
    lines[0]["points"] = 1.0
    totals = {"toy": {"accuracy,none": 0.5, "points,none": 2.0}}
    config = {
        "metric_list": [{"metric": "accuracy", "aggregation": "<function mean at 0x7f3a>"}],
        "score_key": "points",
    }
    run = write_run(
        tmp_path / "run", {"toy": lines}, totals, config=config, better={"points": False}
    )
    shown = [(2, ["x", "y"]), (1, ["x", "y"]), (0, ["z"])]
    write_record(
        run,
        [
            record_line(i, "red", images=[{"hash": h, "size": [9, 9]} for h in hashes])
            for i, hashes in shown
        ],
    )
    write_facts(run, "5c0")
    code, line = run_gate(run, tmp_path / "b.json", "--update")
    assert code == 0, line
    found = read_baseline(tmp_path / "b.json")
    told = ["[{'metric': 'accuracy', 'aggregation': '<function mean>'}]", "None", "None"]
    told += ["generate_until", "points", "None", "None", "None"]
    names = ("metric_list", "filter_list", "process_results", "output_type", "score_key")
    names += ("doc_to_choice", "doc_to_target", "repeats")
    assert found.tasks["toy"] == TaskBaseline(
        documents=[0, 1, 2],
        questions=[digest(f"question {i}", "red") for i in (0, 1, 2)],
        images=[digest("z"), digest("x", "y"), digest("x", "y")],
        clusters=[0, 1, 1],
        clustered_by="images",
        empty_answers=1,
        scorer="5c0",
        settings=digest(*told),
        metrics={
            "accuracy,none": MetricBaseline(True, 0.5, [0.5, 0.0, 1.0]),
            "points,none": MetricBaseline(False, 2.0, [None, 3.0, 1.0]),
        },
        scoring=dict(zip(names, told, strict=True)),
    )


def test_baseline_holds_what_the_run_was_made_of(tmp_path: Path) -> None:
    folder = _recorded(tmp_path / "run")
    run_gate(folder, tmp_path / "b.json", "--update")
    made = read_baseline(tmp_path / "b.json")
    assert made.made_of
    assert [*made.made_of] == [
        *("versions", "weights", "arguments", "device", "seeds", "source", "data", "prompts")
    ]
    assert made.made_of["versions"] == {"torch": "2"}
    assert made.made_of["weights"] == {"rpn/rpn.safetensors": "ab"}
    data = replace(made, made_of={"data": {"toy": "d1"}})
    assert (data.data("toy"), data.data("other")) == ("d1", None)
    assert replace(made, made_of=None).data("toy") is None
    assert made.written_on["versions"]["torch"] == torch.__version__
    assert made.written_on["cpus"] >= 1
    assert made.model_args == "pretrained=tiny,proposer=rpn"
    toy = made.tasks["toy"]
    assert toy.documents == list(range(N))
    assert toy.metrics["accuracy,none"].scores == [1.0] * N
    assert (toy.scorer, toy.clustered_by) == ("same", "images")
