"""The benchmark of mixed grids: its images differ in grid, and every one is zoomed."""

from __future__ import annotations

import json

import pytest

from benchmarks import mixed_grids
from benchmarks.shapes_qwen import QWEN_SHAPES, QwenShape


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    toy = QwenShape(5, 64, 96, 4, 2, 700, 3, 32, 48, 2, (1,))
    monkeypatch.setitem(QWEN_SHAPES, "toy", toy)
    halves = [(width // 2, height // 2) for width, height in mixed_grids.SIZES]
    monkeypatch.setattr(mixed_grids, "SIZES", halves)
    work = ["--question-tokens", "20", "--new-tokens", "2", "--repeats", "2"]
    mixed_grids.main(["--shape", "toy", "--device", "cpu", *work])
    found = json.loads(capsys.readouterr().out)
    assert len({tuple(grid) for grid in found["grids"]}) == found["batch_size"] == 8
    assert {name: len(own) for name, own in found["seconds"].items()} == {
        "batch": 2,
        "one_by_one": 2,
    }
    low, high = found["spread"]
    assert 0 < low <= found["speed_up"] <= high
