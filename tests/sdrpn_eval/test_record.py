"""The record: lines as batches finish, maps, runs in one folder."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.instance import Instance

from sdrpn_eval.record import (
    LINE,
    RecordLine,
    RecordWriter,
    check_writable,
    encode_map,
    lines_of,
    read_all_records,
    read_records,
)
from tests.helpers.asking_by_hand import ask, logged, model, rows, texts, visual
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.run_folders import record_line


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def log() -> Any:
    with logged() as lines:
        yield lines


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6))
def test_maps_are_kept_to_half_a_256th(values: list[float]) -> None:
    roi_map = np.array(values, dtype=np.float32).reshape(2, 3)
    given = record_line(0, "red") | encode_map(roi_map)
    line = LINE.validate_json(RecordLine.model_validate(given).as_json(), strict=True)
    assert np.abs(line.roi_map - roi_map).max() <= 0.5 / 255 + 1e-6
    assert line.grid == (2, 3)
    assert line.map_max == pytest.approx(roi_map.max(), abs=1e-6)


def test_one_line_a_question(engine: FakeEngine, tmp_path: Path) -> None:
    lm = model(engine, [*rows(3), {"image": None}], record=str(tmp_path), batch_size=2)
    lm.generate_until([ask("textvqa_val", i, f"q{i}") for i in (3, 1, 0)])
    lines = read_records(tmp_path)
    assert [line.doc_id for line in lines] == [0, 1, 3]
    first, *_, last = lines
    assert first.task == "textvqa_val"
    assert first.split == "test"
    assert first.size == (8, 6)
    assert first.prompt == "q0"
    assert first.answer == "q0|1"
    assert first.regions == ((1, 2, 3, 4),)
    assert (first.policy, first.threshold) == ("strongest", 0.15)
    assert first.tokens == {"image": 64, "crop": 9, "question": 5, "new": 2}
    assert first.reason is None
    assert first.roi_map.shape == (8, 8)
    assert (last.reason, last.heat, last.images) == ("no image", None, ())
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files[0] == "record_textvqa_val_rank0.jsonl"
    assert len(files) == 2
    assert files[1].startswith("run_facts_")


def test_lines_are_written_as_batches_finish(engine: FakeEngine, tmp_path: Path) -> None:
    answer = engine.ask_batch

    def dies_on_the_second(questions: Any, *, generation: Any) -> Any:
        if engine.batches:
            raise RuntimeError("power cut")
        return answer(questions, generation=generation)

    engine.ask_batch = dies_on_the_second  # type: ignore[method-assign]
    lm = model(engine, rows(4), record=str(tmp_path))
    with pytest.raises(RuntimeError, match="power cut"):
        lm.generate_until([ask("mytask", i, "?") for i in range(4)])
    assert len(read_records(tmp_path)) == 1


def test_the_latest_run_is_read_and_a_cut_line_survived(
    engine: FakeEngine, tmp_path: Path, log: list[str]
) -> None:
    model(engine, rows(2), record=str(tmp_path)).generate_until([ask("mytask", 0, "old")])
    path = tmp_path / "record_mytask_rank0.jsonl"
    with path.open("a") as file:
        file.write('{"run": "2')
    model(engine, rows(2), record=str(tmp_path)).generate_until([ask("mytask", 1, "new")])
    assert [line.prompt for line in read_records(tmp_path)] == ["new"]
    assert "was cut off" in log[-1]
    with pytest.raises(FileNotFoundError, match="run with record="):
        read_records(tmp_path / "none")


def test_padding_requests_leave_no_line(engine: FakeEngine, tmp_path: Path) -> None:
    lm = model(engine, rows(2), record=str(tmp_path), batch_size=2)
    padding = ask("mytask", 1, "q1", __padding_only__=True)
    assert texts(lm.generate_until([ask("mytask", 1, "q1"), padding])) == ["q1|1", "q1|1"]
    assert len(read_records(tmp_path)) == 1


def test_losses_are_recorded(engine: FakeEngine, tmp_path: Path) -> None:
    lm = model(engine, rows(2), record=str(tmp_path))
    lm.loglikelihood([ask("mytask", 0, "?", " A", "loglikelihood")])
    (line,) = read_records(tmp_path)
    assert (line.continuation, line.loss, line.greedy) == (" A", 2.0, True)


def test_record_stands_beside_lmms_eval_s_output(engine: FakeEngine, tmp_path: Path) -> None:
    class Task:
        args = type("Args", (), {"output_path": str(tmp_path)})()

        def doc_to_visual(self, row: Any) -> Any:
            return visual(row)

        def aggregation(self) -> dict[str, Any]:
            return {"submission": None}

    def asked_by_a_task() -> Instance:
        request = ask("mytask", 0, "?")
        prompt, extra, _, *rest = request.args
        request.arguments = (prompt, extra, Task().doc_to_visual, *rest)
        return request

    model(engine, rows(1)).generate_until([asked_by_a_task()])
    assert len(read_records(tmp_path / "sdrpn_record")) == 1
    model(engine, rows(1), record="none").generate_until([asked_by_a_task()])
    assert len(list((tmp_path / "sdrpn_record").glob("run_facts_*"))) == 1


# A line


def line(doc_id: int = 0, **more: Any) -> RecordLine:
    return RecordLine.model_validate(record_line(doc_id, "red", **more))


def test_a_map_is_written_with_8_bits_a_cell() -> None:
    """0.5 of 255 is 127.5, rounded to the even 128; what is out of [0, 1] is clipped."""
    cells = base64.b64encode(bytes([0, 128, 255, 255, 51, 0])).decode()
    found = encode_map(np.array([[0.0, 0.5, 1.0], [1.2345678, 0.2, -0.3]]))
    assert found == {"map": cells, "grid": (2, 3), "map_max": 1.234568}
    assert encode_map(None) == {"map": None, "grid": None, "map_max": None}


def test_a_map_is_read_back() -> None:
    cells = base64.b64encode(bytes([0, 51, 255, 102])).decode()
    found = line(map=cells, grid=[2, 2]).roi_map
    assert found is not None
    assert found.dtype == np.float32
    assert found.tolist() == np.array([[0, 0.2], [1, 0.4]], np.float32).tolist()
    assert line(map=None, grid=[2, 2]).roi_map is None
    assert line(map=None, grid=None).roi_map is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": [[5, 0, 5, 9]]}, "the region [5, 0, 5, 9] is empty, or of no image"),
        ({"regions": [[0, 5, 9, 5]]}, "the region [0, 5, 9, 5] is empty, or of no image"),
        ({"regions": [[0, 0, 1, 1], [-1, 0, 5, 9]]}, "the region [-1, 0, 5, 9] is empty"),
        ({"regions": [[0, -1, 5, 9]]}, "the region [0, -1, 5, 9] is empty"),
        ({"images": []}, "the region [0, 0, 50, 50] is empty, or of no image"),
        ({"map": "no!"}, "its map is not in base64"),
        ({"map": "AA==\n"}, "its map is not in base64"),
        ({"grid": [2, 5]}, "its map has 5 cells, its grid is (2, 5)"),
        ({"map": "AA=="}, "its map has 1 cell, its grid is (1, 5)"),
        ({"grid": None}, "its map has 5 cells, its grid is None"),
        ({"images": [{"hash": "h", "size": [0, 5]}]}, "greater than 0"),
        ({"seconds": -1}, "greater than or equal to 0"),
        ({"seconds": float("nan")}, "finite number"),
    ],
)
def test_a_line_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        line(**change)


def test_what_follows_from_a_line() -> None:
    """Two boxes of 50 x 50 and 20 x 100 on 100 x 200, which share 10 x 50 pixels."""
    images = [{"hash": "a", "size": [100, 200]}, {"hash": "b", "size": [7, 9]}]
    found = line(images=images, regions=[[0, 0, 50, 50], [40, 0, 60, 100]])
    assert found.images == ("a", "b")
    assert found.size == (100, 200)
    assert found.share == pytest.approx((2500 + 2000 - 500) / 20000)
    assert not found.is_loss
    assert line(greedy=False).is_loss
    assert line(regions=[]).share is None
    none = line(images=[], regions=[])
    assert (none.images, none.size, none.share) == ((), None, None)


def test_a_line_is_written_as_it_was_given() -> None:
    """Under the names of the file, and without fields that nobody set."""
    given = record_line(3, "red", **{"from": "earlier", "of_a_later_version": [1]})
    found = RecordLine.model_validate(given)
    assert (found.origin, found.reason, found.heat) == ("earlier", None, "AAAAgP8=")
    assert found.as_dict() == given
    assert json.loads(found.as_json()) == given
    assert json.loads(line(loss=float("inf")).as_json())["loss"] is None


# Files


def test_lines_stand_in_a_file_for_each_task_and_process(tmp_path: Path, log: list[str]) -> None:
    writer = RecordWriter(tmp_path / "a" / "b", 3)
    folder = tmp_path / "a" / "b"
    writer.append([line(1, task="x y"), line(0, task="z"), line(0, task="x y")])
    RecordWriter(str(folder), 0).append([line(0, task="x_y"), line(5, task="z")])
    names = ["record_x_y_rank0.jsonl", "record_x_y_rank3.jsonl"]
    names += ["record_z_rank0.jsonl", "record_z_rank3.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [one.doc_id for one in lines_of(folder, "x y")] == [1, 0]
    assert [one.doc_id for one in lines_of(folder, "x_y")] == [0]
    assert [one.doc_id for one in lines_of(folder, "z")] == [5, 0]
    assert list(lines_of(folder, "x")) == []
    found = [(one.task, one.doc_id) for one in read_all_records(folder)]
    assert found == [("x y", 0), ("x y", 1), ("x_y", 0), ("z", 0), ("z", 5)]
    assert log == []


def test_the_latest_run_of_each_task(tmp_path: Path, log: list[str]) -> None:
    writer = RecordWriter(tmp_path, 0)
    late, early = ({"run": f"20260{month}01T120001.000000Z"} for month in (3, 2))
    writer.append([line(1, **late), line(0, **early), line(2, **late)])
    writer.append([line(4, task="other", **early)])
    with (tmp_path / "record_toy_rank0.jsonl").open("ab") as file:
        file.write(b"\n{\r\xff}\n")  # an empty line, and one of a carriage return and no UTF-8
    assert [(one.task, one.doc_id) for one in read_records(tmp_path)] == [
        ("other", 4),
        ("toy", 1),
        ("toy", 2),
    ]
    path = tmp_path / "record_toy_rank0.jsonl"
    (told,) = log
    assert told.endswith(f"{path}, line 5, was cut off or is damaged, and is left out")
    assert [one.doc_id for one in lines_of(tmp_path, "toy")] == [1, 0, 2]


def test_a_folder_where_no_record_can_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "r"
    said = rf"^the record's folder {re.escape(str(place))} cannot be written: .*; give another one,"
    with pytest.raises(OSError, match=said + " record=FOLDER, or record=none$"):
        check_writable(place)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder without files")
def test_a_folder_that_takes_no_file_is_not_writable() -> None:
    with pytest.raises(OSError, match=r"^the record's folder /proc/self cannot be written: "):
        check_writable(Path("/proc/self"))


def test_no_record_says_how_to_have_one(tmp_path: Path) -> None:
    told = f"no record_*_rank*.jsonl in {tmp_path}; run with record={tmp_path}"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(told)}$"):
        read_all_records(tmp_path)
