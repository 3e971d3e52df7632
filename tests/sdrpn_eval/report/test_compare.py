"""Runs compared question by question, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn.boxes import PixelBox, covered
from sdrpn_eval.cli import app
from sdrpn_eval.report import text
from sdrpn_eval.results.comparability import NotComparable, established
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.comparison import Comparison, MetricRow
from sdrpn_eval.results.documents import read_boxes
from sdrpn_eval.results.published import COLUMN_OF, PUBLISHED, published_score
from sdrpn_eval.results.read import BadRun, Run, parse_arguments, read_run
from sdrpn_eval.results.records import unfinished_later_run
from sdrpn_eval.results.regions import outcome
from sdrpn_eval.results.scores import group_scores
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import (
    docvqa_rows,
    textvqa_rows,
    tiny_vstar_rows,
    vstar_rows,
    write,
)
from tests.helpers.run_folders import (
    SCORER_SETTINGS,
    evaluate,
    record_line,
    sample,
    shade,
    write_facts,
    write_record,
    write_run,
)

STOCK = "pretrained=tiny,proposer=none"


def pair(tmp_path: Path, first: list, second: list, **more: Any) -> tuple[Path, Path]:
    """Two runs of the task `toy`; more: for the second one."""
    a = write_run(tmp_path / "stock", {"toy": first}, model_args=STOCK)
    return a, write_run(tmp_path / "rpn", {"toy": second}, **more)


def compared(*folders: Path, **more: Any) -> Comparison:
    return compare([read_run(folder) for folder in folders], **more)


def row_of(comparison: Comparison, task: str, metric: str) -> MetricRow:
    (row,) = [r for r in comparison.rows if (r.task, r.metric) == (task, metric)]
    return row


# In lmms-eval's own files


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


@pytest.mark.parametrize("setting", SCORER_SETTINGS)
def test_each_setting_that_makes_a_score_is_compared(tmp_path: Path, setting: str) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows, config={setting: SCORER_SETTINGS[setting]})
    with pytest.raises(NotComparable, match=rf"toy: other scorer, {setting}.* is "):
        compared(*folders)


def test_a_metric_of_one_run_only_is_another_scorer(tmp_path: Path) -> None:
    """Of the same settings: a grader that returns one metric more."""
    rows = [sample(i) for i in range(2)]
    config = {"metric_list": [{"metric": "accuracy"}]}
    more = {"toy": {"accuracy,none": 1.0, "unparsed,none": 0.0}}
    one = write_run(tmp_path / "one", {"toy": rows}, config=config)
    two = write_run(tmp_path / "two", {"toy": rows}, more, config=config)
    assert "toy: other metrics, unparsed,none in one only" in refusal(one, two)


def test_what_was_found_to_be_the_same_is_listed(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(4)]
    folders = pair(tmp_path, rows, rows)
    assert established(compared(*folders).evidence, ["toy"]) == [
        "Same documents, prompts and targets: 4 questions, checked one by one.",
        "Same images: not known, stock, rpn left no record of them.",
        "Same scorer: by its settings in the results file only.",
    ]
    for folder in folders:
        write_record(folder, [record_line(i, "red") for i in range(4)])
        write_facts(folder, "aa")
    assert established(compared(*folders).evidence, ["toy"])[1:] == [
        "Same images: by the content hash of each.",
        "Same scorer: by its source and settings.",
    ]


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


# Numbers known by hand


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


def test_a_metric_with_nan_in_one_run_is_named_and_left_out(tmp_path: Path) -> None:
    good = [sample(i, accuracy=1.0) for i in range(3)]
    bad = [sample(0, accuracy=float("nan")), *good[1:]]
    folders = pair(tmp_path, good, bad)
    comparison = compared(*folders)
    assert not comparison.rows
    assert "NaN" in comparison.not_compared[0].reason


# Refusals


def refusal(*folders: Path) -> str:
    with pytest.raises(NotComparable) as error:
        compared(*folders)
    return str(error.value)


def test_other_documents_and_limits_are_refused(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(5)]
    text_ = refusal(*pair(tmp_path, rows, rows[:3], limit=3.0, original=5))
    assert "toy: other documents, 5 and 3, such as 3 in one only (limits: none and 3)" in text_


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": "another question"}, "toy: other prompts in 1 document, such as 1"),
        ({"target": "green"}, "toy: other targets in 1 document, such as 1"),
    ],
)
def test_other_prompts_and_targets_are_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    rows = [sample(i) for i in range(3)]
    assert says in refusal(*pair(tmp_path, rows, [rows[0], rows[1] | change, rows[2]]))


def test_other_images_are_refused(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows)
    write_record(folders[0], [record_line(i, "red") for i in range(2)])
    other = {"images": [{"hash": "else", "size": [100, 100]}]}
    write_record(folders[1], [record_line(0, "red"), record_line(1, "red", **other)])
    assert "toy: other images in 1 document, such as 1" in refusal(*folders)


def test_another_scorer_is_refused_by_settings_and_by_source(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows, config={"process_results": "<function strict at 0x7f>"})
    assert "toy: other scorer, process_results is None and <function strict>" in refusal(*folders)
    folders = pair(tmp_path, rows, rows)
    for folder, scorer in zip(folders, ("aa", "bb"), strict=True):
        write_facts(folder, scorer)
    assert "toy: other scorer (source aa and bb)" in refusal(*folders)


def test_other_data_behind_the_same_prompts_is_refused(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows)
    for folder, data in zip(folders, ("1", "7"), strict=True):
        write_facts(folder, "aa", data)
    told = f"({1:032x} and {7:032x})"
    assert f"toy: other data, in columns that prompts do not show {told}" in refusal(*folders)


def test_facts_are_not_another_model_s_beside_whose_results_they_stand(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    stock, ours = pair(tmp_path, rows, rows, model="llava_hf")
    write_facts(stock, "aa")
    write_facts(ours, "bb")
    evidence = compared(stock, ours).evidence
    assert [bool(one.facts) for one in evidence] == [True, False]


def test_documents_that_failed_are_told(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows)
    write_facts(folders[1], "aa", skipped={"toy": 1})
    said = "\n".join(text.cautions(compared(*folders)))
    assert "rpn: 1 document(s) of toy were skipped or answered without a second look" in said


def test_addresses_in_the_settings_are_no_difference(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, [dict(row) for row in rows])
    configs = [read_run(f).tasks["toy"].config["metric_list"] for f in folders]
    assert configs[0] != configs[1]  # as lmms-eval writes them, with an address in memory
    assert compared(*folders).rows


def test_runs_without_a_common_task_are_refused(tmp_path: Path) -> None:
    rows = [sample(0)]
    one, two = write_run(tmp_path / "1", {"x": rows}), write_run(tmp_path / "2", {"y": rows})
    assert "no task in common (1: x; 2: y)" in refusal(one, two)


def test_a_task_of_one_run_only_is_named(tmp_path: Path) -> None:
    rows = [sample(0)]
    one = write_run(tmp_path / "1", {"x": rows, "y": rows})
    notes = compared(one, write_run(tmp_path / "2", {"x": rows})).notes
    assert "y is not compared: 2 has no such task" in notes


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


# Labels, records, published numbers


def test_llava_hf_is_compared_and_labelled(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(3)]
    stock, ours = pair(tmp_path, rows, rows)
    hf = write_run(tmp_path / "hf", {"toy": rows}, model="llava_hf", model_args="pretrained=x")
    comparison = compared(stock, ours, hf)
    assert [run["labels"] for run in comparison.runs] == [[], [], ["other preprocessing"]]
    assert "hf: other preprocessing" in text.cautions(comparison)


def test_other_padding_and_generation_arguments_are_labelled(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(3)]
    config = {"generation_kwargs": {"max_new_tokens": 99}}
    more = {"model_args": "pretrained=tiny,padding=crop", "config": config}
    comparison = compared(*pair(tmp_path, rows, rows, **more))
    assert comparison.runs[1]["labels"] == [
        "other preprocessing",
        "other generation arguments: max_new_tokens=99",
    ]


def test_a_record_of_another_run_is_not_used(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows)
    write_record(folders[1], [record_line(0, "red"), record_line(1, "something else")])
    comparison = compared(*folders)
    assert comparison.tasks[0].looks["rpn"]["questions"] == 0
    assert any("is of another run (1 of 2 answers differ)" in note for note in comparison.notes)


def test_a_later_run_without_results_is_noticed(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folder = write_run(tmp_path / "run", {"toy": rows})
    write_record(folder, [record_line(i, "red") for i in range(2)])
    assert unfinished_later_run(read_run(folder)) is None
    later = "20260301T130000.000000Z"
    write_record(folder, [record_line(0, "red", run=later)])
    assert unfinished_later_run(read_run(folder)) == later
    write_run(folder, {"toy": rows}, date="20260301_125955")
    assert unfinished_later_run(read_run(folder)) is None


def test_published_numbers_are_found_by_model_and_task() -> None:
    def published(given: dict[str, str], task: str, metric: str, model: str = "llava_sdrpn") -> Any:
        return published_score(model, given, task, metric)

    seven = {"pretrained": "llava-hf/llava-1.5-7b-hf"}
    stock = {**seven, "proposer": "none"}
    assert published(seven, "textvqa_val", "exact_match") == 58.7
    assert published({}, "textvqa_val", "exact_match") == 58.7  # the default is LLaVA-1.5-7B
    assert published(stock, "textvqa_val", "exact_match") == 46.1
    assert published(seven, "pope", "pope_f1_score", "llava_hf") == 85.9
    thirteen = {"pretrained": "llava-hf/llava-1.5-13b-hf", "proposer": "vicrop"}
    assert published(thirteen, "vstar", "accuracy") == 51.8
    for other in ({**seven, "proposer": "attention"}, {"pretrained": "tiny"}):
        assert published(other, "textvqa_val", "exact_match") is None
    assert published(seven, "textvqa_val", "exact_match", "qwen2_5_vl") is None
    assert published(seven, "textvqa_val_lite", "exact_match") is None
    assert published(stock, "textvqa_val_ocr", "exact_match") == 58.2
    assert published(seven, "textvqa_val_ocr", "exact_match") is None
    assert set(COLUMN_OF.values()) < set(PUBLISHED["7b", "rpn"])


@pytest.mark.parametrize(("zone", "hour"), [("UTC", 12), ("utc", 12), ("asia/singapore", 4)])
def test_when_a_run_ended(tmp_path: Path, zone: str, hour: int) -> None:
    """lmms-eval takes the names of time zones in any case."""
    run = read_run(write_run(tmp_path, {"toy": [sample(0)]}, cli={"timezone": zone}))
    assert (run.ended.hour, run.ended.minute) == (hour, 0)


def test_a_time_zone_that_is_none_is_named(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, {"toy": [sample(0)]}, cli={"timezone": "0/"}))
    with pytest.raises(BadRun, match=r"_results.json: it does not say when it was written"):
        _ = run.ended


def test_the_protocol_stands_beside_a_score(tmp_path: Path) -> None:
    """58.2 and 46.1 are both TextVQA: the table says which one this is."""
    scores = {"textvqa_val_ocr": [sample(i) for i in range(3)], "toy": [sample(0)]}
    runs = [read_run(write_run(tmp_path / name, scores)) for name in ("a", "b")]
    comparison = compare(runs)
    said = {row.task: row.protocol for row in comparison.rows}
    assert said == {"textvqa_val_ocr": "OCR tokens in the prompt", "toy": ""}
    table = text.markdown(comparison)
    assert "| task | protocol | metric |" in table
    assert "OCR tokens in the prompt" in table
    toys = compare([read_run(run.folder, tasks=["toy"]) for run in runs])
    assert "protocol" not in text.markdown(toys)


def test_arguments_are_parsed_as_lmms_eval_does() -> None:
    assert parse_arguments("pretrained=a=b,proposer=rpn") == {
        "pretrained": "a=b",
        "proposer": "rpn",
    }
    assert parse_arguments("") == parse_arguments(None) == {}


# Boxes


@pytest.mark.parametrize(
    ("regions", "share"),
    [
        ([], 0),
        ([(0, 0, 10, 10)], 1),
        ([(0, 0, 5, 10)], 0.5),
        ([(0, 0, 5, 10), (0, 0, 10, 5)], 0.75),
        ([(0, 0, 5, 10), (4, 0, 20, 10)], 1),
        ([(-5, -5, 2, 2), (50, 50, 60, 60)], 0.04),
    ],
)
def test_share_covered_by_several_regions(regions: list, share: float) -> None:
    boxes = [PixelBox(*region) for region in regions]
    assert covered(boxes, PixelBox(0, 0, 10, 10)) == pytest.approx(share)


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


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"toy": {"0": [1, 2, 3]}}', '{"toy": {"0": [5, 5, 5, 9]}}']
)
def test_a_bad_file_of_boxes_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"boxes\.json must hold"):
        read_boxes(file)


# The command


def test_command_writes_everything(tmp_path: Path) -> None:
    wrong, right = [[sample(i, a) for i in range(10)] for a in ("blue", "red")]
    folders = pair(tmp_path, wrong, right)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", *map(str, folders), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "rpn is better than stock" in " ".join(done.output.split())
    content = json.loads((out / "compare.json").read_text())
    assert content["rows"][0]["scores"][1]["mean"] == 1.0
    assert content["rows"][0]["differences"][0]["wins"] == 10
    page = (out / "compare.md").read_text()
    assert "| toy | accuracy | 10 / 10 | stock | 0.0 [0.0, 30.8] |" in page
    assert "**toy: rpn is better than stock" in page
    assert "<title>stock / rpn</title>" in (out / "compare.html").read_text()


def test_markdown_holds_hostile_names(tmp_path: Path) -> None:
    rows = [sample(0)]
    one = write_run(tmp_path / "a|b", {"toy": rows})
    page = text.markdown(compared(one, write_run(tmp_path / "<b>", {"toy": rows})))
    assert r"a\|b" in page
    assert r"\<b\>" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}"], "compare needs two runs or more, got 1"),
        (["{run}", "{run}/gone"], "gone does not exist"),
        (["{run}", "{run}", "--names", "a"], "--names has 1 name for 2 runs"),
        (["{run}", "{run}", "--names", "a,a"], "runs need different names"),
        (["{run}", "{run}", "--names", "a,b", "--tasks", "nope"], "has no results for nope"),
        (["{run}", "{run}", "--names", "a,b", "--boxes", "{run}/no.json"], "no.json must hold"),
        (["{run}", "{run}", "--budget-mb", "nan"], "--budget-mb must be greater than 0, got nan"),
        (["{run}", "{run}", "--budget-mb", "0"], "--budget-mb must be greater than 0, got 0"),
        (["{run}", "{run}", "--budget-mb", "inf"], "--budget-mb must be greater than 0, got inf"),
        (["{run}", "{run}", "--seed", "-1"], "--seed must be 0 or more, got -1"),
    ],
)
def test_wrong_use_ends_with_one_sentence(tmp_path: Path, words: list[str], says: str) -> None:
    run = write_run(tmp_path / "run", {"toy": [sample(0)]})
    done = CliRunner().invoke(app, ["compare", *(w.format(run=run) for w in words)])
    assert done.exit_code == 2
    assert says in " ".join(done.output.split()).replace("\n", "")
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["compare", "gate"])
def test_help_teaches(command: str) -> None:
    help_ = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"}).output
    assert help_.count(f"  sdrpn-eval {command} out/") == 2
    assert ("[x0, y0, x1, y1]" in help_) == (command == "compare")
