"""The record as a journal: what a second run asks again, and what it takes from the first."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import unwrap_generation_output

from sdrpn.config import ZoomConfig
from sdrpn_eval import journal, run_record
from sdrpn_eval import model as plugin_model
from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.model import LlavaSdrpn
from sdrpn_eval.provenance.collect import Collector
from sdrpn_eval.record import read_records
from sdrpn_eval.request_types import GenerateUntil
from sdrpn_eval.requests import Request
from tests.helpers.asking_by_hand import ask, image, logged, model, rows, texts, visual
from tests.helpers.fake_engine import FakeEngine

N = 9

FOUND = "in the record of an earlier run, of the same weights, settings and prompts, and not asked "
FOUND += "again; resume=false asks all anew"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that stand for the stand-in engine's weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    found = {"pretrained": str(folder), "rpn": None, "peft": None}
    monkeypatch.setattr(run_record, "sources", lambda arguments: found)
    return folder


def requests(n: int = N, **more: Any) -> list[Any]:
    return [ask("mytask", i, f"q{i}", **more) for i in range(n)]


def asked(engine: FakeEngine) -> list[str]:
    return sorted(q.text for batch in engine.batches for q in batch)


def run(record: Path, questions: list[Any] | None = None, **more: Any) -> tuple[list[str], Any]:
    """Ask all: the questions that reached the engine, and the answers."""
    engine = FakeEngine(more.pop("say", lambda q: f"{q.text}!"))
    docs = more.pop("docs", rows(N))
    lm = model(engine, docs, record=record, **more)
    questions = requests() if questions is None else questions
    answers = getattr(lm, questions[0].request_type)(questions)
    return asked(engine), answers


def killed(record: Path, after: int, **more: Any) -> None:
    """A run that ends after some batches as Ctrl-C ends one, which nothing in it catches."""
    engine = FakeEngine()
    answer = engine.ask_batch

    def interrupted(questions: Any, generation: Any = None) -> Any:
        if len(engine.batches) == after:
            raise KeyboardInterrupt
        return answer(questions, generation=generation)

    engine.ask_batch = interrupted  # type: ignore[method-assign]
    lm = model(engine, rows(N), record=record, batch_size=2)
    lm._record.rank = more.get("rank", 0)
    with pytest.raises(KeyboardInterrupt):
        lm.generate_until(more.get("requests") or requests())


# Going on


def test_a_second_run_asks_the_rest_and_its_record_is_whole(weights: Path, tmp_path: Path) -> None:
    killed(tmp_path / "r", after=2)
    first = read_records(tmp_path / "r")
    assert len(first) == 4
    with logged() as log:
        new, answers = run(tmp_path / "r", say=lambda q: f"{q.text}|1", batch_size=3)
    done = {line.prompt for line in first}
    assert new == sorted({f"q{i}" for i in range(N)} - done)
    assert texts(answers) == [f"q{i}|1" for i in range(N)]
    assert log.count(f"4 of 9 answers stand {FOUND}") == 1
    lines = read_records(tmp_path / "r")
    assert [line.doc_id for line in lines] == list(range(N))
    assert {line.run for line in lines}.isdisjoint({line.run for line in first})
    for old in first:
        (line,) = [line for line in lines if line.doc_id == old.doc_id]
        assert line.as_dict() == {
            **old.as_dict(),
            "run": line.run,
            "from": old.run,
            "resumed": True,
        }
    assert sum(line.resumed for line in lines) == 4


def test_a_run_killed_twice_names_the_first_that_asked(weights: Path, tmp_path: Path) -> None:
    killed(tmp_path / "r", after=1)
    (run_name,) = {line.run for line in read_records(tmp_path / "r")}
    killed(tmp_path / "r", after=1)
    assert len(read_records(tmp_path / "r")) == 4
    new, _ = run(tmp_path / "r")
    assert len(new) == N - 4
    origins = [line.origin for line in read_records(tmp_path / "r")]
    assert origins.count(run_name) == 2
    assert len(set(origins) - {None}) == 2


def test_all_answered_nothing_asked(weights: Path, tmp_path: Path) -> None:
    first, answers = run(tmp_path / "r")
    assert len(first) == N
    again, same = run(tmp_path / "r")
    assert again == []
    assert [unwrap_generation_output(a) for a in same] == [
        unwrap_generation_output(a) for a in answers
    ]


def test_resume_false_asks_all_anew_for_a_later_run_to_find(weights: Path, tmp_path: Path) -> None:
    run(tmp_path / "r")
    new, answers = run(tmp_path / "r", say=lambda q: "anew", resume=False)
    assert len(new) == N
    assert set(texts(answers)) == {"anew"}
    assert not any(line.resumed for line in read_records(tmp_path / "r"))
    assert set(texts(run(tmp_path / "r")[1])) == {"anew"}, "the later run's answers count"


def test_shares_of_other_processes_are_found(weights: Path, tmp_path: Path) -> None:
    """Two processes killed; one, and then three with other shares, go on."""
    killed(tmp_path / "r", after=1, rank=0, requests=requests()[0::2])
    killed(tmp_path / "r", after=1, rank=1, requests=requests()[1::2])
    new, _ = run(tmp_path / "r")
    assert len(new) == N - 4
    for rank in range(3):
        engine = FakeEngine()
        lm = model(engine, rows(N), record=tmp_path / "r")
        lm._record.rank = rank
        lm.generate_until(requests()[rank::3])
        assert engine.batches == []


def test_one_answer_that_stands_is_told_as_one(weights: Path, tmp_path: Path) -> None:
    run(tmp_path / "r", requests(1))
    with logged() as log:
        run(tmp_path / "r", requests(2))
        run(tmp_path / "r", requests(1))
    assert [line for line in log if FOUND in line] == [
        f"1 of 2 answers stands {FOUND}",
        f"1 of 1 answer stands {FOUND}",
    ]


def test_a_line_cut_off_is_asked_again(weights: Path, tmp_path: Path) -> None:
    run(tmp_path / "r")
    path = tmp_path / "r" / "record_mytask_rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    cut = json.loads(path.read_text().splitlines()[-2])
    with logged() as log:
        new, _ = run(tmp_path / "r")
    assert len(new) == 1
    assert new != [cut["prompt"]]
    assert not any("cut off" in line for line in log)
    assert len(read_records(tmp_path / "r")) == N


def test_losses_are_found_exactly(weights: Path, tmp_path: Path) -> None:
    options = [
        ask("mytask", i, "?", text, "loglikelihood") for i in range(2) for text in (" A", " dog")
    ]
    first, losses = run(tmp_path / "r", options)
    assert len(first) == 4
    other = ask("mytask", 0, "?", " cat", "loglikelihood")
    again, same = run(tmp_path / "r", [*options, other])
    assert len(again) == 1
    assert [r.text for r in same[:4]] == [r.text for r in losses]
    # The same document and prompt, asked in words, is another question.
    assert len(run(tmp_path / "r", [ask("mytask", 0, "?")])[0]) == 1


def test_repeats_and_padding(weights: Path, tmp_path: Path) -> None:
    once = ask("mytask", 1, "q1")
    padding = ask("mytask", 1, "q1", __padding_only__=True)
    run(tmp_path / "r", [once, once, padding])
    new, answers = run(tmp_path / "r", [once, once, padding])
    assert (new, len(answers)) == ([], 3)
    assert len(read_records(tmp_path / "r")) == 2


def test_images_of_answered_questions_are_not_decoded(weights: Path, tmp_path: Path) -> None:
    shown: list[int] = []

    def watched(row: Any) -> Any:
        shown.append(row["question"])
        return visual(row)

    run(tmp_path / "r", requests(4, doc_to_visual=watched))
    shown.clear()
    run(tmp_path / "r", requests(5, doc_to_visual=watched))
    assert set(shown) == {"q4"}


# What makes it another question


def _other_file(name: str, content: str) -> Callable[..., dict[str, Any]]:
    def change(weights: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        (weights / name).write_text(content)
        return {}

    return change


def _other_code(weights: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(journal, "source_digest", lambda: "mended")
    return {}


def _other_version(weights: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(journal, "versions", lambda: {"torch": "9"})
    return {}


def _given(**more: Any) -> Callable[..., dict[str, Any]]:
    return lambda weights, monkeypatch: more


def _other_image(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"image": image(200)}


@pytest.mark.parametrize(
    "change",
    [
        _other_file("model.safetensors", "retrained"),
        _other_file("config.json", '{"a": 1}'),
        _other_file("more.safetensors", "another shard"),
        _other_code,
        _other_version,
        _given(threshold=0.3),
        _given(policy="mask"),
        _given(token_budget=2),
        _given(threshold="peak"),
        _given(gate=0.9),
        _given(learned_gate=0.4),
        _given(crop_tokens=64),
        _given(tiles=2),
        _given(keep_tokens=9),
        _given(questions=requests(extra={"max_new_tokens": 5})),
        _given(questions=requests(extra={"max_new_tokens": 4, "until": ["."]})),
        _given(questions=[ask("mytask", i, f"Q{i}") for i in range(N)]),
        _given(questions=[ask("textvqa_val", i, f"q{i}") for i in range(N)]),
        _given(questions=[ask("mytask", (i + 1) % N, f"q{i}") for i in range(N)]),
        _given(questions=requests(doc_to_visual=lambda row: [row["image"].rotate(90)])),
        _given(docs=[_other_image(row) for row in rows(N)]),
        _given(docs=[row | {"box": [0, 0, 1, 1]} for row in rows(N)]),
    ],
)
def test_what_changes_an_answer_is_asked_anew(
    change: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "r")
    new, _ = run(tmp_path / "r", **change(weights, monkeypatch))
    assert len(new) == N


@pytest.mark.parametrize(
    "more",
    [
        {"batch_size": 4},
        {"batch_size": "auto"},
        {"on_error": "empty"},
        {"questions": requests(extra={"temperature": 0, "until": [], "max_new_tokens": 4.0})},
        {"questions": requests()[::-1]},
    ],
)
def test_what_changes_none_is_not(weights: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    run(tmp_path / "r")
    assert run(tmp_path / "r", **more)[0] == []


CHANGES_ANSWERS = {
    "proposer": ("rpn", "attention"),
    "padding": ("pad", "crop"),
    "system_prompt": (None, "Be brief."),
    "attn_implementation": (None, "eager"),
    "load_in_4bit": (False, True),
}
"""Arguments that an answer depends on and that neither files nor a ZoomConfig show."""
ZOOM = {
    "threshold": 0.31,
    "policy": "bbox",
    "min_cells": 3,
    "max_cells_fraction": 0.5,
    "token_budget": 2.5,
    "crop_tokens": 64,
    "tiles": 2,
    "gate": 0.9,
    "learned_gate": 0.4,
    "keep_tokens": 128,
    "skip_above": 0.7,
    "thin_above": 512,
}
IN_FILES = {"pretrained", "revision", "rpn", "rpn_revision", "peft"}
IN_ZOOM = {"threshold", "policy", "token_budget", "skip_above", "crop_tokens", "tiles"}
IN_ZOOM |= {"gate", "learned_gate", "keep_tokens"}
CHANGES_NONE = {"device", "device_map", "prefix_cache", "record", "resume", "on_error"}
CHANGES_NONE |= {"batch_size"}
RESOLVED = {"preset", "zoom", "dtype"}
"""A preset and a file of zoom settings into the others; the model's own dtype is in the key."""


