"""The tasks: reading V*'s answers, its categories, tiny_vstar's metrics, local data, thresholds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_benchmarks import docvqa_rows, manager, textvqa_rows, vstar_rows, write

from sdrpn_eval import tasks_info
from sdrpn_eval.plugin import tasks_folder


def load(task: str) -> ModuleType:
    """A task's utils.py, as lmms-eval loads it: from the file, outside any package."""
    spec = importlib.util.spec_from_file_location("utils", tasks_folder() / task / "utils.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vstar = load("vstar")
tiny_vstar = load("tiny_vstar")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SDRPN_DATA with nothing in it yet, and no hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


# V*: the letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("B. blue", "B"),
        ("B: blue", "B"),
        ("C) the left one", "C"),
        ("Answer: C", "C"),
        ("ANSWER: (C)", "C"),
        ("The answer is B.", "B"),
        ("The correct option is D", "D"),
        ("I would say (B), as the glove is blue.", "B"),
        ("It is B", "B"),
        ("A is correct", "A"),
        ("A. A dog", "A"),
        ("The answer is A because a dog is there", "A"),
        ("**C**", "C"),
        ("Blue", None),
        ("blue", None),
        ("A dog", None),
        ("Answer: A dog", None),
        ("Cat and dog", None),
        ("(A) or (B)", None),
        ("E", None),
        ("", None),
        ("The color of the glove is black.", None),
        ("Don't know", None),
    ],
)
def test_letter_of_a_response(response: str, letter: str | None) -> None:
    assert vstar.answer_letter(response, set("ABCD")) == letter


@pytest.mark.parametrize("response", ["C", "(C)", "Answer: C", "C. behind"])
def test_a_letter_that_was_not_offered_does_not_count(response: str) -> None:
    assert vstar.answer_letter(response, {"A", "B"}) is None


@given(st.text(max_size=40))
def test_letter_is_always_an_offered_one(response: str) -> None:
    assert vstar.answer_letter(response, {"A", "B"}) in {"A", "B", None}


@given(st.text("abcdefghijklmnopqrstuvwxyz ", min_size=2, max_size=40))
def test_lower_case_words_name_no_letter(response: str) -> None:
    if all(len(word) > 1 for word in response.split()):
        assert vstar.answer_letter(response.capitalize(), {"B", "C", "D"}) is None


def test_unparsed_answers_are_wrong_and_counted() -> None:
    doc = {"text": "What colour? (A) red (B) blue", "label": "B"}
    assert vstar.process_results(doc, ["B"]) == {"accuracy": 1.0, "unparsed": 0.0}
    assert vstar.process_results(doc, ["A"]) == {"accuracy": 0.0, "unparsed": 0.0}
    assert vstar.process_results(doc, ["Blue"]) == {"accuracy": 0.0, "unparsed": 1.0}


def test_prompt_is_the_harness_s() -> None:
    from lmms_eval.tasks.vstar_bench import utils as harness

    kwargs = {"post_prompt": "\nAnswer with the option's letter from the given choices directly."}
    doc = {"text": "What colour?\n(A) red\n(B) blue"}
    assert vstar.doc_to_text(doc, kwargs) == harness.vstar_doc_to_text(doc, kwargs)


# tiny_vstar


@pytest.mark.parametrize(
    ("response", "score"),
    [("red level", 1), ("level", 1), ("Red  level ", 1), ("blue level", 0), ("red", 0), ("", 0)],
)
def test_tiny_vstar_score(response: str, score: int) -> None:
    doc = {"answer": "level", "colour": "red", "category": "fine", "image_id": 3}
    result = tiny_vstar.process_results(doc, [response])
    assert result["accuracy"] == result["accuracy_fine"] == {"image_id": 3, "score": score}
    assert "score" not in result["accuracy_coarse"]


def test_tiny_vstar_means_leave_out_the_other_group() -> None:
    items = [{"image_id": 1, "score": 1.0}, {"image_id": 1}, {"image_id": 2, "score": 0.0}]
    assert tiny_vstar.mean_score(items) == 0.5


# Local data


def test_textvqa_and_docvqa_from_local_parquet(data: Path) -> None:
    write(textvqa_rows(3), data / "textvqa_val")
    write(docvqa_rows(2), data / "docvqa_val", "validation-00000-of-00001.parquet")
    tasks = manager().load_task_or_group(["textvqa_val", "docvqa_val"])
    for name, n in (("textvqa_val", 3), ("docvqa_val", 2)):
        assert len(tasks[name].eval_docs) == n
        (image,) = tasks[name].doc_to_visual(tasks[name].eval_docs[1])
        assert image.getpixel((0, 0)) == (1, 0, 0)
    assert tasks["textvqa_val"].config.generation_kwargs == {"until": ["ASSISTANT:"]}
    assert tasks["docvqa_val"].config.metric_list[0]["metric"] == "anls"


