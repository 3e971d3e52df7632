"""The record: lines as batches finish, maps, runs in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.instance import Instance

from sdrpn_eval.record import LINE, RecordLine, encode_map, read_records
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