def key(
    tmp_path: Path,
    arguments: dict[str, Any] | None = None,
    zoom: dict[str, Any] | None = None,
    dtype: str = "torch.float32",
    hashes: dict[str, str] | None = None,
    uses: tuple[str, ...] = ("pretrained",),
    document: int = 5,
    request: dict[str, Any] | None = None,
) -> str | None:
    """The key of a request under some settings."""
    given = {name: first for name, (first, _) in CHANGES_ANSWERS.items()} | (arguments or {})
    known: Future[dict[str, str]] = Future()
    known.set_result({"pretrained/model.safetensors": "a"} if hashes is None else hashes)
    facts = Collector(tmp_path, "run", 0, 1, given, known, torch.device("cpu"))
    facts.documents["mytask"] = {0: document, 1: document}
    facts.documents["other"] = {0: document}
    made = journal.Journal(facts, uses, dtype)
    asked = {"task": "mytask", "doc_id": 0, "prompt": "q", "extra": {"max_new_tokens": 4}}
    asked |= {"split": "test", "doc_to_visual": visual} | (request or {})
    one = Request(index=0, padding_only=False, **asked)
    return made.key(one, GenerateUntil([one]), ZoomConfig(**(zoom or {})))


def test_every_argument_is_known_to_change_an_answer_or_not() -> None:
    """A new argument needs its place in one of these."""
    known = {*CHANGES_ANSWERS} | IN_FILES | IN_ZOOM | CHANGES_NONE | RESOLVED
    assert known == set(LlavaArguments.model_fields)
    assert set(ZOOM) == {field.name for field in fields(ZoomConfig)}


