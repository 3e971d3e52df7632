"""Fingerprints move when, and only when, a score could."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from PIL import Image

from sdrpn_eval.provenance import fingerprints as fp
from sdrpn_eval.requests import Request, undecoded
from tests.helpers.local_benchmarks import TINY_VSTAR, tiny_vstar_rows, write


def request(doc_id: int, prompt: str = "what?", extra: Any = None, **more: Any) -> Request:
    given = {"doc_to_visual": lambda doc: [], "padding_only": False} | more
    return Request(doc_id, prompt, extra or {}, doc_id=doc_id, task="toy", split="test", **given)


# Data and prompts


def test_processes_add_up_to_the_whole() -> None:
    rows = tiny_vstar_rows(6)
    whole = fp.data_fingerprint(rows, range(6))
    shares = [fp.data_fingerprint(rows, range(rank, 6, 3)) for rank in range(3)]
    assert fp.combined(shares) == fp.combined(reversed(shares)) == whole
    asked = [request(i, f"q{i}") for i in range(6)]
    shares = [fp.prompts_fingerprint(asked[rank::2]) for rank in range(2)]
    assert fp.combined(shares) == fp.prompts_fingerprint(asked[::-1])


def _changed(**change: Any) -> Dataset:
    rows = tiny_vstar_rows(4).cast_column("image", TINY_VSTAR["image"])
    content = [undecoded(rows)[i] for i in range(4)]
    content[2] |= change
    return Dataset.from_list(content, features=TINY_VSTAR)


def test_data_moves_with_text_images_and_places() -> None:
    same = fp.data_fingerprint(tiny_vstar_rows(4), range(4))
    assert fp.data_fingerprint(_changed(), range(4)) == same
    moved = {
        fp.data_fingerprint(_changed(question="what?"), range(4)),
        fp.data_fingerprint(_changed(box=[5, 5, 20, 21]), range(4)),
        fp.data_fingerprint(_changed(image=Image.new("RGB", (40, 30))), range(4)),
        fp.data_fingerprint(_changed(), range(3)),
        fp.data_fingerprint(tiny_vstar_rows(4).select([1, 0, 2, 3]), range(4)),
        same,
    }
    assert len(moved) == 6


def test_rows_that_are_no_data_set_and_names_of_files() -> None:
    rows = [{"a": 1, "image": {"bytes": b"x", "path": "/one/x.png"}}]
    other = [{"image": {"bytes": b"x", "path": "/two/x.png"}, "a": 1}]
    assert fp.data_fingerprint(rows, [0]) == fp.data_fingerprint(other, [0])
    assert fp.data_fingerprint([{"a": 2, **rows[0]}], [0]) == fp.data_fingerprint(rows, [0])
    assert fp.data_fingerprint([{"a": ["1", "2"]}], [0]) != fp.data_fingerprint(
        [{"a": ["12"]}], [0]
    )


def test_prompts_and_generation_arguments_move() -> None:
    asked = [request(0, "a"), request(1, "b")]
    assert fp.prompts_fingerprint(asked) != fp.prompts_fingerprint(
        [request(0, "b"), request(1, "a")]
    )
    options = [request(0, "a", " yes"), request(0, "a", " no")]
    assert fp.prompts_fingerprint(options) != fp.prompts_fingerprint(options[:1] * 2)
    short, long = [
        fp.generation_fingerprint([request(0, extra={"max_new_tokens": n})]) for n in (1, 2)
    ]
    assert short != long


# The scorer


TASK = {
    "task": "by_source",
    "dataset_path": "parquet",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
}
FUNCTIONS = """
doc_to_visual: !function utils.doc_to_visual
process_results: !function utils.process_results
"""
CODE = '''
import re

LETTER = re.compile("[A-D]")
SEEN = {"count": 0}


def normal(text):
    """How answers are compared."""
    return text.strip().lower()


class Grader:
    WORDS = {"one": "1"}

    def right(self, said, answer):
        return normal(said) == normal(answer) or bool(LETTER.fullmatch(said))


def doc_to_visual(doc):
    return [doc["image"]]


def process_results(doc, results):
    # compare
    return {"accuracy": float(Grader().right(results[0], doc["answer"]))}
'''


def scorer(folder: Path, code: str = CODE, **config: Any) -> str:
    """The fingerprint of a task whose code stands in a folder."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    folder.mkdir()
    write(tiny_vstar_rows(2), folder / "data")
    (folder / "utils.py").write_text(code)
    files = {"data_files": {"test": str(folder / "data" / "data.parquet")}}
    plain = yaml.safe_dump({**TASK, "dataset_kwargs": files, **config})
    (folder / "by_source.yaml").write_text(plain + FUNCTIONS)
    index = TaskManager(include_path=str(folder), include_defaults=False)
    return fp.scorer_fingerprint(get_task_dict(["by_source"], index)["by_source"])


def test_scorer_stays_with_comments_docstrings_and_folders(tmp_path: Path) -> None:
    first = scorer(tmp_path / "a")
    other = CODE.replace("# compare", "# compare anew\n").replace(
        "How answers are", "How texts are"
    )
    assert scorer(tmp_path / "b", other) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('float(Grader().right(results[0], doc["answer"]))', "1.0"),
        (".lower()", ""),
        ("[A-D]", "[A-E]"),
        ("or bool", "and bool"),
        ('"one": "1"', '"two": "2"'),
    ],
)
def test_scorer_moves_with_its_code_helpers_and_constants(
    tmp_path: Path, old: str, new: str
) -> None:
    assert old in CODE
    assert scorer(tmp_path / "a") != scorer(tmp_path / "b", CODE.replace(old, new))


def test_scorer_moves_with_its_settings(tmp_path: Path) -> None:
    metrics = [{"metric": "accuracy", "aggregation": "median", "higher_is_better": True}]
    assert scorer(tmp_path / "a") != scorer(tmp_path / "b", metric_list=metrics)


def test_an_unreadable_document_has_a_mark_too(tmp_path: Path) -> None:
    good, gone = {"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": None, "path": "/gone"}
    Path(good["path"] or "").write_bytes(b"x")
    digests = fp.document_digests([{"image": good}, {"image": gone}, {"image": {}}], range(3))
    assert len(set(digests.values())) == 3
    assert fp.document_digests([{"image": {"bytes": b"x", "path": None}}], [0])[0] == digests[0]
