"""The labelling job: what goes in, what is kept, and that it can be killed and gone on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL import Image as PIL
from PIL import ImageFile
from pyarrow import parquet
from typer.testing import CliRunner

from sdrpn.backbones.llava15 import Llava15, square_grid
from sdrpn.cli import app
from sdrpn.config import LabelConfig, LayerHeads
from sdrpn.distill.label import Labelled, label_batch
from sdrpn.distill.label_dataset import (
    FEATURES,
    SETTINGS_FILE,
    image_root,
    label_row,
    load_labels,
    read_settings,
    shard_path,
    summarise,
    write_shard,
)
from sdrpn.distill.label_job import LabelJob, preview, relabel, report
from sdrpn.distill.pseudo_labels import IGNORED, pseudo_labels
from sdrpn.distill.questions import fingerprint, read_items
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.generation import generate
from sdrpn.io.atomic import write_json
from sdrpn.io.images import BadImage, load_image, safe_join
from sdrpn.io.questions import ImageQuestion
from sdrpn_eval.demo import tiny_path
from tests.conftest import QUESTIONS, make_image

LABELS = LabelConfig(
    grounding=(LayerHeads(3, (0, 2)),),
    sink=(LayerHeads(1),),
    vicrop_layer=3,
    sink_threshold=1.0,
    foreground=0.75,
    background=0.5,
    max_new_tokens=3,
)
"""A random model looks everywhere at once; only its highest peaks make a foreground."""
NO_ROOM = "does not fit the context"
runner = CliRunner()


def conversation(image: str, question: str, name: str) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": "unused"},
        {"from": "human", "value": "a second question"},
    ]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """LLaVA's JSON with 14 questions in two folders, and the image folder."""
    images, entries = tmp_path / "images", []
    for i in range(14):
        folder = "gqa" if i % 3 else "ocr_vqa"
        (images / folder).mkdir(parents=True, exist_ok=True)
        make_image(60 + 10 * i, 90, i).save(images / folder / f"{i}.png")
        entries.append(conversation(f"{folder}/{i}.png", QUESTIONS[i % 4], f"q{i}"))
    entries.insert(3, {"id": "text", "conversations": [{"from": "human", "value": "hello"}]})
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    return tmp_path / "mix.json", images


def job(llava: Llava15, data: tuple[Path, Path], out: Path, **options: Any) -> LabelJob:
    zoom = ZoomModel(llava, proposer="none", labels=LABELS)
    return LabelJob(zoom, read_items(str(data[0])), out, images=data[1], **options)


# What goes in


def test_first_questions_of_llava_s_conversations(data: tuple[Path, Path]) -> None:
    items = read_items(str(data[0]))
    assert [item.id for item in items] == [f"q{i}" for i in range(14)]
    assert items[1].question == QUESTIONS[1]
    assert items[1].image == "gqa/1.png"


def test_only_conversations_without_an_image_are_passed_by_in_silence(
    data: tuple[Path, Path],
) -> None:
    told: list[str] = []
    assert len(read_items(str(data[0]), tell=told.append)) == 14
    assert told == []


def test_questions_have_a_name_by_their_words_and_order() -> None:
    items = [ImageQuestion("1", "a.png", "one"), ImageQuestion("2", "b.png", "two")]
    others = [
        items[::-1],
        items[:1],
        [replace(items[0], id="3"), items[1]],
        [replace(items[0], image="b.png"), items[1]],
        [replace(items[0], question="two"), items[1]],
        [replace(items[0], id="1a", image=".png"), items[1]],
    ]
    assert fingerprint(items) == "6792415c6ad21ab72cc395db92a8e4c7"
    assert len({fingerprint(items), *map(fingerprint, others)}) == 7


def test_drawn_samples_stay_in_their_order(data: tuple[Path, Path]) -> None:
    """Of seed 0, always the same; and as many as there are, at most."""
    some = read_items(str(data[0]), samples=5)
    assert [item.id for item in some] == ["q0", "q2", "q3", "q4", "q5"]
    assert len(read_items(str(data[0]), samples=99)) == 14
    assert len(read_items(str(data[0]), samples=1)) == 1
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"samples must be 1 or more, got {count}"):
            read_items(str(data[0]), samples=count)