@pytest.mark.parametrize("name", CHANGES_ANSWERS)
def test_a_key_moves_with_every_argument_that_changes_answers(name: str, tmp_path: Path) -> None:
    assert key(tmp_path) == key(tmp_path)
    assert key(tmp_path, {name: CHANGES_ANSWERS[name][1]}) != key(tmp_path)


@pytest.mark.parametrize("name", ZOOM)
def test_a_key_moves_with_every_setting_of_the_zoom(name: str, tmp_path: Path) -> None:
    assert getattr(ZoomConfig(), name) != ZOOM[name]
    assert key(tmp_path, zoom={name: ZOOM[name]}) != key(tmp_path)


@pytest.mark.parametrize("name", sorted(CHANGES_NONE))
def test_a_key_stays_with_arguments_that_change_none(name: str, tmp_path: Path) -> None:
    assert key(tmp_path, {name: "changed"}) == key(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "torch.float16"},
        {"hashes": {"pretrained/model.safetensors": "b"}},
        {"hashes": {"pretrained/model.safetensors": "a", "pretrained/config.json": "c"}},
        {"document": 6},
        {"request": {"task": "other"}},
        {"request": {"split": "val"}},
        {"request": {"doc_id": 1}},
        {"request": {"prompt": "Q"}},
        {"request": {"extra": {"max_new_tokens": 5}}},
        {"request": {"extra": {"max_new_tokens": 4, "until": ["."]}}},
        {"request": {"extra": {"max_new_tokens": 4, "num_beams": 2}}},
        {"request": {"doc_to_visual": lambda row: []}},
    ],
    ids=lambda change: re.sub(r" at 0x\w+", "", str(change)),  # the same in every process
)
def test_a_key_moves_with_weights_document_and_question(
    change: dict[str, Any], tmp_path: Path
) -> None:
    moved = key(tmp_path, **change)
    assert moved is not None
    assert moved != key(tmp_path)
    assert re.fullmatch("[0-9a-f]{32}", moved)


