"""JSON that any reader takes: NaN and infinities, which it lacks, are null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sdrpn.io.atomic import as_json, write_json
from sdrpn_eval.report.curve import write
from sdrpn_eval.report.html import as_json as for_page
from sdrpn_eval.results.threshold_curve import Curve, Point

NAN, INF = math.nan, math.inf


def valid(text: str) -> Any:
    """Parsed as the standard has it: Python's own reader takes NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": NAN, "b": [INF, -INF, 1.5]}, '{"a": null, "b": [null, null, 1.5]}'),
        ((1, (NAN,)), "[1, [null]]"),
        ({"text": "NaN", "n": 3, "t": True, "none": None}, None),
        (NAN, "null"),
        ([], "[]"),
    ],
)
def test_what_json_lacks_is_null(value: Any, text: str | None) -> None:
    assert as_json(value) == (text or '{"text": "NaN", "n": 3, "t": true, "none": null}')
    valid(as_json(value))


def test_options_of_dumps_are_kept() -> None:
    assert as_json({"é": NAN}, ensure_ascii=False, indent=1) == '{\n "é": null\n}'


def test_a_cycle_is_no_number() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises((ValueError, RecursionError)):
        as_json(loop)


def test_files_are_valid(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"seconds": NAN})
    assert valid((tmp_path / "a.json").read_text()) == {"seconds": None}
    assert valid(for_page([{"x": NAN}])) == [{"x": None}]


def test_a_curve_without_intervals_is_drawn_and_valid(tmp_path: Path) -> None:
    points = [
        Point("a", "", 0.1, False, 0.5, None, None, None),
        Point("b", "", 0.2, False, 0.7, None, None, NAN),
        Point("c", "stock", None, False, 0.4, None, None, None),
    ]
    write([Curve("toy", "accuracy", True, 1, 1, 0.15, points)], tmp_path)
    (only,) = valid((tmp_path / "curve.json").read_text())["curves"]
    assert [(p["low"], p["high"], p["zoomed"]) for p in only["points"]] == [(None,) * 3] * 3
    assert "50.0 [n/a]" in (tmp_path / "curve.md").read_text()
