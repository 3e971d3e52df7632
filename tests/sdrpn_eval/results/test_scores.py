"""One number per document and metric, or the reason why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import Run, Sample, TaskRun, read_run
from sdrpn_eval.results.scores import (
    Scores,
    all_scores,
    document_value,
    group_scores,
    task_scores,
)
from tests.helpers.comparisons import compared, pair, row_of
from tests.helpers.run_folders import (
    sample,
    write_run,
)


def test_pope_f1_is_not_the_mean_of_its_documents(tmp_path: Path) -> None:
    from lmms_eval.tasks.pope import utils

    names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")

    def run(folder: str, said: list[str]) -> Path:
        documents = [{"question_id": i, "answer": "yes" if i < 3 else "no"} for i in range(6)]
        parts = [utils.pope_process_results(d, [s]) for d, s in zip(documents, said, strict=True)]
        totals = {
            f"pope_{name},none": getattr(utils, f"pope_aggregate_{name}")(
                [part[f"pope_{name}"] for part in parts]
            )
            for name in names
        }
        rows = [sample(i, s, **p) for i, (s, p) in enumerate(zip(said, parts, strict=True))]
        return write_run(tmp_path / folder, {"pope": rows}, {"pope": totals})

    one = run("one", ["yes", "yes", "no", "no", "no", "no"])
    two = run("two", ["yes", "yes", "yes", "yes", "no", "no"])
    comparison = compared(one, two)
    assert {r.metric for r in comparison.rows} == {"pope_accuracy"}
    f1 = next(m for m in comparison.not_compared if m.metric == "pope_f1_score")
    assert "is no mean over documents" in f1.reason
    assert f1.totals == {"one": pytest.approx(0.8), "two": pytest.approx(6 / 7)}


def test_ocrbench_is_read_under_a_limit_and_chartqa_by_split(tmp_path: Path) -> None:
    def run(folder: str, right: list[bool]) -> Path:
        ocr = [sample(i, ocrbench_accuracy={"score": int(r)}) for i, r in enumerate(right)]
        split = ("relaxed_human_split", "relaxed_augmented_split")
        chart = [
            sample(i, relaxed_overall=float(r), **{split[i % 2]: float(r)})
            for i, r in enumerate(right)
        ]
        totals = {
            "ocrbench": {"ocrbench_accuracy,none": sum(right) / 1000},
            "chartqa": {
                "relaxed_overall,none": sum(right) / 4,
                "relaxed_human_split,none": sum(right[::2]) / 2,
                "relaxed_augmented_split,none": sum(right[1::2]) / 2,
            },
        }
        return write_run(tmp_path / folder, {"ocrbench": ocr, "chartqa": chart}, totals)

    comparison = compared(run("a", [False] * 4), run("b", [True, True, True, False]))
    assert not comparison.not_compared
    assert row_of(comparison, "ocrbench", "ocrbench_accuracy").scores[1].mean == 0.75
    assert row_of(comparison, "chartqa", "relaxed_human_split").scores[1].mean == 1
    assert row_of(comparison, "chartqa", "relaxed_augmented_split").questions == 2


def one_metric(folder: Path, values: list[float], total: float, metric: str = "accuracy") -> Run:
    """A run whose documents have these scores, and whose printed score is the total."""
    rows = [sample(i, **{metric: value}) for i, value in enumerate(values)]
    return read_run(write_run(folder, {"toy": rows}, {"toy": {f"{metric},none": total}}))


@pytest.mark.parametrize("off", [0.01, 0.005, 0.001, 1e-4, 1e-5, -0.01, -1e-4, -1e-5])
def test_a_total_that_disagrees_with_its_mean_is_not_compared(tmp_path: Path, off: float) -> None:
    values = [1.0, 1.0, 1.0, 0.0]
    comparison = compare([one_metric(tmp_path / n, values, 0.75 * (1 + off)) for n in ("a", "b")])
    assert not comparison.rows
    (one,) = comparison.not_compared
    assert one.reason.startswith("is no mean over documents: theirs is 0.75, the score is 0.7")


@pytest.mark.parametrize(
    ("values", "total", "metric"),
    [
        ([1.0, 1.0, 1.0, 0.0], 0.75, "accuracy"),
        ([1.0, 1.0, 1.0, 0.0], 0.75 * (1 + 4e-7), "accuracy"),  # as lmms-eval rounds
        ([1.0, 1.0, 1.0, 0.0], 75.0, "accuracy"),  # in percent
        ([0.0, 0.0, 0.0, 0.0], 0.0, "accuracy"),
        ([1.0, 1.0, 1.0, 0.0], 0.003, "ocrbench_accuracy"),  # of its 1000 questions
    ],
)
def test_a_total_that_is_the_mean_of_its_documents_is_compared(
    tmp_path: Path, values: list[float], total: float, metric: str
) -> None:
    comparison = compare([one_metric(tmp_path / n, values, total, metric) for n in ("a", "b")])
    assert not comparison.not_compared
    assert [score.mean for score in comparison.rows[0].scores] == [sum(values) / 4] * 2


@pytest.mark.parametrize(
    ("total", "metric"), [(0.003, "accuracy"), (0.3, "ocrbench_accuracy"), (7.5, "accuracy")]
)
def test_another_scale_than_a_mean_s_is_not_compared(
    tmp_path: Path, total: float, metric: str
) -> None:
    values = [1.0, 1.0, 1.0, 0.0]
    comparison = compare([one_metric(tmp_path / n, values, total, metric) for n in ("a", "b")])
    assert "is no mean over documents" in comparison.not_compared[0].reason


def test_a_metric_whose_documents_carry_no_number_is_named(tmp_path: Path) -> None:
    rows = [sample(i, accuracy={"answer": "red"}) for i in range(3)]
    runs = [
        read_run(write_run(tmp_path / n, {"toy": rows}, {"toy": {"accuracy,none": 0.5}}))
        for n in ("a", "b")
    ]
    (one,) = compare(runs).not_compared
    assert one.reason == "its documents carry no number each"


def test_a_group_of_which_another_run_lacks_a_task_is_left_out(tmp_path: Path) -> None:
    both = grouped(tmp_path / "a", 0.75)
    one = read_run(grouped(tmp_path / "b", 0.75).folder, tasks=["x"])
    assert [row.task for row in compare([both, one]).rows] == ["x"]


def test_a_group_with_a_task_without_numbers_is_named(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        run = grouped(tmp_path / name, 0.75)
        path = next(run.folder.rglob("*_samples_y.jsonl"))
        line = json.loads(path.read_text()) | {"accuracy": {"answer": "red"}}
        path.write_text(json.dumps(line) + "\n")
        runs.append(read_run(run.folder))
    reasons = {one.task: one.reason for one in compare(runs).not_compared}
    assert reasons["both"] == "not all of its tasks have a score a document"


def test_a_group_is_high_when_better_only_if_all_its_tasks_are(tmp_path: Path) -> None:
    run = grouped(tmp_path / "a", 0.75)
    file = next(run.folder.rglob("*_results.json"))
    content = json.loads(file.read_text())
    content["higher_is_better"]["y"] = {"accuracy": False}
    file.write_text(json.dumps(content))
    (both,) = group_scores(read_run(run.folder), "both")
    assert not both.higher_is_better
    (both,) = group_scores(run, "both")
    assert both.higher_is_better


def test_the_number_stands_where_the_task_says(tmp_path: Path) -> None:
    rows = [sample(i, accuracy={"score": 0.0, "points": float(i)}) for i in range(2)]
    totals = {"toy": {"accuracy,none": 0.5}}
    runs = [
        read_run(write_run(tmp_path / n, {"toy": rows}, totals, config={"score_key": "points"}))
        for n in ("a", "b")
    ]
    assert [score.mean for score in compare(runs).rows[0].scores] == [0.5, 0.5]


def test_a_group_whose_tasks_are_not_all_compared_is_left_out(tmp_path: Path) -> None:
    runs = [grouped(tmp_path / n, 0.75) for n in ("a", "b")]
    some = compare([read_run(run.folder, run.name, ["x"]) for run in runs])
    assert [row.task for row in some.rows] == ["x"]
    assert group_scores(read_run(runs[0].folder, tasks=["x"]), "both") == []


def grouped(folder: Path, total: float | None, better: bool = True) -> Run:
    """A group of two tasks with 2 of 3 and 1 of 1 right."""
    tasks = {"x": [sample(0), sample(1), sample(2, "blue")], "y": [sample(0)]}
    path = write_run(folder, tasks, better={"accuracy": better})
    file = next(path.rglob("*_results.json"))
    content = json.loads(file.read_text())
    content["group_subtasks"] = {"both": ["x", "y"], "x": [], "y": []}
    content["results"]["both"] = {"alias": "both", "accuracy,none": total}
    file.write_text(json.dumps(content))
    return read_run(path)


def test_a_group_is_over_the_documents_of_its_tasks(tmp_path: Path) -> None:
    comparison = compare([grouped(tmp_path / n, 0.75) for n in ("a", "b")])
    both = row_of(comparison, "both", "accuracy")
    assert (both.questions, both.scores[0].mean, both.main) == (4, 0.75, True)
    assert both.differences[0].p_adjusted is None  # it repeats its tasks


@pytest.mark.parametrize(
    ("total", "reason"),
    [
        (0.8333, "is no mean over documents: theirs is 0.75, the score is 0.8333"),
        (None, "has no number"),
        (float("nan"), "has no number"),
    ],
)
def test_a_group_s_total_that_is_no_mean_is_not_compared(
    tmp_path: Path, total: float | None, reason: str
) -> None:
    comparison = compare([grouped(tmp_path / n, total) for n in ("a", "b")])
    (one,) = comparison.not_compared
    assert (one.task, one.reason) == ("both", reason)


def test_a_metric_with_nan_in_one_run_is_named_and_left_out(tmp_path: Path) -> None:
    good = [sample(i, accuracy=1.0) for i in range(3)]
    bad = [sample(0, accuracy=float("nan")), *good[1:]]
    folders = pair(tmp_path, good, bad)
    comparison = compared(*folders)
    assert not comparison.rows
    assert "NaN" in comparison.not_compared[0].reason


# By hand, without files


def answered(
    name: str,
    values: Sequence[Mapping[str, Any]],
    totals: Mapping[str, float | None],
    better: Mapping[str, bool | None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> TaskRun:
    """A task whose documents 10, 11, ... have these values, by "metric,filter"."""
    none = (None, None)
    samples = {10 + i: Sample(10 + i, "q", "t", "a", none, v) for i, v in enumerate(values)}
    return TaskRun(name, samples, totals, better or {}, config or {}, len(values))


def test_a_document_s_number() -> None:
    assert document_value(0.5) == document_value({"score": 0.5, "points": 3}) == 0.5
    assert document_value({"score": 0.5, "points": 3}, "points") == 3
    assert document_value({"points": 3}) is None
    assert document_value({"score": "yes"}) is document_value("yes") is document_value(None) is None


def test_the_metrics_of_a_task_in_its_order() -> None:
    """Of three documents f1 counts two; one has an entry for it without a number."""
    values = [
        {"f1,strict": {"points": 1.0, "score": 0.0}, "a,b,none": 1.0},
        {"f1,strict": {"points": None}, "a,b,none": 0.0, "low,none": 1.0},
        {"f1,strict": {"points": 0.0}, "a,b,none": 0.0},
    ]
    totals = {"f1,strict": 0.5, "a,b,none": 0.4, "low,none": 1.0, "file,none": None}
    task = answered("toy", values, totals, {"low": False, "f1": None}, {"score_key": "points"})
    first, second, third, last = task_scores(task)
    kept = {("toy", 10): 1.0, ("toy", 12): 0.0}
    assert first == Scores("toy", "f1", "strict", True, 0.5, kept, "")
    assert first.key == ("toy", "f1", "strict")
    why = "is no mean over documents: theirs is 0.3333, the score is 0.4"
    assert second == Scores("toy", "a,b", "none", True, 0.4, None, why)
    assert third == Scores("toy", "low", "none", False, 1.0, {("toy", 11): 1.0}, "")
    why = "has no number, such as a file to hand in"
    assert last == Scores("toy", "file", "none", True, None, None, why)


@pytest.mark.parametrize(
    ("values", "total", "reason"),
    [
        ([0.5, 1.0], 0.75, ""),
        ([0.5, 1.0], 0.75 * (1 - 9e-7), ""),
        ([0.5, 1.0], 0.75 * (1 + 3e-6), "is no mean over documents: theirs is 0.75, the score is "),
        ([0.5, 1.0], 75.00005, ""),
        ([0.0, 0.0], 9e-7, ""),
        ([0.0, 0.0], 2e-6, "is no mean over documents: theirs is 0, the score is 2e-06"),
        ([0.5, 1.0], 0.0015, "is no mean over documents: theirs is 0.75, the score is 0.0015"),
        ([math.nan, 1.0], 0.5, "some of its documents have the score NaN"),
        ([math.inf, 1.0], 0.5, "some of its documents have the score NaN"),
        (["yes", None], 0.5, "its documents carry no number each"),
        ([], 0.5, "its documents carry no number each"),
    ],
)
def test_why_a_metric_has_no_number_for_each_document(
    values: list[Any], total: float, reason: str
) -> None:
    (one,) = task_scores(answered("toy", [{"m,none": v} for v in values], {"m,none": total}))
    assert one.reason.startswith(reason)
    assert bool(one.reason) == bool(reason) == (one.values is None)
    assert one.total == total


def test_a_metric_that_is_divided_by_the_whole_data_set() -> None:
    key = "ocrbench_accuracy,none"
    toy = answered("toy", [{key: {"score": 1.0, "points": 5}}] * 2, {key: 0.002})
    (one,) = task_scores(toy)
    assert one.values == {("toy", 10): 1.0, ("toy", 11): 1.0}
    results: Any = {"group_subtasks": {"g": ["toy"]}, "results": {"g": {key: 0.002}}}
    (group,) = group_scores(Run("a", Path("a"), Path("a"), results, {"toy": toy}), "g")
    assert group == Scores("g", "ocrbench_accuracy", "none", True, 0.002, one.values)


def test_groups_of_tasks() -> None:
    right, wrong = {"m,none": 1.0, "n,o,f": 0.0}, {"m,none": 0.0, "n,o,f": 0.0}
    low = {"n,o": False}
    tasks = {
        "x": answered("x", [right, right, wrong], {"m,none": 2 / 3, "n,o,f": 0.0}),
        "y": answered("y", [right], {"m,none": 1.0, "n,o,f": 0.0}, low),
        "z": answered("z", [{"m,none": "no"}], {"m,none": 1.0}),
    }
    results: Any = {
        "group_subtasks": {
            "xy": ["x", "y"],
            "xz": ["x", "z"],
            "yw": ["y", "w"],
            "yx": ["y", "x"],
            "no score": ["x"],
        },
        "results": {
            "xy": {"alias": "xy", "m,none": 0.75, "n,o,f": 0.0, "o,none": 1.0},
            "xz": {"m,none": 0.5},
            "yx": {"m,none": 0.8},
        },
    }
    run = Run("a", Path("a"), Path("a"), results, tasks)
    first, second, third = group_scores(run, "xy")
    values = {("x", 10): 1.0, ("x", 11): 1.0, ("x", 12): 0.0, ("y", 10): 1.0}
    assert first == Scores("xy", "m", "none", True, 0.75, values)
    assert second == Scores("xy", "n,o", "f", False, 0.0, dict.fromkeys(values, 0.0))
    missing = "not all of its tasks have a score a document"
    assert third == Scores("xy", "o", "none", True, 1.0, None, missing)
    (one,) = group_scores(run, "xz")
    assert one == Scores("xz", "m", "none", True, 0.5, None, missing)
    (one,) = group_scores(run, "yx")
    why = "is no mean over documents: theirs is 0.75, the score is 0.8"
    assert one == Scores("yx", "m", "none", True, 0.8, None, why)
    assert group_scores(run, "yw") == []  # w was not read
    assert group_scores(run, "no score") == []
    found = all_scores(run, ["y", "x"])
    assert list(found) == [
        ("y", "m", "none"),
        ("y", "n,o", "f"),
        ("x", "m", "none"),
        ("x", "n,o", "f"),
        *(("xy", m, f) for m, f in (("m", "none"), ("n,o", "f"), ("o", "none"))),
        ("yx", "m", "none"),
    ]
    assert found["xy", "m", "none"] == first
    assert list(all_scores(run, ["z"])) == [("z", "m", "none")]