def test_groups_work_with_local_parts(data: Path) -> None:
    write(textvqa_rows(2), data / "textvqa_val")
    write(textvqa_rows(4), data / "textvqa_test")
    ((group, parts),) = manager().load_task_or_group(["textvqa"]).items()
    assert group.group_name == "textvqa"
    assert {n: len(t.eval_docs) for n, t in parts.items()} == {"textvqa_val": 2, "textvqa_test": 4}


def test_a_group_s_folder_serves_its_parts_by_split(data: Path) -> None:
    write(docvqa_rows(2), data / "docvqa", "validation-00000-of-00001.parquet")
    write(docvqa_rows(3), data / "docvqa", "test-00000-of-00001.parquet")
    ((_, parts),) = manager().load_task_or_group(["docvqa"]).items()
    assert {n: len(t.eval_docs) for n, t in parts.items()} == {"docvqa_val": 2, "docvqa_test": 3}


def test_vstar_is_split_by_category(data: Path) -> None:
    write(vstar_rows(5, 3), data / "vstar")
    ((group, parts),) = manager().load_task_or_group(["vstar"]).items()
    assert group.group_name == "vstar"
    sizes = {name: len(task.eval_docs) for name, task in parts.items()}
    assert sizes == {"vstar_direct_attributes": 5, "vstar_relative_position": 3}
    task = parts["vstar_relative_position"]
    assert task.doc_to_text(task.eval_docs[0]) == (
        "What is it?\nA. left\nB. right\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_a_missing_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPN_DATA", "/no/such/folder")
    with pytest.raises(ValueError, match=r"SDRPN_DATA=/no/such/folder is not a folder"):
        manager()


def test_a_folder_without_its_split_is_named(data: Path) -> None:
    write(textvqa_rows(1), data / "textvqa_val", "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"textvqa_val has no parquet file of the split 'valida"):
        manager()


def test_images_without_the_schema_are_refused(data: Path) -> None:
    import pyarrow.parquet as pq

    write(textvqa_rows(1), data / "textvqa_val")
    path = data / "textvqa_val" / "data.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    with pytest.raises(ValueError, match=r"data.parquet holds image bytes \(image\) without"):
        manager()


def test_a_task_without_a_folder_stays_on_the_hub(data: Path) -> None:
    write(textvqa_rows(1), data / "textvqa_val")
    index = manager().task_index
    assert "sdrpn_tasks" in index["textvqa_val"]["yaml_path"]
    assert "sdrpn_tasks" not in index["docvqa_val"]["yaml_path"]


# Names


@pytest.mark.parametrize(
    ("task", "threshold"),
    [
        ("textvqa_val", 0.15),
        ("textvqa_val_lite", 0.15),
        ("textvqa_ci", 0.15),
        ("docvqa_val", 0.1),
        ("vstar_direct_attributes", 0.1),
        ("vstar_bench", 0.1),
        ("hrbench4k", 0.1),
        ("hrbench8k", 0.1),
        ("ocrbench", 0.05),
        ("tiny_vstar", 0.2),
        ("multidocvqa_val", 0.15),
        ("something_new", 0.15),
    ],
)
def test_threshold_by_family(task: str, threshold: float) -> None:
    assert tasks_info.threshold_of(task) == threshold


def test_which_parts_have_a_score() -> None:
    index = manager().task_index
    scored = tasks_info.scored_parts(["textvqa", "docvqa", "vstar", "no_such_task"], index)
    assert scored == {
        "textvqa_val": True,
        "textvqa_test": False,
        "docvqa_val": True,
        "docvqa_test": False,
        "vstar_direct_attributes": True,
        "vstar_relative_position": True,
    }
    line = tasks_info.describe(scored)
    assert "submission only: textvqa_test, docvqa_test:" in line


def test_task_names_on_the_command_line() -> None:
    assert tasks_info.requested(["lmms-eval", "--tasks", "a,b"]) == ["a", "b"]
    assert tasks_info.requested(["lmms-eval", "--tasks=a"]) == ["a"]
    assert tasks_info.requested(["lmms-eval"]) == []


def test_tiny_vstar_reads_the_shipped_file() -> None:
    assert tiny_vstar.PARQUET.endswith("sdrpn_eval/demo/data/tiny_vstar.parquet")
    assert "tiny_vstar" in manager().all_subtasks
    assert "sdrpn_eval" in sys.modules
