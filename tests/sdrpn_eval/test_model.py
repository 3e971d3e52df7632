"""The lmms-eval model: batches, answers, losses, what is said, with a stand-in engine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.instance import unwrap_generation_output
from lmms_eval.caching.response_cache import ResponseCache

from sdrpn.config import ZoomConfig
from sdrpn_eval import tasks_info
from sdrpn_eval.on_error import BadDocument
from sdrpn_eval.requests import Documents, batches, parse
from tests.helpers.asking_by_hand import ask, image, logged, model, rows, texts
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def log() -> Any:
    with logged() as lines:
        yield lines


# Answers


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(9)), batch_size=st.integers(1, 5))
def test_answers_come_back_in_the_order_asked(order: list[int], batch_size: int) -> None:
    engine = FakeEngine()
    lm = model(engine, rows(9, per_image=3), batch_size=str(batch_size))
    requests = [ask("mytask", i, f"question {i}" + "x" * i) for i in order]
    expected = [f"question {i}{'x' * i}|1" for i in order]
    assert texts(lm.generate_until(requests)) == expected
    assert max(len(b) for b in engine.batches) <= batch_size
    shades = [q.images[0].getpixel((0, 0))[0] for b in engine.batches for q in b]
    changes = sum(a != b for a, b in itertools.pairwise(shades))
    assert changes == 2, "questions on one image stand next to each other"


def test_images_are_grouped_undecoded_where_they_are_stored(monkeypatch: Any) -> None:
    features = Features({"image": ImageColumn(), "question": Value("string")})
    docs = Dataset.from_list([{k: r[k] for k in features} for r in rows(4)], features=features)
    documents = Documents({"t": {"test": docs}})
    monkeypatch.setattr(Documents, "visuals", None)  # must not be needed
    requests = parse([ask("t", i, "?") for i in (0, 2, 1, 3)])
    (batch,) = batches(requests, 8, documents)
    assert {frozenset(r.doc_id for r in batch[i : i + 2]) for i in (0, 2)} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


def test_other_generation_kwargs_make_another_batch(engine: FakeEngine) -> None:
    lm = model(engine, rows(4), batch_size=4)
    kwargs = [{"max_new_tokens": 4}, {"max_new_tokens": 8}] * 2
    lm.generate_until([ask("mytask", i, "?", kwargs[i]) for i in range(4)])
    assert sorted(g["max_new_tokens"] for g in engine.generations) == [4, 8]


def test_requests_are_left_as_they_were(engine: FakeEngine) -> None:
    request = ask("mytask", 0, "?", {"until": ["\n\n"], "max_new_tokens": 4, "temperature": 0.0})
    before = json.dumps(request.args[1])
    model(engine, rows(1)).generate_until([request])
    assert json.dumps(request.args[1]) == before


def test_placeholders_go_and_text_only_questions_are_asked(engine: FakeEngine) -> None:
    docs = [*rows(2), {"image": None}]
    lm = model(engine, docs)
    prompts = ["<image>\nWhat?", "What is in <image> here?", "No image?"]
    requests = [ask("mytask", i, prompt) for i, prompt in enumerate(prompts)]
    assert texts(lm.generate_until(requests)) == ["What?|1", "What is in  here?|1", "No image?|0"]


def test_video_is_refused_by_name(engine: FakeEngine) -> None:
    lm = model(engine, [{"image": "film.mp4"}])
    with pytest.raises(BadDocument, match="document 0 of mytask gives a str"):
        lm.generate_until([ask("mytask", 0, "?")])


def test_several_rounds_are_refused(engine: FakeEngine) -> None:
    with pytest.raises(NotImplementedError, match="several rounds"):
        model(engine, []).generate_until_multi_round([])


def test_no_requests_no_answers(engine: FakeEngine) -> None:
    assert model(engine, []).generate_until([]) == []


def test_token_counts_are_returned(engine: FakeEngine) -> None:
    (result,) = model(engine, rows(1)).generate_until([ask("mytask", 0, "?")])
    text, counts = unwrap_generation_output(result)
    assert (text, counts.input_tokens, counts.output_tokens) == ("?|1", 78, 2)


def test_boxes_come_from_the_documents(engine: FakeEngine) -> None:
    model(engine, rows(1), proposer="box").generate_until([ask("mytask", 0, "?")])
    assert engine.batches[0][0].box == (1, 1, 4, 4)
    lm = model(engine, [{"image": image(1)}], proposer="box")
    with pytest.raises(BadDocument, match="mytask has none"):
        lm.generate_until([ask("mytask", 0, "?")])


# Losses


def test_losses_survive_lmms_eval_and_its_cache(engine: FakeEngine, tmp_path: Path) -> None:
    lm = model(engine, rows(2), batch_size=2)
    requests = [ask("mytask", 0, "?", c, "loglikelihood") for c in (" A", " dog")]
    cache = ResponseCache(str(tmp_path / "c.db"), str(tmp_path / "c.jsonl"))
    for _ in range(2):
        results = cache.execute(lm, "loglikelihood", requests)
        assert [unwrap_generation_output(r)[0] for r in results] == [(2.0, True), (4.0, False)]


def test_a_continuation_may_be_a_function_of_the_document(engine: FakeEngine) -> None:
    lm = model(engine, rows(2))
    request = ask("mytask", 1, "?", lambda row: row["question"] + "!", "loglikelihood")
    assert lm.loglikelihood([request])[0].text == (3.0, False)


# What is said


def test_thresholds_follow_the_task_and_are_said_once(engine: FakeEngine, log: list[str]) -> None:
    lm = model(engine, rows(2))
    for _ in range(2):
        lm.generate_until([ask("textvqa_val", 0, "?"), ask("mytask", 0, "?")])
    assert [line for line in log if line.startswith("Thresholds")] == [
        "Thresholds: textvqa_val 0.15 (as published for textvqa), "
        "mytask 0.15 (as none is published for it)"
    ]


@pytest.mark.parametrize(
    ("task", "proposer", "threshold", "origin"),
    [
        ("tiny_vstar", "rpn", "peak", "chosen on the embedded model"),
        ("ocrbench_v2", "rpn", 0.15, "as none is published for it"),
        ("ocrbench_public", "rpn", 0.05, "as published for ocrbench"),
        ("docvqa_val", "attention", 0.1, "as published for docvqa, of the RPN"),
    ],
)
def test_only_what_was_published_is_called_so(
    task: str, proposer: str, threshold: float, origin: str
) -> None:
    assert tasks_info.threshold_of(task) == threshold
    assert tasks_info.threshold_origin(task, proposer) == origin


def test_scored_tasks_are_named_once(engine: FakeEngine, log: list[str]) -> None:
    lm = model(engine, rows(2))
    for _ in range(2):
        lm.generate_until([ask("mytask", 0, "?")])
    assert log.count("Tasks with a score: mytask.") == 1


def test_none_leaves_an_engine_s_own_settings(engine: FakeEngine) -> None:
    lm = model(engine, rows(2), policy="None", threshold="None")
    lm.generate_until([ask("mytask", 0, "?")])
    assert engine.batches[0][0].zoom == ZoomConfig(threshold=0.15, policy="strongest")