def test_a_data_set_that_is_none_is_named(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"picture": "a.png", "question": "one"}])
    rows.to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet has no column image, only picture, question"):
        read_items(str(tmp_path / "d.parquet"))
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="both has the splits train, test; save the one to label"):
        read_items(str(tmp_path / "both"))
    (tmp_path / "e.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"e\.parquet cannot be read as a data set"):
        read_items(str(tmp_path / "e.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be read as a data set"):
        read_items(str(tmp_path / "empty"))


def test_ids_of_lines_and_data_sets(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question_id": 7, "image": "a.png", "question": "one"},
        {"id": "b", "question_id": 8, "image": "a.png", "question": "two"},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    assert [item.id for item in read_items(str(tmp_path / "d.parquet"))] == ["a", "b"]
    Dataset.from_list(rows).remove_columns("id").to_parquet(tmp_path / "e.parquet")
    assert [item.id for item in read_items(str(tmp_path / "e.parquet"))] == ["7", "8"]
    Dataset.from_list(rows).remove_columns(["id", "question_id"]).to_parquet(tmp_path / "f.parquet")
    assert [item.id for item in read_items(str(tmp_path / "f.parquet"))] == ["0", "1"]
    (tmp_path / "d.jsonl").write_text(json.dumps({k: v for k, v in rows[0].items() if k != "id"}))
    assert read_items(str(tmp_path / "d.jsonl"))[0].id == "7"


def test_images_come_from_the_data_set_s_bytes(tmp_path: Path) -> None:
    """The file that they were read from may be gone."""
    make_image(40, 30, 0).save(tmp_path / "a.png")
    rows = [{"image": {"bytes": (tmp_path / "a.png").read_bytes()}, "question": "one"}]
    (tmp_path / "a.png").unlink()
    features = Features({"image": Image(decode=False), "question": Value("string")})
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    (item,) = read_items(str(tmp_path / "saved"))
    assert item.content
    assert load_image(item.content()).size == (40, 30)


def test_subset_and_samples(data: tuple[Path, Path]) -> None:
    pages = read_items(str(data[0]), subset=["ocr_vqa"])
    assert [item.id for item in pages] == ["q0", "q3", "q6", "q9", "q12"]
    some = read_items(str(data[0]), samples=6, seed=1)
    assert some == read_items(str(data[0]), samples=6, seed=1)
    assert some != read_items(str(data[0]), samples=6, seed=2)
    assert len({item.id for item in some}) == 6
    with pytest.raises(ValueError, match="no image below gqb; it has gqa, ocr_vqa"):
        read_items(str(data[0]), subset=["gqb"])


def test_json_lines_and_data_sets(tmp_path: Path) -> None:
    lines = [{"image": "a.png", "question": "one"}, {"image": "b.png", "text": "two", "id": 7}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(i.id, i.question) for i in read_items(str(tmp_path / "d.jsonl"))] == [
        ("1", "one"),
        ("7", "two"),
    ]
    make_image(40, 30, 0).save(tmp_path / "a.png")
    rows = [{"image": str(tmp_path / "a.png"), "question": "q"}]
    features = Features({"image": Image(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
    (item,) = read_items(str(tmp_path / "d.parquet"))
    assert item.content is not None
    assert load_image(item.content()).size == (40, 30)
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert read_items(str(tmp_path / "saved"))[0].question == "q"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", "{", "is not valid JSON"),
        ("d.json", "{}", "must hold a list"),
        ("d.json", '[{"id": 1, "image": "a.png"}]', "entry 0: expected LLaVA's"),
        ("d.json", "[]", "no question on an image"),
        ("d.jsonl", '{"image": "a.png", "question": "x"}\n{"image"', "line 2: expected"),
        ("d.jsonl", '{"image": "a.png"}', "line 1: expected"),
    ],
)
def test_data_that_is_wrong_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_items(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


PLAIN = [{"id": "p", "image": "a.png", "question": "one"}, {"image": "b.png", "text": "two"}]
TALKS = [conversation("a.png", "one", "p"), conversation("b.png", "two", "q")]


@pytest.mark.parametrize("entries", [PLAIN, TALKS], ids=["plain", "conversations"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["bare", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("listed", [True, False], ids=["list", "lines"])
def test_a_file_of_questions_may_be_a_list_or_lines(
    tmp_path: Path, entries: list[Any], name: str, mark: str, end: str, listed: bool
) -> None:
    lines = end.join(map(json.dumps, entries)) + end
    text = json.dumps(entries, indent=1).replace("\n", end) if listed else lines
    (tmp_path / name).write_bytes((mark + text).encode())
    items = read_items(str(tmp_path / name))
    assert [(i.image, i.question) for i in items] == [("a.png", "one"), ("b.png", "two")]
    assert items[0].id == "p"
    if entries is PLAIN:  # its place: counted from 0 in a list, from 1 in lines
        assert items[1].id == ("1" if listed else "2")


def human(*values: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": value} for value in values]


@pytest.mark.parametrize(
    ("entry", "image", "question"),
    [
        ({"image": ["a.png"], "question": "one"}, "a.png", "one"),
        ({"image": ["a.png"], "conversations": human("<image>\none")}, "a.png", "one"),
        ({"image": "a.png", "conversations": human("<image>", "two")}, "a.png", "two"),
        ({"image": "a.png", "conversations": human(" <image>\n", "two", "three")}, "a.png", "two"),
        ({"image": "a.png", "conversations": human("one\n<image>", "two")}, "a.png", "one"),
        (
            {
                "image": "a.png",
                "conversations": [{"from": "gpt", "value": "what I say"}, *human("one")],
            },
            "a.png",
            "one",
        ),
        ({"image": "a.png", "text": "one", "conversations": human("two")}, "a.png", "one"),
    ],
)
def test_what_can_be_read_of_an_entry_is(
    tmp_path: Path, entry: dict[str, Any], image: str, question: str
) -> None:
    for name, text in (("d.json", json.dumps([entry])), ("d.jsonl", json.dumps(entry))):
        (tmp_path / name).write_text(text)
        told: list[str] = []
        (item,) = read_items(str(tmp_path / name), tell=told.append)
        assert (item.image, item.question) == (image, question)
        assert told == []


EXPECTED = (
    'expected LLaVA\'s {"id", "image", "conversations": [{"from": "human", "value": ...}, ...]} or '
    '{"image", "question"}; '
)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (
            {"image": ["a.png", "b.png"], "question": "one"},
            "the image must be text, got ['a.png', 'b.png'], 2 of them; give one",
        ),
        ({"image": "a.png", "conversations": human("<image>")}, 'no turn "from" "human" asks any'),
        ({"image": "a.png", "conversations": []}, 'no turn "from" "human" asks anything'),
        ({"image": "a.png", "conversations": ["x"]}, "conversations must be a list of {"),
        ({"image": "a.png", "conversations": human("x")[0]}, "conversations must be a list of {"),
        ({"image": "a.png"}, "it has no question, no text and no conversations"),
        ({"image": "", "question": "one"}, "it has no image"),
        ({"question": "one"}, "it has no image"),
        ({"image": 5, "question": "one"}, "the image must be text, got 5"),
        ({"image": "a.png", "question": 5}, "the question must be text, got 5"),
        (
            {"image": "a.png", "question": " <image>\n"},
            "the question must be text, got ' <image>\\n'",
        ),
        (
            {"image": "a.png", "question": "\ud800"},
            "the question holds half of a character, '\\ud800'",
        ),
        ("one", "it must be an object, got a str"),
        (None, "it must be an object, got a NoneType"),
    ],
)
def test_one_bad_entry_among_good_ones_is_skipped_and_named(
    tmp_path: Path, entry: Any, why: str
) -> None:
    good = {"image": "a.png", "question": "one"}
    for name, end, place in (("d.json", "", "entry 1"), ("d.jsonl", "\n", "line 2")):
        path = tmp_path / name
        rows = [json.dumps(one) for one in (good, entry, good | {"id": "z"})]
        path.write_text("\n".join(rows) + end if end else f"[{', '.join(rows)}]")
        told: list[str] = []
        items = read_items(str(path), tell=told.append)
        assert len(items) == 2
        (said,) = told
        start = f"1 of 3 entries of {path} is skipped: {path}, {place}: {EXPECTED}"
        assert said.startswith(start)
        assert said.removeprefix(start).startswith(why)
        rows[2] = json.dumps(entry)
        path.write_text("\n".join(rows) + end if end else f"[{', '.join(rows)}]")
        told.clear()
        assert len(read_items(str(path), tell=told.append)) == 1
        assert told[0].startswith(f"2 of 3 entries of {path} are skipped, the first: {path}, ")
        path.write_text(f"[{json.dumps(entry)}]")
        with pytest.raises(ValueError, match="entry 0: expected LLaVA's") as error:
            read_items(str(path))
        assert why in str(error.value)


def test_a_bad_line_is_skipped_and_a_file_that_is_cut_off_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "d.jsonl", '{"image": "a.png", "question": "one"}\n'
    path.write_text(good + '{"image": \n' + good)
    told: list[str] = []
    assert len(read_items(str(path), tell=told.append)) == 2
    assert told[0].endswith("; it is not valid JSON: Expecting value, column 11")
    path.write_text(good + '{"image": ')
    with pytest.raises(ValueError, match=r"line 2: expected .*: the file may be cut off; fetch it"):
        read_items(str(path))
    path.write_text(good + good.strip())
    assert len(read_items(str(path))) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'{"data": [1], "n": 5}', "list of questions, not a dict; save the list under "
         "its key 'data' as a file"),
        ("d.json", b"{\n}", "d.json must hold a list of questions, not a dict"),
        ("d.json", b"7", "d.json must hold a list of questions, not a int"),
        ("d.json", b"", "holds no question on an image"),
        ("d.json", b"\xef\xbb\xbf \n", "holds no question on an image"),
        ("d.jsonl", b"\n\n", "holds no question on an image"),
        ("d.json", b'[{"a": "\xff"}]', "d.json is not in UTF-8, from byte 8 on; save it as UTF-8"),
        ("d.jsonl", b'{"text": 1}\n{"a": "\xff"}\n', "d.jsonl is not in UTF-8, from byte 19 on"),
        ("d.jsonl", "[]".encode("utf-16"), "d.jsonl is not in UTF-8, from byte 0 on"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_list_of_questions_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_items(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_one_entry_alone_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(TALKS[0], indent=2))
    (item,) = read_items(str(tmp_path / "d.json"))
    assert (item.id, item.image, item.question) == ("p", "a.png", "one")


def test_images_of_a_data_set_may_stand_in_lists_of_one(tmp_path: Path) -> None:
    make_image(40, 30, 0).save(tmp_path / "a.png")
    names = [{"image": ["a.png"], "question": "one"}, {"image": ["a", "b"], "question": "two"}]
    features = Features({"image": Sequence(Value("string")), "question": Value("string")})
    Dataset.from_list(names, features=features).to_parquet(tmp_path / "d.parquet")
    told: list[str] = []
    (item,) = read_items(str(tmp_path / "d.parquet"), tell=told.append)
    assert item.image == "a.png"
    assert "row 1: the image must be text, got ['a', 'b'], 2 of them; give one" in told[0]
    path = str(tmp_path / "a.png")
    rows = [{"image": [path], "question": "one"}, {"image": [path, path], "question": "two"}]
    features = Features({"image": Sequence(Image()), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "e.parquet")
    one, two = read_items(str(tmp_path / "e.parquet"))
    assert one.content
    assert two.content
    assert load_image(one.content()).size == (40, 30)
    with pytest.raises(BadImage, match="row 1: one of several"):
        two.content()


def test_skipped_entries_are_told_and_the_good_ones_labelled(scenes: Path, tmp_path: Path) -> None:
    lines = (scenes / "questions.jsonl").read_text().split("\n")[:4]
    lines.insert(2, '{"id": "odd", "image": ["0.png", "1.png"], "question": "which ?"}')
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    words = ["label", "--model", "tiny", "--data", str(tmp_path / "q.jsonl")]
    result = runner.invoke(app, [*words, "--images", str(scenes), "--out", str(tmp_path / "out")])
    said = " ".join(result.output.split())
    assert result.exit_code == 0, said
    assert "1 of 5 entries of" in said
    assert "q.jsonl, line 3: expected LLaVA's" in said
    assert len(load_labels(tmp_path / "out")) == 4


# What comes out


def test_rows_are_the_labels_of_their_maps(
    llava: Llava15, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path / "out", batch_size=3, shard_size=5).run()
    rows = load_labels(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(14)]
    assert str(rows.features["grounding"].feature.dtype) == "float16"
    assert str(rows.features["labels"].feature.dtype) == "int8"
    kept = [row for row in rows if row["reason"] is None]
    assert kept
    for row in kept:
        maps = (np.array(row[n], np.float32).reshape(8, 8) for n in ("grounding", "sink"))
        labels = pseudo_labels(*maps, LABELS).ravel()
        np.testing.assert_array_equal(row["labels"], labels)
        assert row["foreground"] == (labels == 1).sum() > 0
        assert row["background"] == (labels == 0).sum()
    for row in rows:
        assert (row["reason"] is None) == (np.array(row["labels"]) != IGNORED).any()
    found = summarise(rows)
    assert found["kept"] + sum(found["ignored"].values()) == found["questions"] == 14
    assert found["mean_foreground_share"] == pytest.approx(
        np.mean([row["foreground"] / 64 for row in kept]), abs=1e-4
    )
    assert preview(tmp_path / "out", 2).stat().st_size > 10_000


def test_a_summary_does_not_hang_on_where_the_kept_rows_are() -> None:
    bad = [label_row(str(i), "gone.png", "?", reason="image missing") for i in range(1001)]
    labels = np.array([1, 0, IGNORED, IGNORED])
    maps = {"grounding": np.zeros(4), "sink": np.zeros(4)}
    rows = [*bad, label_row("good", "a.png", "?", labels=labels, **maps)]
    found = summarise(Dataset.from_list(rows, features=FEATURES))
    assert found == {
        "questions": 1002,
        "kept": 1,
        "ignored": {"image missing": 1001},
        "mean_foreground_share": 0.25,
    }
    assert summarise(Dataset.from_list(bad, features=FEATURES))["mean_foreground_share"] == 0


def test_any_batch_and_shard_size_gives_the_same_labels(
    llava: Llava15, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path / "a", batch_size=1, shard_size=14).run()
    job(llava, data, tmp_path / "b", batch_size=4, shard_size=3).run()
    for one, other in zip(load_labels(tmp_path / "a"), load_labels(tmp_path / "b"), strict=True):
        assert one["response"] == other["response"]
        np.testing.assert_allclose(one["grounding"], other["grounding"], atol=1e-3)
        assert one["labels"] == other["labels"]


def test_a_second_run_does_only_what_is_missing(
    llava: Llava15, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path, shard_size=5).run()
    paths = [shard_path(tmp_path, k, 3) for k in range(3)]
    before = load_labels(tmp_path)[:]
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards is missing \(labels-00001-of-00003"):
        load_labels(tmp_path)
    times = [paths[k].stat().st_mtime_ns for k in (0, 2)]
    (tmp_path / "labels-00001-of-00003.part77").write_text("of a run that was killed")
    job(llava, data, tmp_path, shard_size=5).run()
    assert load_labels(tmp_path)[:] == before
    assert [paths[k].stat().st_mtime_ns for k in (0, 2)] == times
    assert not list(tmp_path.glob("*.part*"))


def test_other_settings_need_another_folder(
    llava: Llava15, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path, shard_size=5, about={"dtype": "float32"}).run()
    with pytest.raises(ValueError, match="dtype: float32 there, float16 now"):
        job(llava, data, tmp_path, shard_size=5, about={"dtype": "float16"}).run()


def test_a_broken_shard_is_named(llava: Llava15, data: tuple[Path, Path], tmp_path: Path) -> None:
    job(llava, data, tmp_path, shard_size=5).run()
    path = shard_path(tmp_path, 2, 3)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"labels-00002-of-00003\.parquet cannot be read"):
        load_labels(tmp_path)


def test_images_inside_a_data_set_are_kept_for_training(llava: Llava15, tmp_path: Path) -> None:
    for i in range(2):
        make_image(50, 40 + i, i).save(tmp_path / f"{i}.png")
    rows = [{"image": str(tmp_path / f"{i % 2}.png"), "question": QUESTIONS[i]} for i in range(3)]
    features = Features({"image": Image(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
    zoom = ZoomModel(llava, proposer="none", labels=LABELS)
    LabelJob(zoom, read_items(str(tmp_path / "d.parquet")), tmp_path / "out", images=None).run()
    root = image_root(tmp_path / "out")
    labelled = load_labels(tmp_path / "out")
    sizes = [load_image(safe_join(root, row["image"])).size for row in labelled]  # type: ignore[index]
    assert sizes == [(50, 40), (50, 41), (50, 40)]
    assert len(list(root.iterdir())) == 2


def test_relabelling_is_labelling_with_other_thresholds(
    llava: Llava15, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path / "a", shard_size=5).run()
    given = ["--foreground", "0.9", "--background", "0.3", "--max-components", "1"]
    given += ["--strongest", "0.5"]
    out = str(tmp_path / "b")
    result = runner.invoke(app, ["relabel", str(tmp_path / "a"), "--out", out, *given])
    assert result.exit_code == 0, result.output
    assert "'foreground': 0.9" in result.output
    before, after = load_labels(tmp_path / "a"), load_labels(tmp_path / "b")
    strict = LabelConfig.from_dict(read_settings(tmp_path / "b")["labels"])
    assert (strict.foreground, strict.background, strict.max_components) == (0.9, 0.3, 1)
    assert strict.strongest == 0.5
    assert strict.grounding == LABELS.grounding
    assert before["labels"] != after["labels"]
    for one, other in zip(before, after, strict=True):
        maps = (np.array(one[n], np.float32).reshape(8, 8) for n in ("grounding", "sink"))
        np.testing.assert_array_equal(other["labels"], pseudo_labels(*maps, strict).ravel())
        assert one["response"] == other["response"]
    with pytest.raises(ValueError, match="another folder"):
        relabel(tmp_path / "a", tmp_path / "a", strict)


# Samples that do not fit the model's context


def prompt_length(llava: Llava15, question: str) -> int:
    """Tokens in front of the answer: the image's placeholder stands for 64."""
    return len(llava.plain_ids(question)) - 1 + 64


@pytest.fixture
def short(llava: Llava15, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], ZoomModel]:
    """The random model with a context of so many tokens."""

    def make(context: int) -> ZoomModel:
        monkeypatch.setattr(llava, "context_length", context)
        return ZoomModel(llava, proposer="none", labels=LABELS)

    return make


@pytest.mark.slow
def test_a_sample_fits_if_its_answer_does(
    llava: Llava15, short: Callable[[int], ZoomModel], images: list[PIL.Image]
) -> None:
    """To the token, for answers that end and for those that are cut at 3 tokens."""
    lengths = set()
    for image in images:
        for text in QUESTIONS:
            question, prompt = Question(text, (image,)), prompt_length(llava, text)
            zoom = short(1024)
            (free,) = label_batch(zoom, [question])
            (prefix,) = zoom.prefill([image])
            suffix = llava.suffix_segment(prefix.next_position, llava.prompt_ids(text).after)
            (ids,) = generate(llava, [prefix], [suffix], {"max_new_tokens": 3})
            said = len(ids)
            assert (free.reason == "empty response") == (said == 0)
            if free.reason == "empty response":
                assert label_batch(short(prompt + 1), [question])[0].reason == "empty response"
                assert label_batch(short(prompt), [question])[0].reason == NO_ROOM
                lengths.add(0)
                continue
            (tight,) = label_batch(short(prompt + said), [question])
            assert (tight.response, tight.reason) == (free.response, free.reason)
            np.testing.assert_array_equal(tight.labels, free.labels)
            for less in {1, said, said + 1, said + 9}:
                (none,) = label_batch(short(prompt + said - less), [question])
                assert none.reason == NO_ROOM
                assert none.response == ""
                assert not none.grounding.any()
                assert not none.sink.any()
                assert none.labels.ravel().tolist() == [-100] * 64
            lengths.add(said)
    assert {0, 3} < lengths  # and some that end in between


def test_samples_beside_one_that_does_not_fit_are_labelled_as_alone(
    llava: Llava15, short: Callable[[int], ZoomModel], images: list[PIL.Image]
) -> None:
    """Too long, no room for the answer, one token of room, enough."""
    texts = ["red " * 60, QUESTIONS[2], QUESTIONS[0], QUESTIONS[3], QUESTIONS[1]]
    zoom = short(prompt_length(llava, QUESTIONS[2]))
    asked = [Question(text, (images[i % 2],)) for i, text in enumerate(texts)]
    together = label_batch(zoom, asked)
    assert [one.reason == NO_ROOM for one in together] == [True, True, False, False, False]
    for one, question in zip(together, asked, strict=True):
        (alone,) = label_batch(zoom, [question])
        assert (one.response, one.reason) == (alone.response, alone.reason)
        np.testing.assert_allclose(one.grounding, alone.grounding, atol=1e-3)
        np.testing.assert_array_equal(one.labels, alone.labels)


def test_a_sample_past_the_context_is_counted(scenes: Path, tmp_path: Path) -> None:
    """1,406 tokens in a context of 1,024; relabelling keeps the reason."""
    lines = (scenes / "questions.jsonl").read_text().split("\n")[:3]
    lines.append(json.dumps({"id": "long", "image": "0.png", "question": "red " * 1400}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    words = ["label", "--model", "tiny", "--data", str(tmp_path / "q.jsonl")]
    result = runner.invoke(app, [*words, "--images", str(scenes), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "ignored, does not fit the context: 1" in result.output
    again = runner.invoke(app, ["relabel", str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    for folder in ("out", "again"):
        rows = load_labels(tmp_path / folder)
        assert rows["id"][3] == "long"
        assert rows["reason"][3] == "does not fit the context"
        assert set(rows["labels"][3]) == {-100}
        assert "does not fit the context" not in rows["reason"][:3]
        found = json.loads((tmp_path / folder / "summary.json").read_text())
        assert found["questions"] == 4
        assert found["ignored"]["does not fit the context"] == 1
        assert found["bad_image_share"] == 0


def test_nothing_is_generated_past_the_context_or_twice(
    llava: Llava15,
    short: Callable[[int], ZoomModel],
    images: list[PIL.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 3 tokens at most: one more than there is room for, to see whether the answer ends."""
    calls: list[tuple[int, list[tuple[int, ...]]]] = []

    def noted(llava: Llava15, prefixes: Any, suffixes: Any, generation: Any) -> Any:
        calls.append((generation["max_new_tokens"], [suffix.ids for suffix in suffixes]))
        return generate(llava, prefixes, suffixes, generation)

    monkeypatch.setattr("sdrpn.distill.label.generate", noted)
    texts = ["red " * count + "disc ?" for count in (5, 6, 7, 8, 9, 9)]
    words = [tuple(llava.prompt_ids(text).after) for text in texts]
    zoom = short(prompt_length(llava, texts[3]))
    label_batch(zoom, [Question(text, (images[0],)) for text in texts])
    assert calls == [(2, [words[2]]), (3, [words[0], words[1]])]


# Several processes


class Rank:
    """What accelerate tells one of several processes, here threads that wait for each other."""

    def __init__(self, index: int, barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes = index, barrier.parties
        self.is_main_process = index == 0
        self.wait_for_everyone = barrier.wait


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("questions", "shards"), [(14, 7), (14, 5), (13, 3), (3, 3), (2, 1), (9, 9)]
)
def test_every_question_is_labelled_exactly_once(
    llava: Llava15,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    questions: int,
    shards: int,
) -> None:
    """However many processes share however many shards, and when some are there already."""
    asked: list[str] = []

    def counted(zoom: Any, batch: list[Question], kinds: list[str]) -> list[Labelled]:
        asked.extend(question.text for question in batch)
        cells, grid = np.zeros((8, 8)), square_grid((64, 64), 8, 112)
        return [Labelled("red", cells, cells, np.ones((8, 8)), grid) for _ in batch]

    monkeypatch.setattr("sdrpn.distill.label_job.label_batch", counted)
    make_image(60, 60, 0).save(tmp_path / "a.png")
    items = [ImageQuestion(str(i), "a.png", f"question {i} ?") for i in range(questions)]
    zoom = ZoomModel(llava, proposer="none", labels=LABELS)

    def run_all() -> None:
        jobs = []
        barrier = threading.Barrier(world, timeout=60)
        for index in range(world):
            size = -(-questions // shards)
            one = LabelJob(
                zoom, items, tmp_path / "out", images=tmp_path, batch_size=2, shard_size=size
            )
            one.state = Rank(index, barrier)  # type: ignore[assignment]
            jobs.append(one)
        with ThreadPoolExecutor(world) as pool:
            for done in [pool.submit(one.run) for one in jobs]:
                done.result()

    run_all()
    every = [f"question {i} ?" for i in range(questions)]
    assert sorted(asked) == sorted(every)
    rows = load_labels(tmp_path / "out")
    assert rows["question"] == every
    assert len(list((tmp_path / "out").glob("*.parquet"))) == shards
    asked.clear()
    lost = shard_path(tmp_path / "out", shards - 1, shards)
    lost.unlink()
    run_all()
    size = -(-questions // shards)
    assert sorted(asked) == sorted(every[(shards - 1) * size :])
    assert load_labels(tmp_path / "out")["question"] == every


# Images that cannot be used


def test_bad_images_are_counted_by_reason_and_skipped(
    llava: Llava15, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data[1]
    (images / "gqa/1.png").unlink()
    whole = (images / "gqa/2.png").read_bytes()
    (images / "gqa/2.png").write_bytes(whole[: len(whole) // 2])
    (images / "gqa/4.png").write_text("no picture")
    (images / "gqa/5.png").write_bytes(b"")
    PIL.new("RGB", (1, 500)).save(images / "gqa/7.png")
    PIL.new("1", (300, 300)).save(images / "gqa/8.png")
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 80_000)
    entries = json.loads(data[0].read_text())
    entries.append(conversation("../mix.json", "out of the folder", "escape"))
    data[0].write_text(json.dumps(entries))
    job(llava, data, tmp_path / "out").run()
    rows = load_labels(tmp_path / "out")
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons["q1"] == "image missing"
    assert reasons["q2"] == "image truncated or unreadable"
    assert reasons["q4"] == reasons["q5"] == "image not an image"
    assert reasons["q7"] == "image too narrow"
    assert reasons["q8"] == "image too large"
    assert reasons["escape"] == "image outside the image folder"
    assert sum(r is not None and r.startswith("image ") for r in reasons.values()) == 7
    assert report(tmp_path / "out")["bad_image_share"] == pytest.approx(7 / 15, abs=1e-4)


def test_half_an_image_is_refused_beside_lmms_eval_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms_eval.api.task does
    make_image(60, 60, 0).save(tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg").size == (60, 60)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match="truncated or unreadable"):
        load_image(tmp_path / "a.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_picture_is_turned_as_a_viewer_shows_it(tmp_path: Path) -> None:
    exif = PIL.Exif()
    exif[0x0112] = 6  # the camera was held upright
    PIL.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 40)
    with pytest.raises(BadImage, match=r"b\.jpg: missing"):
        load_image(tmp_path / "b.jpg")


# The command


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 questions for the embedded model, on 12 images."""
    folder = tmp_path_factory.mktemp("scenes")
    lines = []
    for i in range(12):
        make_image(112, 112, i).save(folder / f"{i}.png")
        for colour in ("red", "green", "blue", "pink"):
            question = f"what pattern is on the {colour} disc ?"
            lines.append({"id": f"{i}-{colour}", "image": f"{i}.png", "question": question})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(scenes: Path, out: Path, *more: str) -> list[str]:
    files = ["--data", str(scenes / "questions.jsonl"), "--images", str(scenes)]
    sizes = ["--shard-size", "4", "--batch-size", "2"]
    return ["-m", "sdrpn.cli", "label", "--model", "tiny", *files, "--out", str(out), *sizes, *more]


def run(words: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on(scenes: Path, tmp_path: Path) -> None:
    """SIGKILL after the second shard; by two processes then: nothing lost, nothing doubled."""
    process = run(command(scenes, tmp_path))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert 2 <= len(done) < 12
    assert not (tmp_path / "summary.json").exists()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    again = run([*launch, *command(scenes, tmp_path)], ACCELERATE_USE_CPU="1")
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    for path, written in done.items():
        assert path.stat().st_mtime_ns == written
    rows = load_labels(tmp_path)
    wanted = [json.loads(li)["id"] for li in (scenes / "questions.jsonl").read_text().split("\n")]
    assert rows["id"] == wanted
    assert json.loads((tmp_path / "summary.json").read_text())["questions"] == 48


def test_too_many_bad_images_are_an_error_at_the_end(scenes: Path, tmp_path: Path) -> None:
    lines = (scenes / "questions.jsonl").read_text().split("\n")[:20]
    lines += ['{"id": "x", "image": "x.png", "question": "?"}'] * 2
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    words = ["label", "--model", "tiny", "--data", str(tmp_path / "q.jsonl")]
    words += ["--images", str(scenes), "--out", str(tmp_path / "out"), "--preview", "2"]
    result = runner.invoke(app, words)
    assert result.exit_code == 2
    assert "9.1% of the images could not be used" in " ".join(result.output.split())
    assert "ignored, image missing: 2" in result.output
    assert len(load_labels(tmp_path / "out")) == 22
    assert (tmp_path / "out" / "preview.png").exists()


def test_a_model_without_a_tokenizer_is_named(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    words = ["label", "--model", str(tmp_path / "model"), "--images", str(scenes)]
    words += ["--data", str(scenes / "questions.jsonl"), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, words)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "model holds no tokenizer (tokenizer.json or tokenizer.model): copy there" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere.json"], "there is no file nowhere.json"),
        (["--images", "nowhere"], "there is no folder nowhere"),
        (["--model", "nowhere/model"], "cannot load 'nowhere/model'"),
        (["--heads", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_values_are_one_sentence(
    scenes: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    words = command(scenes, tmp_path / "out")[2:]
    result = runner.invoke(app, [*words, *change])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_labels_of_version_0_1_are_read(tmp_path: Path) -> None:
    """They knew square grids only, and noted neither the grid nor where it lies."""
    kept = {"grounding": np.zeros(4), "sink": np.zeros(4), "labels": np.array([1, 0, 0, IGNORED])}
    rows = [label_row("a", "a.png", "?", **kept), label_row("b", "b.png", "?", reason="image gone")]
    write_shard(rows, shard_path(tmp_path, 0, 1))
    path = shard_path(tmp_path, 0, 1)
    table = parquet.read_table(path).drop_columns(["rows", "columns", "extent"])
    parquet.write_table(table, path, write_page_checksum=True)
    labels = {"grounding": [], "sink": [], "vicrop_layer": 0}
    write_json(tmp_path / SETTINGS_FILE, {"shards": 1, "image_tokens": 4, "labels": labels})
    read = load_labels(tmp_path)
    assert [(row["rows"], row["columns"], row["extent"]) for row in read] == [
        (2, 2, []),
        (0, 0, []),
    ]
    assert read[0]["labels"] == [1, 0, 0, IGNORED]
