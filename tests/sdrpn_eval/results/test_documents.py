"""Documents from the data of this machine, and true boxes from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from sdrpn.boxes import PixelBox
from sdrpn_eval.demo import BENCHMARK
from sdrpn_eval.results import documents
from sdrpn_eval.results.compare import gather
from sdrpn_eval.results.documents import read_boxes
from sdrpn_eval.results.read import read_run
from tests.helpers.asking_by_hand import logged
from tests.helpers.embedded_runs import N, embedded_hashes, shown
from tests.helpers.local_benchmarks import textvqa_rows, tiny_vstar_rows, write


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"toy": {"0": [1, 2, 3]}}', '{"toy": {"0": [5, 5, 5, 9]}}']
)
def test_a_bad_file_of_boxes_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"boxes\.json must hold"):
        read_boxes(file)


def stored(folder: Path, hashes: list[str], **more: Any) -> documents.StoredData | None:
    return documents.stored_data([gather(read_run(shown(folder, hashes, **more)))], "tiny_vstar")


def test_stored_rows_are_used_only_for_the_images_that_were_shown(tmp_path: Path) -> None:
    hashes = embedded_hashes()
    found = stored(tmp_path / "good", hashes)
    assert found
    assert [found.key(i) for i in range(N)] == hashes
    assert found.image(0).size == (448, 448)
    rows = load_dataset("parquet", data_files=str(BENCHMARK), split="train")
    assert found.box(3) == PixelBox(*rows[3]["box"])
    assert stored(tmp_path / "other", hashes[-1:] + hashes[1:]) is None
    assert stored(tmp_path / "none", hashes, record=False) is None
    assert stored(tmp_path / "chosen", hashes, process_docs="<function some at 0x7f>") is None
    assert stored(tmp_path / "gone", hashes, dataset_kwargs={"data_files": "/no/file"}) is None


@pytest.mark.parametrize(
    "place",
    [
        {"dataset_path": "pandas", "dataset_kwargs": {"data_files": "{file}"}},
        {"dataset_path": "{folder}", "dataset_kwargs": {}},
        {"dataset_path": "a/b", "dataset_kwargs": {"data_files": "https://x.invalid/a.parquet"}},
        {"dataset_path": "parquet", "dataset_kwargs": {"data_files": "https://x.invalid/a"}},
    ],
)
def test_a_results_file_names_no_other_place_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict[str, Any]
) -> None:
    """Some readers of data sets unpickle, or fetch; results files come from others."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was opened"))
    file = tmp_path / "rows.pkl"
    file.write_bytes(b"")
    text = json.dumps(place).replace("{file}", str(file)).replace("{folder}", str(tmp_path))
    assert stored(tmp_path / "run", ["aa"] * N, **json.loads(text)) is None


@pytest.mark.parametrize(("name", "everything"), [("tiny_vstar", [False]), ("mme", [False, True])])
def test_the_files_of_all_tasks_are_read_only_where_a_task_is_theirs(
    monkeypatch: pytest.MonkeyPatch, name: str, everything: list[bool]
) -> None:
    asked, original = [], documents.task_manager

    def recorded(include_path: Any = None, include_defaults: bool = True) -> Any:
        asked.append(include_defaults)
        return original(include_path, include_defaults)

    monkeypatch.setattr(documents, "task_manager", recorded)
    documents.load_data([name])
    assert asked == everything


def test_a_small_index_says_nothing_of_data_that_the_run_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """textvqa_val is lmms-eval's own task, so the small index does not hold it."""
    write(tiny_vstar_rows(2), tmp_path / "data" / "tiny_vstar")
    write(textvqa_rows(2), tmp_path / "data" / "textvqa_val")
    monkeypatch.setenv("SDRPN_DATA", str(tmp_path / "data"))
    with logged() as log:
        found, notes = documents.load_data(["tiny_vstar"])
    assert (list(found), notes) == (["tiny_vstar"], [])
    assert [line for line in log if "SDRPN_DATA" in line] == []


def test_a_data_set_of_the_hub_is_read_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_dataset("parquet", data_files=str(BENCHMARK), split="train")
    asked = []

    def from_hub(*words: Any, **options: Any) -> Any:
        asked.append((words, options))
        return rows

    monkeypatch.setattr("datasets.load_dataset", from_hub)
    kwargs = {"token": True, "revision": "main"}
    place = {"dataset_path": "lmms-lab/toy", "dataset_name": "all", "dataset_kwargs": kwargs}
    found = stored(tmp_path / "run", embedded_hashes(rows), **place)
    assert found
    assert asked == [(("lmms-lab/toy", "all"), {"split": "test", "revision": "main"})]
    assert found.image(7).size == (448, 448)
