"""Flags of lmms-eval that the model cannot honour: refused by name, before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.evaluator import simple_evaluate

from sdrpn_eval import harness
from sdrpn_eval import model as plugin_model
from sdrpn_eval.model import LlavaSdrpn
from tests.helpers.asking_by_hand import logged
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import manager, tiny_vstar_rows, write

REFUSED = [
    (["--system_instruction", "Be brief."], "--system_instruction: .*system_prompt= in --model_"),
    (["--system_instruction=Be brief."], "--system_instruction: lmms-eval glues it"),
    (["--apply_chat_template"], "--apply_chat_template: the prompt is the model's own"),
    (["--apply_chat_template", "--fewshot_as_multiturn"], "; --fewshot_as_multiturn: a question"),
    (["--num_fewshot", "2"], "--num_fewshot: examples would come without their images"),
    (["--cache_requests", "true"], "--cache_requests: lmms-eval stores requests without"),
    (["--cache_requests=refresh"], "--cache_requests: "),
    (["--use_cache", "x"], "--use_cache: .*a retrained RPN in the same folder would get"),
    (["-c", "x"], "--use_cache: "),
]
"""Words of a command line, and what is said of them."""


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_flags_are_refused_before_anything_is_loaded(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_model, "load_engine", None)  # must not be needed
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--model", "llava_sdrpn", *words])
    with pytest.raises(ValueError, match=told):
        LlavaSdrpn(pretrained="tiny")


@pytest.mark.parametrize(
    "words",
    [
        ["--num_fewshot", "0"],
        ["--cache_requests", "delete"],
        ["--write_out", "--predict_only", "--log_samples", "--repeats", "3", "--limit", "0.5"],
        ["--output_path", "out/5"],
        ["--output_path", "./5"],
    ],
)
def test_flags_that_do_no_harm_pass(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--model", "llava_sdrpn", *words])
    harness.check_harness(["pope"], main_process=True)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task of two documents."""
    write(tiny_vstar_rows(2), tmp_path / "data" / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(tmp_path / "data"))
    return "tiny_vstar"


@pytest.mark.parametrize(
    ("settings", "told", "made_before"),
    [
        ({"system_instruction": "Be brief."}, "--system_instruction: ", True),
        ({"cache_requests": True}, "--cache_requests: ", True),
        ({"system_instruction": "Be brief."}, "--system_instruction: ", False),
        ({"num_fewshot": 1}, "--num_fewshot: ", False),
        ({"apply_chat_template": True}, "--apply_chat_template: ", False),
        ({"cache_requests": True}, "--cache_requests: ", False),
    ],
)
def test_they_are_refused_from_python_too(
    tiny: str, settings: dict[str, Any], told: str, made_before: bool, tmp_path: Path
) -> None:
    """Of a model that is made before the evaluation, and of one that the evaluation makes."""
    made = LlavaSdrpn(pretrained=FakeEngine(), record="none") if made_before else "llava_sdrpn"
    arguments = "" if made_before else f"pretrained={tmp_path / 'none'},device=cpu"
    with pytest.raises(ValueError, match=f"sdrpn does not work with {told}"):
        simple_evaluate(
            made, arguments, tasks=[tiny], task_manager=manager(), bootstrap_iters=0, **settings
        )


def test_a_task_with_examples_of_its_own_is_refused_by_name() -> None:
    class Task:
        class config:
            task = "mine"
            num_fewshot = 4

    with pytest.raises(ValueError, match=r"mine has num_fewshot: 4, .* give --num_fewshot 0"):
        harness.refuse_task_settings([Task()])
    Task.config.num_fewshot = 0
    harness.refuse_task_settings([Task(), object()])


@pytest.mark.parametrize("path", ["5", "5.0", "1e5", "true", "False", "nan", "inf"])
def test_an_output_path_that_reads_as_a_number_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--output_path", path])
    monkeypatch.setattr(plugin_model, "load_engine", None)
    with pytest.raises(ValueError, match=rf"--output_path {path}: .* saves no results; write \./"):
        LlavaSdrpn(pretrained="tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "tasks", "warned"),
    [
        (0.1, ["pope", "vstar"], True),
        ("0.5", ["pope", "vstar"], True),
        (0.1, ["pope"], False),
        (2, ["pope", "vstar"], False),
        (1.0, ["pope", "vstar"], False),
        (-1, ["pope", "vstar"], False),
        (None, ["pope", "vstar"], False),
    ],
)
def test_a_share_of_several_tasks_is_told(limit: Any, tasks: list[str], warned: bool) -> None:
    with logged() as log:
        harness.warn_of_limit(limit, tasks)
    assert len(log) == warned
    if warned:
        assert f"--limit {limit} with several tasks: lmms-eval 0.7.3 takes that share of" in log[0]
        assert "first one, pope, and asks as many documents of vstar" in log[0]


def test_the_limit_is_told_before_the_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", "llava_sdrpn", "--tasks", "pope,docvqa_val", "--limit", "0.1"]
    monkeypatch.setattr("sdrpn_eval.announce.check_data", lambda *_: None)  # not at hand
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *words])
    with logged() as log:
        LlavaSdrpn(pretrained=FakeEngine())
    assert len([line for line in log if "--limit 0.1 with several tasks" in line]) == 1


def test_a_folder_with_a_task_s_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny_vstar").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--tasks tiny_vstar: .*/tiny_vstar is a folder, which"):
        harness.refuse_folder_as_task("tiny_vstar", {"tiny_vstar": {}})
    harness.refuse_folder_as_task("pope", {"tiny_vstar": {}, "pope": {}})
    harness.refuse_folder_as_task("tiny_vstar", {})  # a folder of the user's own tasks
    monkeypatch.setattr(
        sys, "argv", ["lmms-eval", "--model", "llava_sdrpn", "--tasks", "tiny_vstar"]
    )
    with pytest.raises(ValueError, match="is a folder"):
        manager()
