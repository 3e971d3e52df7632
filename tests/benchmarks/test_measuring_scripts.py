"""The smaller benchmarks run, on toys, and write what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import batch_changes, cost_growth, editions, label_speed
from benchmarks.shapes import SHAPES, Shape


class Bar:
    def __init__(self) -> None:
        self.count = 0

    def update(self, by: int = 1) -> None:
        self.count += by


@pytest.mark.slow
def test_changed_answers_are_counted(tmp_path: Path) -> None:
    """In float32 none change; every system is there."""
    out = tmp_path / "changes.json"
    batch_changes.main(
        ["--limit", "5", "--batch-size", "4", "--dtypes", "float32", "--out", str(out)]
    )
    rows = json.loads(out.read_text())
    assert [row["answers_changed"] for row in rows] == [0, 0, 0]
    assert {row["system"] for row in rows} == {
        "stock, left-padded",
        "ours, no second look",
        "ours, rpn",
    }


def test_a_change_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        batch_changes,
        "systems",
        lambda dtype, device: {"fickle": lambda batch: [str(len(batch))] * len(batch)},
    )
    rows = batch_changes.measure(4, ["float32"], limit=4)
    assert rows[0]["answers_changed"] == 4


@pytest.mark.slow
def test_label_speed_compares_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", Shape(16, 32, 64, 8, 128, 2, 32, 64, 2))
    out = tmp_path / "speed.json"
    words = ["--batch-sizes", "2", "--new-tokens", "2", "--repeats", "1", "--out", str(out)]
    label_speed.main(words)
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == ["one by one", "batch size 2"]
    assert rows[0]["times_faster"] == 1


def test_slopes_are_those_of_the_medians() -> None:
    calls: list[float] = []
    points = [(x, lambda x=x: calls.append(x)) for x in (1.0, 2.0)]
    bar = Bar()
    rows = cost_growth.sweep(points, 2, bar)
    assert calls == [1, 2] * 3  # interleaved, a warm-up first
    assert bar.count == 6
    assert [len(row["seconds_each"]) for row in rows] == [2, 2]
    line = [{"x": x, "seconds": 0.5 + 2 * x, "seconds_each": [1]} for x in (1, 2, 4)]
    assert cost_growth.slope(line) == pytest.approx([2, 0.5])
    assert cost_growth.said("batch size", line) == "0.50 s + 2 s a question"
    assert cost_growth.said("answer length, tokens", line) == "0.50 s + 2 s a token"
    shared = [{"x": 1, "seconds": 3.0}, {"x": 2, "seconds": 2.0}]
    assert cost_growth.said("processes", shared) == "2 processes: 1.50 times as fast as 1"
    sweeps = {"batch size": line, "answer length, tokens": line}
    assert len(cost_growth.figure({"sweeps": sweeps}).axes) == 2


@pytest.mark.slow
def test_both_editions_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "editions.json"
    monkeypatch.setattr(
        "sys.argv", ["editions", "--questions", "2", "--repeats", "1", "--out", str(out)]
    )
    editions.main()
    found = json.loads(out.read_text())["editions"]
    assert {name: ways["stock"]["image_tokens"] for name, ways in found.items()} == {
        "tiny": 64,
        "tiny-trio": 256,
    }
    for ways in found.values():
        assert ways["rpn"]["seconds"] > ways["stock"]["seconds"] > 0
        assert ways["stock"]["crop_tokens"] == 0