def test_a_key_stays_with_the_order_of_files_and_of_settings(tmp_path: Path) -> None:
    files = {"pretrained/model.safetensors": "a", "pretrained/config.json": "c"}
    backwards = dict(reversed(files.items()))
    assert [*files] != [*backwards]
    assert key(tmp_path, hashes=files) == key(tmp_path, hashes=backwards)


def test_a_key_takes_settings_that_json_does_not_know(tmp_path: Path) -> None:
    one, other = (key(tmp_path, {"system_prompt": Path(name)}) for name in ("a.txt", "b.txt"))
    assert one == key(tmp_path, {"system_prompt": "a.txt"})
    assert one != other


def test_a_key_moves_with_the_kind_of_request(tmp_path: Path, monkeypatch: Any) -> None:
    before = key(tmp_path)
    monkeypatch.setattr(GenerateUntil, "name", "loglikelihood")
    assert key(tmp_path) != before


def test_there_is_no_key_where_the_answer_is_not_determined(tmp_path: Path) -> None:
    assert key(tmp_path, uses=()) is None
    assert key(tmp_path, uses=("pretrained", "rpn")) is None  # whose files were not found
    assert key(tmp_path, hashes={"pretrained/config.json": "c"}) is None  # no weights
    assert key(tmp_path, request={"extra": {"do_sample": True}}) is None
    both = {"pretrained/model.safetensors": "a", "rpn/rpn.safetensors": "b"}
    assert key(tmp_path, hashes=both, uses=("pretrained", "rpn")) is not None


