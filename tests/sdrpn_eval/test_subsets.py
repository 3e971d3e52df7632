"""Subsets for CI: the same documents for everyone, refused where they would be others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdrpn_eval.cli.subsets import app
from sdrpn_eval.plugin import tasks_folder
from sdrpn_eval.results import documents
from sdrpn_eval.results.comparability import NotComparable
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import read_run
from sdrpn_eval.subsets import Subset, even_ids, make_subset, read_subset, stratified_ids, subset
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import chartqa_rows, manager, textvqa_rows, vstar_rows, write
from tests.helpers.run_folders import evaluate

SHIPPED = tasks_folder() / "ci" / "ids"
ROWS = {
    "chartqa_ci": ("chartqa", 2500),
    "docvqa_ci": ("docvqa_val", 5349),
    "hrbench4k_ci": ("hrbench4k", 800),
    "hrbench8k_ci": ("hrbench8k", 800),
    "infovqa_ci": ("infovqa_val", 2801),
    "ocrbench_ci": ("ocrbench", 1000),
    "pope_ci": ("pope", 9000),
    "textvqa_ci": ("textvqa_val", 5000),
    "vstar_ci": ("vstar_harness", 191),
}
"""By subset, the task on the whole split and its rows, as the data sets' pages on the hub state."""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SDRPN_SUBSETS, with nothing in it yet."""
    monkeypatch.setenv("SDRPN_SUBSETS", str(tmp_path / "ids"))
    return tmp_path / "ids"


def rows(n: int) -> Dataset:
    """Rows of the hub: they do not come from files that were named."""
    return Dataset.from_dict({"n": list(range(n))})


def local_rows(n: int, folder: Path) -> Any:
    rows(n).to_parquet(str(folder / "n.parquet"))
    files = {"test": str(folder / "n.parquet")}
    return load_dataset("parquet", data_files=files, cache_dir=str(folder))["test"]


# Choosing


def test_the_shipped_files_are_what_the_script_makes(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["make", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in SHIPPED.iterdir()}
    assert set(made) == {f"{task}.json" for task in ROWS}


@pytest.mark.parametrize("task", ROWS)
def test_a_document_of_every_stretch(task: str) -> None:
    chosen = read_subset(task)
    n, of = len(chosen.ids), chosen.rows
    source, count = ROWS[task]
    assert (chosen.source, n, of) == (source, min(200, count), count)
    assert all(of * i // n <= row < of * (i + 1) // n for i, row in enumerate(chosen.ids))


def test_stretches_are_met_at_no_fixed_place() -> None:
    offsets = [row - 25 * i for i, row in enumerate(read_subset("textvqa_ci").ids)]
    assert set(offsets) == set(range(25))
    others = [read_subset(t).ids for t in ("hrbench4k_ci", "hrbench8k_ci")]
    assert others[0] != others[1]


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 9))
def test_ids_are_distinct_and_in_order(of: int, count: int, seed: int) -> None:
    ids = even_ids(of, count, seed, "x")
    assert len(ids) == min(of, count)
    assert ids == sorted(set(ids))
    assert ids[0] >= 0
    assert ids[-1] < of


def test_another_seed_chooses_others() -> None:
    assert make_subset("pope_ci", seed=1).ids != make_subset("pope_ci").ids


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=80), st.integers(1, 90))
def test_a_column_is_met_in_proportion(labels: list[str], count: int) -> None:
    ids = stratified_ids(labels, count, 0, "x")
    n = min(count, len(labels))
    assert len(ids) == len(set(ids)) == n
    for label in set(labels):
        share = n * labels.count(label) / len(labels)
        assert abs(sum(labels[i] == label for i in ids) - share) < 1


# Using


def test_the_whole_data_set_gives_the_ids() -> None:
    assert subset("infovqa_ci", rows(2801))["n"] == read_subset("infovqa_ci").ids


@pytest.mark.parametrize("n", [191, 4999, 5001, 200])
def test_a_data_set_of_another_size_is_refused(n: int) -> None:
    says = rf"textvqa_ci was chosen from the 5000 rows of textvqa_val, and this data set has {n}:"
    with pytest.raises(ValueError, match=says):
        subset("textvqa_ci", rows(n))


def test_a_small_local_file_is_taken_whole(tmp_path: Path) -> None:
    assert subset("textvqa_ci", local_rows(12, tmp_path))["n"] == list(range(12))


def test_a_larger_local_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this data set has 201: it is another version"):
        subset("textvqa_ci", local_rows(201, tmp_path))


