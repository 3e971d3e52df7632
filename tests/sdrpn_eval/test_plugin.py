"""The lmms-eval model: arguments, batches, answers, losses, the record, with a stand-in engine."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.caching.response_cache import ResponseCache

from sdrpn.config import ZoomConfig
from sdrpn_eval import arguments, generation, loading, tasks_info
from sdrpn_eval.asking import BadDocument
from sdrpn_eval.llava_sdrpn import LlavaSdrpn
from sdrpn_eval.plugin import add_tasks, register
from sdrpn_eval.questions import Documents, ahead, batches, parse
from sdrpn_eval.record import decode_map, encode_map, read_records
from tests.helpers.asking_by_hand import ask, image, logged, model, rows, texts, visual
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def log() -> Any:
    with logged() as lines:
        yield lines


# Registration


def test_entry_point_gives_the_model_and_its_class() -> None:
    from lmms_eval.models import get_model

    assert get_model("llava_sdrpn") is LlavaSdrpn


def test_a_changed_lmms_eval_is_survived(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    from lmms_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "initialize_tasks", lambda self: {})
    assert register().model_id == "llava_sdrpn"
    assert "give --include_path" in log[-1]
    monkeypatch.delattr(TaskManager, "initialize_tasks")
    add_tasks()
    assert "could not add its tasks" in log[-1]


def test_the_hook_is_put_on_once() -> None:
    from lmms_eval.tasks import TaskManager

    add_tasks()
    hooked = TaskManager.initialize_tasks
    add_tasks()
    assert TaskManager.initialize_tasks is hooked


# Arguments


def test_unknown_and_ill_typed_arguments_make_one_error_with_the_list() -> None:
    with pytest.raises(ValueError, match="unknown treshold") as error:
        arguments.checked({"treshold": 0.1, "policy": "box", "batch_size": "many", "padding": 3})
    text = str(error.value)
    assert "policy must be one of mask, bbox, strongest, got 'box'" in text
    assert "batch_size must be a whole number of 1 or more, or auto, got 'many'" in text
    assert "padding must be one of pad, crop, got 3" in text
    for name in arguments.ARGUMENTS:
        assert f"\n  {name}: " in text


def test_the_sentence_stands_last_and_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown treshold") as error:
        arguments.checked({"treshold": 0.1, "policy": "box"})
    assert str(error.value).splitlines()[-1] == (
        "llava_sdrpn: unknown treshold, did you mean threshold?; policy must be one of mask, bbox, "
        "strongest, got 'box'"
    )
    with pytest.raises(ValueError, match="dtype") as error:
        arguments.checked({"dtype": "torch.int8"})
    assert str(error.value) == (
        "llava_sdrpn: dtype must be one of auto, float32, bfloat16, float16, got 'torch.int8'"
    )


def test_none_beside_a_preset() -> None:
    """It switches off what can be off, and of all else says nothing."""
    values = arguments.checked({"preset": "fast", "token_budget": "None", "policy": "None"})
    assert values["token_budget"] is None
    assert (values["max_crop_tokens"], values["proposer"]) == (64, "rpn")


def test_none_leaves_an_engine_s_own_settings(engine: FakeEngine) -> None:
    lm = model(engine, rows(2), policy="None", threshold="None")
    lm.generate_until([ask("mytask", 0, "?")])
    assert engine.batches[0][0].zoom == ZoomConfig(threshold=0.15, policy="strongest")


def test_llava_hf_arguments_are_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"unknown chat_template \(the prompt is LLaVA-1.5's own"):
        arguments.checked({"chat_template": "vicuna"})


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("batch_size", "4", 4),
        ("batch_size", 4, 4),
        ("batch_size", "auto", "auto"),
        ("batch_size", "auto:2", "auto"),
        ("prefix_cache", "4GB", 4 * 2**30),
        ("prefix_cache", "512MiB", 2**29),
        ("prefix_cache", 1000, 1000),
        ("prefix_cache", "none", 0),
        ("token_budget", 2, 2.0),
        ("token_budget", "none", None),
        ("revision", 1234567, "1234567"),
        ("system_prompt", '"Look, then answer."', "Look, then answer."),
        ("system_prompt", "", ""),
        ("threshold", 0.3, 0.3),
        ("threshold", None, None),
        ("threshold", "None", None),
        ("threshold", "none", None),
        ("policy", "None", None),
        ("relative", "none", None),
        ("peft", "None", None),
        ("device", "none", None),
        ("resume", "None", True),
        ("batch_size", "none", 1),
        ("rpn", "None", None),
        ("token_budget", "None", None),
        ("skip_above", "None", None),
        ("max_crop_tokens", "none", None),
        ("proposer", "none", "none"),
        ("dtype", "torch.float16", "float16"),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("dtype", "float32", "float32"),
        ("rpn_revision", 1234567, "1234567"),
    ],
)
def test_values_as_the_command_line_brings_them(name: str, given: Any, value: Any) -> None:
    assert arguments.checked({name: given})[name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", 1.5), ("threshold", True), ("batch_size", 0), ("token_budget", 0)],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        arguments.checked({name: value})


def test_defaults_are_the_paper_s_system() -> None:
    values = arguments.checked({})
    assert values["pretrained"] == "llava-hf/llava-1.5-7b-hf"
    assert (values["proposer"], values["padding"], values["threshold"]) == ("rpn", "pad", None)


def test_a_preset_yields_to_what_is_given() -> None:
    assert arguments.checked({"preset": "paper"})["policy"] == "mask"
    assert arguments.checked({"preset": "paper", "policy": "bbox"})["policy"] == "bbox"


# Loading


def test_the_default_says_what_is_missing_and_names_tiny() -> None:
    rpn = "YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled"
    missing = f"pretrained=llava-hf/llava-1.5-7b-hf with rpn={rpn} cannot be loaded: {rpn} is no"
    with pytest.raises(ValueError, match=missing) as error:
        LlavaSdrpn(device="cpu")
    assert "pretrained=tiny" in str(error.value)


def test_missing_weights_are_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pretrained=tiny") as error:
        LlavaSdrpn(pretrained=str(tmp_path / "nothing"), proposer="none", device="cpu")
    assert f"there is no folder {tmp_path}/nothing" in str(error.value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="pretrained=tiny") as error:
        LlavaSdrpn(pretrained=str(tmp_path / "nothing"), proposer="none", device="cpu")
    assert f"pretrained={tmp_path}/nothing cannot be loaded" in str(error.value)


def test_a_model_without_an_rpn_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no RPN is known for pretrained={tmp_path}"):
        LlavaSdrpn(pretrained=str(tmp_path), device="cpu")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="got a dict"):
        LlavaSdrpn(pretrained={"a": 1})


def test_an_engine_in_memory_takes_no_loading_arguments(engine: FakeEngine) -> None:
    with pytest.raises(ValueError, match=r"dtype, rpn|rpn, dtype"):
        LlavaSdrpn(pretrained=engine, dtype="float32", rpn="somewhere")
    with pytest.raises(ValueError, match="proposer: set when"):
        LlavaSdrpn(pretrained=engine, proposer="none")


def test_settings_of_an_engine_in_memory_stay_its_own(engine: FakeEngine) -> None:
    lm = model(engine, rows(2), policy="bbox", threshold=0.4)
    lm.generate_until([ask("mytask", 0, "?")])
    assert engine.batches[0][0].zoom == ZoomConfig(threshold=0.4, policy="bbox")
    assert engine.zoom == ZoomConfig(policy="strongest")


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


# Generation kwargs


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False, "stop": []}),
        (
            {"until": "ASSISTANT:", "max_new_tokens": 16.0, "temperature": 0, "top_p": 1.0},
            {"max_new_tokens": 16, "do_sample": False, "stop": ["ASSISTANT:"]},
        ),
        (
            {"until": ["\n\n", ""], "temperature": 0.7, "top_p": 0.9, "num_beams": 1},
            {
                "max_new_tokens": 1024,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "num_beams": 1,
                "stop": ["\n\n"],
            },
        ),
        (
            {"do_sample": True, "top_p": None, "max_gen_toks": 7, "until": None},
            {"max_new_tokens": 7, "do_sample": True, "stop": []},
        ),
        (
            {"do_sample": True, "temperature": 0.0, "repetition_penalty": 1.2},
            {"max_new_tokens": 1024, "do_sample": False, "repetition_penalty": 1.2, "stop": []},
        ),
    ],
)
def test_generation_kwargs(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation.translate(given) == expected


def test_unknown_generation_kwargs_are_named(log: list[str]) -> None:
    assert "image_aspect_ratio" not in generation.translate({"image_aspect_ratio": "original"})
    assert log[-1].endswith("does not know: image_aspect_ratio")


def test_an_until_that_is_no_string_is_refused() -> None:
    with pytest.raises(ValueError, match="until must be a string or a list"):
        generation.translate({"until": 3})


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
        ("tiny_vstar", "rpn", 0.2, "chosen on the embedded model"),
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


# The record


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6))
def test_maps_are_kept_to_half_a_256th(values: list[float]) -> None:
    roi_map = np.array(values, dtype=np.float32).reshape(2, 3)
    line = json.loads(json.dumps(encode_map(roi_map)))
    assert np.abs(decode_map(line) - roi_map).max() <= 0.5 / 255 + 1e-6
    assert line["grid"] == [2, 3]
    assert line["map_max"] == pytest.approx(roi_map.max(), abs=1e-6)


def test_one_line_a_question(engine: FakeEngine, tmp_path: Path) -> None:
    lm = model(engine, [*rows(3), {"image": None}], record=str(tmp_path), batch_size=2)
    lm.generate_until([ask("textvqa_val", i, f"q{i}") for i in (3, 1, 0)])
    lines = read_records(tmp_path)
    assert [line["doc_id"] for line in lines] == [0, 1, 3]
    first, *_, last = lines
    assert first["task"] == "textvqa_val"
    assert first["split"] == "test"
    assert first["images"][0]["size"] == [8, 6]
    assert first["prompt"] == "q0"
    assert first["answer"] == "q0|1"
    assert first["regions"] == [[1, 2, 3, 4]]
    assert (first["policy"], first["threshold"]) == ("strongest", 0.15)
    assert first["tokens"] == {"image": 64, "crop": 9, "question": 5, "new": 2}
    assert first["no_zoom"] is None
    assert decode_map(first).shape == (8, 8)
    assert (last["no_zoom"], last["map"], last["images"]) == ("no image", None, [])
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
    assert [line["prompt"] for line in read_records(tmp_path)] == ["new"]
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
    assert (line["continuation"], line["loss"], line["greedy"]) == (" A", 2.0, True)


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


def test_engine_settings_with_a_preset(engine: FakeEngine) -> None:
    given = {"preset": "paper"}
    assert loading.zoom_settings(engine, arguments.checked(given), given).policy == "mask"


# Images ahead of time


def test_the_next_batch_is_made_while_this_one_is_answered() -> None:
    requests = parse([ask("mytask", i, "?") for i in range(6)])
    made: list[int] = []

    def make(request: Any) -> int:
        made.append(request.index)
        return request.index * 10

    groups = [requests[:2], requests[2:4], requests[4:]]
    seen = []
    for group, values in ahead(iter(groups), make):
        assert values == [r.index * 10 for r in group]
        deadline = time.monotonic() + 5
        while len(made) < min(len(seen) + 4, 6) and time.monotonic() < deadline:
            time.sleep(0.001)
        seen += values
        assert len(made) == min(len(seen) + 2, 6)  # this batch and the next, no further
    assert seen == [0, 10, 20, 30, 40, 50]
    assert list(ahead([], make)) == []


def test_an_error_in_the_making_reaches_the_caller() -> None:
    def make(request: Any) -> int:
        raise ValueError("document 3 is broken")

    with pytest.raises(ValueError, match="document 3 is broken"):
        list(ahead([parse([ask("mytask", 0, "?")])], make))


def test_the_fast_preset_keeps_the_rpn_s_own_policy(engine: FakeEngine) -> None:
    given = {"preset": "fast"}
    settings = loading.zoom_settings(engine, arguments.checked(given), given)  # type: ignore[arg-type]
    assert settings == ZoomConfig(
        policy="strongest", token_budget=2.5, skip_above=0.7, max_crop_tokens=64
    )
    paper = {"preset": "paper"}
    settings = loading.zoom_settings(engine, arguments.checked(paper), paper)  # type: ignore[arg-type]
    assert settings == ZoomConfig(policy="mask")