def test_what_is_left_to_chance_is_asked_each_time(weights: Path, tmp_path: Path) -> None:
    sampled = requests(extra={"max_new_tokens": 4, "temperature": 0.7})
    for _ in range(2):
        assert len(run(tmp_path / "r", sampled)[0]) == N


def test_a_model_in_memory_has_no_weights_to_know_it_by(tmp_path: Path) -> None:
    for _ in range(2):
        assert len(run(tmp_path / "r")[0]) == N
    assert {line.key for line in read_records(tmp_path / "r")} == {None}


def test_weights_that_are_not_found_are_not_taken_for_known(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"pretrained": str(weights), "rpn": "nobody/no-such-rpn", "peft": None}
    monkeypatch.setattr(run_record, "sources", lambda arguments: found)
    for _ in range(2):
        assert len(run(tmp_path / "r")[0]) == N


# The hashes of the weights, the folder


def test_weights_are_hashed_beside_the_first_batch(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes: Future[dict[str, str]] = Future()
    monkeypatch.setattr(run_record, "hash_in_background", lambda *_: hashes)

    def say(question: Any) -> str:
        if not hashes.done():
            hashes.set_result({"pretrained/model.safetensors": "a"})
        return "yes"

    run(tmp_path / "r", say=say)
    (facts,) = (tmp_path / "r").glob("run_facts_*.json")
    assert json.loads(facts.read_text())["weights"] == {"pretrained/model.safetensors": "a"}


def test_a_folder_that_cannot_be_written_is_told_before_the_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_model, "load_engine", None)  # must not be needed
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"record's folder .*file/record cannot be written.*record="):
        LlavaSdrpn(pretrained="tiny", record=tmp_path / "file" / "record")
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--output_path", str(tmp_path / "file")])
    with pytest.raises(OSError, match=r"file/sdrpn_record cannot be written"):
        LlavaSdrpn(pretrained="tiny")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_what_was_written_stays(weights: Path, tmp_path: Path) -> None:
    record = tmp_path / "r"
    run(record, requests(4))
    path = record / "record_mytask_rank0.jsonl"
    kept = path.read_bytes()
    path.rename(record / "record_mytask_rank1.jsonl")
    path.symlink_to("/dev/full")
    # Not resumed: such a device can be read for ever.
    lm = model(FakeEngine(), rows(N), record=record, on_error="empty", resume=False)
    with pytest.raises(OSError, match=r"record_mytask_rank0.jsonl cannot be written: .*No space"):
        lm.generate_until(requests())
    assert (record / "record_mytask_rank1.jsonl").read_bytes() == kept
    path.unlink()
    assert len(run(record)[0]) == N - 4


def test_use_cache_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--use_cache", "x"], ["--use_cache=x"]):
        monkeypatch.setattr(sys, "argv", ["lmms-eval", *words])
        with pytest.raises(ValueError, match="a retrained RPN in the same folder would get"):
            LlavaSdrpn(pretrained=FakeEngine())
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])

    class Task:
        args = type("Args", (), {"use_cache": os.devnull, "output_path": None})()

        def doc_to_visual(self, row: Any) -> Any:
            return visual(row)

    lm = model(FakeEngine(), rows(1))
    with pytest.raises(ValueError, match="does not work with --use_cache"):
        lm.generate_until([ask("mytask", 0, "?", doc_to_visual=Task().doc_to_visual)])
