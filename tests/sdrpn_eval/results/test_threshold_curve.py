"""Score over threshold, from runs as lmms-eval leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from sdrpn_eval.cli.curve import curve
from sdrpn_eval.report.curve import markdown
from sdrpn_eval.results.comparability import NotComparable
from sdrpn_eval.results.threshold_curve import curves
from tests.helpers.run_folders import record_line, sample, write_record, write_run

app = Typer()
app.command()(curve)
DOCUMENTS = 8


def run(folder: Path, model_args: str, right: int, **more: Any) -> Path:
    """A run over two tasks, the first `right` of eight documents of each answered right."""
    rows = [sample(i, "red" if i < right else "blue") for i in range(DOCUMENTS)]
    return write_run(
        folder, {"docvqa_val": rows, "textvqa_val": rows}, model_args=model_args, **more
    )


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Stock, the published thresholds, and 0.05, 0.1 and 0.3 for all tasks."""
    every = [
        run(tmp_path / "stock", "pretrained=tiny,proposer=none", 2),
        run(tmp_path / "published", "pretrained=tiny,proposer=rpn", 6),
    ]
    every += [
        run(tmp_path / f"t{t}", f"pretrained=tiny,threshold={t},batch_size=4", right)
        for t, right in (("0.3", 3), ("0.05", 5), ("0.1", 7))
    ]
    return every


def test_thresholds_of_each_run(folders: list[Path]) -> None:
    found = {c.task: c for c in curves(folders)}
    assert set(found) == {"docvqa_val", "textvqa_val"}
    docvqa = found["docvqa_val"]
    assert (docvqa.metric, docvqa.percent, docvqa.questions) == ("accuracy", True, DOCUMENTS)
    assert [(p.threshold, p.published, p.mean) for p in docvqa.points] == [
        (None, False, 2 / 8),
        (0.1, True, 6 / 8),
        (0.3, False, 3 / 8),
        (0.05, False, 5 / 8),
        (0.1, False, 7 / 8),
    ]
    assert found["textvqa_val"].points[1].threshold == 0.15
    assert all(p.low <= p.mean <= p.high for p in docvqa.points)
    assert [p.series for p in docvqa.points] == ["proposer=none", *["proposer=rpn"] * 4]


def test_the_facts_of_a_run_go_before_its_command(tmp_path: Path) -> None:
    """A run from Python has no --model_args; its facts know the threshold."""
    a = run(tmp_path / "a", "pretrained=tiny,threshold=0.1", 4)
    b = run(tmp_path / "b", "", 5)
    facts = {
        "format": 1,
        "run": "20260301T115959.000000Z",
        "rank": 0,
        "world_size": 1,
        "versions": {},
        "source": None,
        "arguments": {"pretrained": "tiny", "proposer": "rpn", "threshold": 0.2},
        "seeds": None,
        "device": {},
        "weights": {},
        "tasks": {},
    }
    record = b / "sdrpn_record"
    record.mkdir()
    (record / f"run_facts_{facts['run']}_rank0.json").write_text(json.dumps(facts))
    points = curves([a, b])[0].points
    assert [p.threshold for p in points] == [0.1, 0.2]
    assert {p.series for p in points} == {""}


def test_intervals_are_clustered_by_image_and_zooms_counted(tmp_path: Path) -> None:
    folders = []
    for t in ("0.1", "0.2"):
        folder = run(tmp_path / t, f"pretrained=tiny,proposer=rpn,threshold={t}", 4)
        lines = [
            record_line(i, "red" if i < 4 else "blue", task=task, prompt=f"question {i}")
            for task in ("docvqa_val", "textvqa_val")
            for i in range(DOCUMENTS)
        ]
        write_record(folder, lines)
        folders.append(folder)
    found = curves(folders)[0]
    assert found.images == DOCUMENTS // 2
    assert {p.zoomed for p in found.points} == {1.0}


def test_a_row_with_one_threshold_for_all_stands_beside_the_published(folders: list[Path]) -> None:
    text = markdown(curves(folders))
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| proposer")]
    assert [own for _, own in rows] == [
        "none",
        "published, by task",
        "0.3 for all",
        "0.05 for all",
        "0.1 for all",
    ]
    assert "75.0 [" in text
    assert "(t = 0.1) |" in text
    assert "(t = 0.15) |" in text


def test_the_command_writes_everything(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "curve"
    words = [*map(str, folders), "--out", str(out), "--tasks", "docvqa_val"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (only,) = json.loads((out / "curve.json").read_text())["curves"]
    assert only["task"] == "docvqa_val"
    assert only["published_threshold"] == 0.1
    assert len(only["points"]) == 5
    assert (out / "curve.md").read_text().startswith("|  | threshold | docvqa_val |")
    with Image.open(out / "curve.png") as picture:
        assert picture.width > 400


def test_one_image_has_a_score_and_no_interval(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / t, {"pope": [sample(0)]}, model_args=f"threshold={t}")
        for t in ("0.1", "0.2")
    ]
    done = CliRunner().invoke(app, [*map(str, folders), "--out", str(tmp_path / "curve")])
    assert done.exit_code == 0, done.output
    (only,) = json.loads((tmp_path / "curve" / "curve.json").read_text())["curves"]
    assert [(p["mean"], p["low"], p["high"]) for p in only["points"]] == [(1, None, None)] * 2


def test_two_runs_that_tell_the_same_are_refused(folders: list[Path], tmp_path: Path) -> None:
    again = run(tmp_path / "again", "pretrained=tiny,threshold=0.3,record=x", 1)
    with pytest.raises(ValueError, match=r"differ in no threshold: both have 0\.3 on docvqa_val"):
        curves([*folders, again])


def test_runs_that_were_asked_otherwise_are_refused(folders: list[Path], tmp_path: Path) -> None:
    rows = [sample(i) | {"input": "another"} for i in range(DOCUMENTS)]
    other = write_run(tmp_path / "other", {"docvqa_val": rows}, model_args="threshold=0.4")
    with pytest.raises(NotComparable, match="other prompts in 8 documents"):
        curves([*folders, other])


def test_one_run_is_no_curve(folders: list[Path]) -> None:
    done = CliRunner().invoke(app, [str(folders[0])])
    assert done.exit_code == 2
