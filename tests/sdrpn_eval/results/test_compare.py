"""Runs compared: numbers known by hand, and lmms-eval's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.report import text
from tests.helpers.comparisons import compared, pair, row_of
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import (
    docvqa_rows,
    textvqa_rows,
    tiny_vstar_rows,
    vstar_rows,
    write,
)
from tests.helpers.run_folders import (
    evaluate,
    record_line,
    sample,
    shade,
    write_record,
    write_run,
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    write(textvqa_rows(4), folder / "textvqa_val")
    write(docvqa_rows(4), folder / "docvqa", "validation-00000-of-00001.parquet")
    write(docvqa_rows(2), folder / "docvqa", "test-00000-of-00001.parquet")
    write(vstar_rows(5, 3), folder / "vstar")
    write(tiny_vstar_rows(8), folder / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.chdir(tmp_path)  # tasks write their submission files to the working directory
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


def test_real_runs_of_five_tasks(data: Path, tmp_path: Path) -> None:
    tasks = ["textvqa_val", "docvqa", "vstar", "tiny_vstar"]
    evaluate(tmp_path / "stock", FakeEngine(lambda q: "B"), tasks)
    say = {"What word?": "stop", "Which year?": "1999", "what pattern": "red level"}

    def know(question: Any) -> str:
        right = next((a for q, a in say.items() if question.text.startswith(q)), "A")
        return right if shade(question) != 1 else "B"

    evaluate(tmp_path / "rpn", FakeEngine(know), tasks)
    comparison = compared(tmp_path / "stock", tmp_path / "rpn")
    means = {
        (r.task, r.metric): [round(s.mean, 6) for s in r.scores]
        for r in comparison.rows
        if r.main or r.metric.startswith("accuracy_")
    }
    assert means == {
        ("textvqa_val", "exact_match"): [0, 0.75],
        ("docvqa_val", "anls"): [0, 0.75],
        ("vstar_direct_attributes", "accuracy"): [0, 0.8],
        ("vstar_relative_position", "accuracy"): [0, 1],
        ("vstar", "accuracy"): [0, 0.875],
        ("tiny_vstar", "accuracy"): [0, 0.75],
        ("tiny_vstar", "accuracy_fine"): [0, 0.75],
        ("tiny_vstar", "accuracy_coarse"): [0, 0.75],
    }
    for row in comparison.rows:  # the numbers lmms-eval printed
        for score, run in zip(row.scores, comparison.evidence, strict=True):
            printed = run.run.results["results"][row.task][f"{row.metric},{row.filter}"]
            assert score.mean == pytest.approx(printed)
    tiny = row_of(comparison, "tiny_vstar", "accuracy")
    assert (tiny.questions, tiny.images) == (8, 4)
    change = tiny.differences[0]
    assert (change.wins, change.losses, change.ties) == (6, 0, 2)
    skipped = {(m.task, m.metric): m.totals["rpn"] for m in comparison.not_compared}
    assert skipped == {
        ("textvqa_val", "submission"): None,
        ("docvqa_test", "anls"): None,
        ("docvqa_test", "submission"): None,
    }
    looks = comparison.tasks[0].looks["rpn"]
    assert looks["zoomed"] == 1
    assert looks["crop_share"] == pytest.approx(4 / 1200)
    assert (looks["tokens"], looks["seconds"]) == (80, 0.5)
    assert all(info.clusters == "images" for info in comparison.tasks)


def test_difference_wins_and_losses(tmp_path: Path) -> None:
    said = ["red", "red", "red", "blue", "red", "red"]
    before = [sample(i, a) for i, a in enumerate(["blue", "blue", "red", "red", "red", "blue"])]
    row = row_of(
        compared(*pair(tmp_path, before, [sample(i, a) for i, a in enumerate(said)])),
        "toy",
        "accuracy",
    )
    (change,) = row.differences
    assert (change.wins, change.losses, change.ties) == (3, 1, 2)
    assert change.mean == pytest.approx(2 / 6)
    assert change.low < change.mean < change.high
    assert change.p == 10 / 16  # |3 - 1| is reached by 10 of the 16 sign patterns
    assert change.verdict == "few"


@pytest.mark.parametrize(
    ("questions", "fixed", "verdict", "says"),
    [
        (6, 3, "few", "toy: too few to tell rpn from stock: 6 images, 12 are needed (accuracy"),
        (11, 5, "few", "toy: too few to tell rpn from stock: 11 images, 12 are needed (accuracy"),
        (12, 5, "same", "toy: no difference shown between rpn and stock (accuracy"),
        (12, 6, "better", "toy: rpn is better than stock (accuracy"),
        (6, 6, "better", "toy: rpn is better than stock (accuracy"),
        (1, 1, "few", "toy: too few to tell rpn from stock: 1 image, 12 are needed (accuracy"),
    ],
)
def test_too_few_to_tell_is_no_difference_shown(
    tmp_path: Path, questions: int, fixed: int, verdict: str, says: str
) -> None:
    before = [sample(i, "blue") for i in range(questions)]
    after = [sample(i, "red" if i < fixed else "blue") for i in range(questions)]
    comparison = compared(*pair(tmp_path, before, after))
    (line,) = text.verdicts(comparison)
    assert line.startswith(says)
    assert row_of(comparison, "toy", "accuracy").differences[0].verdict == verdict
    assert "nan" not in text.markdown(comparison)


def test_more_tests_need_more_images(tmp_path: Path) -> None:
    """Of three runs there are two tests, and 0.031 of twelve images is doubled: 14 are needed."""
    rows = [sample(i, "red" if i < 6 else "blue") for i in range(13)]
    runs = [write_run(tmp_path / name, {"toy": rows}) for name in ("a", "b", "c")]
    says = "toy: too few to tell b from a: 13 images, 14 are needed"
    assert text.verdicts(compared(*runs))[0].startswith(says)
    assert text.verdicts(compared(*runs[:2]))[0].startswith("toy: no difference shown")


def test_one_image_has_no_interval_and_valid_json(tmp_path: Path) -> None:
    folders = pair(tmp_path, [sample(0, "blue")], [sample(0)])
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", *map(str, folders), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "0.0 [n/a]" in done.output
    assert "+100.0 [n/a]" in done.output
    content = json.loads((out / "compare.json").read_text(), parse_constant=pytest.fail)
    (row,) = content["rows"]
    assert [(s["mean"], s["low"], s["high"]) for s in row["scores"]] == [
        (0.0, None, None),
        (1.0, None, None),
    ]
    assert (row["differences"][0]["low"], row["differences"][0]["high"]) == (None, None)
    assert "| 0.0 [n/a] |" in (out / "compare.md").read_text()
    assert "nan" not in (out / "compare.html").read_text().lower().split("<script")[0]


def test_a_perfect_score_and_no_change_have_an_interval(tmp_path: Path) -> None:
    """Of 100 images: 0.025 ** (1 / 100) is 0.9638."""
    rows = [sample(i) for i in range(100)]
    page = text.markdown(compared(*pair(tmp_path, rows, rows)))
    assert "| stock | 100.0 [96.4, 100.0] |" in page
    assert "| rpn | 100.0 [96.4, 100.0] | +0.0 [-3.6, +3.6] | 1 | 0 / 0 |" in page


def test_scores_of_another_scale_that_never_change_have_no_interval(tmp_path: Path) -> None:
    rows = [sample(i, accuracy=1400.0) for i in range(30)]
    page = text.markdown(compared(*pair(tmp_path, rows, rows)))
    assert "| rpn | 1400 [n/a] | +0 [n/a] | 1 |" in page


def test_a_metric_that_should_be_low_is_won_by_lower(tmp_path: Path) -> None:
    def run(folder: str, values: list[float]) -> Path:
        rows = [sample(i, unparsed=v) for i, v in enumerate(values)]
        totals = {"toy": {"unparsed,none": sum(values) / len(values)}}
        return write_run(tmp_path / folder, {"toy": rows}, totals, better={"unparsed": False})

    comparison = compared(run("a", [1, 1, 0]), run("b", [0, 1, 0]))
    row = row_of(comparison, "toy", "unparsed")
    assert (row.differences[0].wins, row.differences[0].losses) == (1, 0)
    assert not row.main  # nothing to call fixed or broken by


def test_intervals_are_wider_where_questions_share_images(tmp_path: Path) -> None:
    """Ten images; on half of them both questions are fixed."""
    before = [sample(i, "blue") for i in range(20)]
    after = [sample(i, "red" if i % 4 < 2 else "blue") for i in range(20)]
    folders = pair(tmp_path, before, after)
    apart = row_of(compared(*folders), "toy", "accuracy")
    assert (apart.questions, apart.images) == (20, 20)
    write_record(folders[1], [record_line(i, str(after[i]["filtered_resps"])) for i in range(20)])
    together = row_of(compared(*folders), "toy", "accuracy")
    assert together.images == 10
    widths = [r.differences[0].high - r.differences[0].low for r in (together, apart)]
    assert widths[0] > 1.2 * widths[1]
    assert together.differences[0].p > apart.differences[0].p


def test_the_task_s_own_cluster_key_stands_in_for_a_record(tmp_path: Path) -> None:
    rows = [sample(i, accuracy={"image_id": i // 3, "score": 1.0}) for i in range(6)]
    totals = {"toy": {"accuracy,none": 1.0}}
    folders = [
        write_run(tmp_path / n, {"toy": rows}, totals, config={"cluster_key": "image_id"})
        for n in ("a", "b")
    ]
    comparison = compared(*folders)
    assert comparison.tasks[0].clusters == "the task's image_id"
    assert comparison.rows[0].images == 2


def test_several_tasks_are_corrected_for(tmp_path: Path) -> None:
    wrong, right = [[sample(i, a) for i in range(8)] for a in ("blue", "red")]
    one = write_run(tmp_path / "one", {"x": wrong, "y": wrong})
    two = write_run(tmp_path / "two", {"x": right, "y": right})
    for row in compared(one, two).rows:
        assert row.differences[0].p_adjusted == 2 * row.differences[0].p == 4 / 256