def test_one_s_own_ids_go_before_the_shipped(own: Path) -> None:
    few(own, "chartqa_ci", [0, 2, 4, 6, 8], 10)
    assert read_subset("chartqa_ci").rows == 10
    assert read_subset("pope_ci").rows == 9000
    assert len(subset("chartqa_ci", rows(10))) == 5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", r"chartqa_ci.json is no subset, make it anew"),
        ('{"task": "chartqa_ci"}', r"chartqa_ci.json is no subset, make it anew"),
        ("unsorted", r"is no subset of chartqa_ci: it needs ids of its own, in order"),
    ],
)
def test_a_broken_file_of_ids_is_named(own: Path, content: str, says: str) -> None:
    path = make_subset("chartqa_ci").save(own)
    if content == "unsorted":
        content = json.dumps(json.loads(path.read_text()) | {"ids": [3, 2]})
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        read_subset("chartqa_ci")


def test_an_unknown_subset_is_named() -> None:
    with pytest.raises(ValueError, match="there is no subset gqa_ci, only chartqa_ci, docvqa_ci"):
        read_subset("gqa_ci")
    done = CliRunner().invoke(app, ["make", "--out", "x", "--tasks", "gqa_ci"])
    assert done.exit_code == 2


# In lmms-eval


def few(own: Path, task: str, ids: list[int], of: int) -> None:
    Subset(task, ROWS[task][0], of, 0, "by hand", ids).save(own)


def test_documents_keep_their_rows(data: Path, own: Path) -> None:
    """Document 1 of the subset is row 5 of the split, and so is its image."""
    write(textvqa_rows(8), data / "textvqa_val")
    few(own, "textvqa_ci", [2, 5], 8)
    (task,) = manager().load_task_or_group(["textvqa_ci"]).values()
    assert [doc["question_id"] for doc in task.eval_docs] == [2, 5]
    assert [doc["question_id"] for doc in task.eval_docs_no_media] == [2, 5]
    (image,) = task.doc_to_visual(task.eval_docs[1])
    assert image.getpixel((0, 0)) == (5, 0, 0)


def test_runs_of_one_subset_are_paired_and_of_two_are_refused(
    data: Path, own: Path, tmp_path: Path
) -> None:
    """A document's id is its place in the subset; prompts and images tell two subsets apart."""
    write(textvqa_rows(8), data / "textvqa_val")
    few(own, "textvqa_ci", [2, 5, 7], 8)

    def right_on_five(question: Any) -> str:
        return "stop" if question.images[0].getpixel((0, 0))[0] == 5 else "go"

    evaluate(tmp_path / "a", FakeEngine(lambda q: "go"), ["textvqa_ci"])
    evaluate(tmp_path / "b", FakeEngine(right_on_five), ["textvqa_ci"])
    few(own, "textvqa_ci", [2, 4, 7], 8)
    evaluate(tmp_path / "c", FakeEngine(right_on_five), ["textvqa_ci"])
    runs = {name: read_run(tmp_path / name) for name in "abc"}
    row = next(r for r in compare([runs["a"], runs["b"]]).rows if r.main)
    assert (row.differences[0].wins, row.differences[0].losses, row.questions) == (1, 0, 3)
    with pytest.raises(NotComparable, match="other images in 1 document, such as 1"):
        compare([runs["a"], runs["c"]])


def small_index(monkeypatch: pytest.MonkeyPatch, *folders: str) -> None:
    """The commands load tasks from these folders of the harness alone: all take seconds."""
    real = documents.load_data
    loaded = manager(*folders)
    monkeypatch.setattr(documents, "load_data", lambda names: real(names, manager=loaded))


def test_strata_of_a_real_column(
    data: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(chartqa_rows(12), data / "chartqa")
    small_index(monkeypatch, "chartqa")
    words = ["make", "--out", str(own), "--tasks", "chartqa_ci", "--by", "type", "--count", "4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    chosen = read_subset("chartqa_ci")
    assert (chosen.rows, chosen.strata) == (12, "2 values of type, in proportion")
    assert sorted(i % 2 for i in chosen.ids) == [0, 0, 1, 1]
    wrong = CliRunner().invoke(app, [*words[:-4], "--by", "colour"])
    assert "chartqa_ci has no column colour, only type, question, answer" in wrong.output


def test_rows_are_cut_out_and_serve_the_subset(
    data: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(vstar_rows(5, 3), data / "vstar")
    few(own, "vstar_ci", [1, 6], 8)
    small_index(monkeypatch)
    out = tmp_path / "cut"
    done = CliRunner().invoke(app, ["cut", "--out", str(out), "--tasks", "vstar_ci"])
    assert done.exit_code == 0, done.output
    assert pq.read_table(out / "vstar_ci" / "test-00000-of-00001.parquet").num_rows == 2
    monkeypatch.setenv("SDRPN_DATA", str(out))
    (task,) = manager().load_task_or_group(["vstar_ci"]).values()
    (image,) = task.doc_to_visual(task.eval_docs[1])
    assert (len(task.eval_docs), image.getpixel((0, 0))) == (2, (100, 0, 0))
