"""Errors of looking told from errors of reading."""

from __future__ import annotations

import json
from pathlib import Path

from sdrpn.boxes import PixelBox
from sdrpn_eval.results.documents import read_boxes
from sdrpn_eval.results.regions import outcome
from tests.helpers.comparisons import compared, pair
from tests.helpers.run_folders import (
    record_line,
    sample,
    write_record,
)


def test_outcomes() -> None:
    box = PixelBox(0, 0, 10, 10)
    assert outcome([], box) == "no zoom"
    assert outcome([PixelBox(0, 0, 5, 10)], box) == "held"
    assert outcome([PixelBox(0, 0, 4, 10)], box) == "missed"


def test_errors_of_looking_and_of_reading_by_size(tmp_path: Path) -> None:
    """Nine documents: true boxes of 1, 4 and 25 % of the image; the region is the upper left."""
    rows = [sample(i, "red" if i == 8 else "blue") for i in range(9)]
    folders = pair(tmp_path, rows, rows)
    no_zoom = {"regions": [], "no_zoom": "no cell over the threshold 0.1", "map": None}
    lines = [record_line(i, rows[i]["filtered_resps"]) for i in range(9)]
    lines[3] = record_line(3, "blue", **no_zoom)
    write_record(folders[1], lines)
    side = [10, 20, 50]
    boxes = {
        str(i): [0, 0, side[i // 3], side[i // 3]] if i % 3 else [60, 60, 60 + side[i // 3], 100]
        for i in range(9)
    }
    boxes["0"], boxes["6"] = [60, 60, 70, 70], [50, 50, 100, 100]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"toy": boxes}))
    comparison = compared(*folders, boxes=read_boxes(file))
    found = {
        row.size: (row.questions, row.right, row.holds, row.wrong_no_zoom, row.wrong_look)
        for row in comparison.tasks[0].boxes["rpn"]
    }
    assert found["small"] == (3, 0, 2, 0, 1)
    assert found["all"][:3] == (9, 1, 6)
    assert sum(found[s][3] for s in ("small", "medium", "large")) == found["all"][3] == 1
    reads = {row.size: row.wrong_read for row in comparison.tasks[0].boxes["rpn"]}
    assert reads == {"all": 5, "small": 2, "medium": 2, "large": 1}
    assert "stock" not in comparison.tasks[0].boxes  # it has no record
