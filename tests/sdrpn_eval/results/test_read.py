"""What lmms-eval left, read with suspicion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import BadRun, parse_arguments, read_run
from tests.helpers.run_folders import (
    sample,
    write_run,
)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda results, samples: results.unlink(), "holds no *_results.json"),
        (lambda results, samples: samples.unlink(), "no samples of toy beside it"),
        (
            lambda results, samples: results.write_text("{"),
            "is no results file of lmms-eval: EOF while parsing",
        ),
        (
            lambda results, samples: results.write_text("{}"),
            "is no results file of lmms-eval: results: Field",
        ),
        (lambda _, s: s.write_text(s.read_text()[:-20]), "is cut off or broken in line 4"),
        (lambda _, s: s.write_text("".join(s.read_text().splitlines(True)[:2])), "holds 2 of 4"),
        (lambda _, s: s.write_text(2 * s.read_text()), "holds document 0 more than once"),
    ],
)
def test_broken_runs_are_refused_with_the_reason(tmp_path: Path, harm: Any, says: str) -> None:
    folder = write_run(tmp_path / "run", {"toy": [sample(i) for i in range(4)]})
    assert read_run(folder).tasks["toy"].samples[3].answer == "red"
    (results,) = folder.rglob("*_results.json")
    harm(results, next(folder.rglob("*.jsonl")))
    with pytest.raises(BadRun) as error:
        read_run(folder)
    assert says in str(error.value)
    assert str(folder) in str(error.value)


def test_the_latest_of_several_runs_is_read(tmp_path: Path) -> None:
    write_run(tmp_path, {"toy": [sample(0, "blue")]}, date="20260301_120000")
    write_run(tmp_path, {"toy": [sample(0, "red")]}, date="20260302_080000")
    assert read_run(tmp_path).tasks["toy"].samples[0].answer == "red"
    (older,) = tmp_path.rglob("20260301*_results.json")
    assert read_run(older).tasks["toy"].samples[0].answer == "blue"


def test_several_filters_of_a_task_are_told_apart(tmp_path: Path) -> None:
    rows = [sample(i, accuracy=1.0) for i in range(2)] + [sample(i, accuracy=0.0) for i in range(2)]
    totals = {"toy": {"accuracy,first": 1.0, "accuracy,strict": 0.0}}
    path = write_run(tmp_path / "a", {"toy": rows}, totals)
    results = next(path.rglob("*_results.json"))
    content = json.loads(results.read_text())
    content["n-samples"]["toy"] = {"original": 2, "effective": 2}
    results.write_text(json.dumps(content))
    comparison = compare([read_run(path, "a"), read_run(path, "b")])
    assert [(r.filter, r.scores[0].mean) for r in comparison.rows] == [("first", 1), ("strict", 0)]


@pytest.mark.parametrize(("zone", "hour"), [("UTC", 12), ("utc", 12), ("asia/singapore", 4)])
def test_when_a_run_ended(tmp_path: Path, zone: str, hour: int) -> None:
    """lmms-eval takes the names of time zones in any case."""
    run = read_run(write_run(tmp_path, {"toy": [sample(0)]}, cli={"timezone": zone}))
    assert (run.ended.hour, run.ended.minute) == (hour, 0)


def test_a_time_zone_that_is_none_is_named(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, {"toy": [sample(0)]}, cli={"timezone": "0/"}))
    with pytest.raises(BadRun, match=r"_results.json: it does not say when it was written"):
        _ = run.ended


def test_arguments_are_parsed_as_lmms_eval_does() -> None:
    assert parse_arguments("pretrained=a=b,proposer=rpn") == {
        "pretrained": "a=b",
        "proposer": "rpn",
    }
    assert parse_arguments("") == parse_arguments(None) == {}
