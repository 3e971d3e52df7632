"""Subsets for CI: the same documents for everyone, refused where they would be others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from sdrpn_eval import subsets
from sdrpn_eval.results.comparability import NotComparable
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import read_run
from sdrpn_eval.subsets import Subset, read_subset, subset
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import manager, textvqa_rows, write
from tests.helpers.run_folders import evaluate
from tools.ci_subsets import save

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
    """A folder in place of the shipped ids, with nothing in it yet."""
    monkeypatch.setattr(subsets, "ids_folder", lambda: tmp_path / "ids")
    return tmp_path / "ids"


def rows(n: int) -> Dataset:
    """Rows of the hub: they do not come from files that were named."""
    return Dataset.from_dict({"n": list(range(n))})


def local_rows(n: int, folder: Path) -> Any:
    rows(n).to_parquet(str(folder / "n.parquet"))
    files = {"test": str(folder / "n.parquet")}
    return load_dataset("parquet", data_files=files, cache_dir=str(folder))["test"]


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


# In lmms-eval


def few(own: Path, task: str, ids: list[int], of: int) -> None:
    save(Subset(task, ROWS[task][0], of, 0, "by hand", ids), own)


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
