"""The paper's benchmarks: every task runs on local data, and ours ask what the harness's ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.utils import load_yaml_config, make_table

from sdrpn_eval.model import LlavaSdrpn
from sdrpn_eval.plugin import tasks_folder
from sdrpn_eval.provenance.fingerprints import scorer_fingerprint
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import read_run
from sdrpn_eval.tasks_info import PROTOCOLS, parts, threshold_of
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import PAPER, manager, task_utils, vstar_true_rows, write_all
from tests.helpers.run_folders import evaluate as evaluate_into

THEIRS = Path(lmms_eval.tasks.__file__).parent
vstar = task_utils("vstar")
VARIANTS = ["textvqa_val_ocr", "vstar_harness", "vstar_shuffled", "vstar_likelihood"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of all benchmarks in SDRPN_DATA, and no hub."""
    folder = tmp_path / "data"
    write_all(folder)
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # tasks write their submission files to the working directory
    return folder


def run(model: Any, tasks: list[Any], **more: Any) -> dict[str, Any]:
    results = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager(*PAPER), bootstrap_iters=0, **more
    )
    assert results
    return results


def scores(results: dict[str, Any], task: str) -> dict[str, float]:
    found = {k.removesuffix(",none"): v for k, v in results["results"][task].items()}
    return {k: v for k, v in found.items() if isinstance(v, float) and "stderr" not in k}


def reply(question: Any) -> str:
    """Right where no letter is asked for; else A, and B on HR-Bench."""
    known = {
        "word?": "stop",
        "year?": "1999",
        "How many": "12",
        "written": "It says meeting",
        "Is there": "Yes",
        "option letter directly": "B",
    }
    return next((answer for words, answer in known.items() if words in question.text), "A")


# Every task, on a few documents


def test_the_paper_s_benchmarks_and_the_variants(data: Path) -> None:
    engine = FakeEngine(reply)
    results = run(LlavaSdrpn(pretrained=engine, batch_size=4), ["sdrpn_paper", *VARIANTS])
    for task, metric in (
        ("docvqa_val_public", "anls"),
        ("chartqa_public", "relaxed_overall"),
        ("infovqa_val_public", "anls"),
        ("textvqa_val_public", "exact_match"),
        ("textvqa_val_ocr", "exact_match"),
    ):
        assert scores(results, task)[metric] == 1, task
    assert scores(results, "ocrbench_public") == {"ocrbench_accuracy": 3 / 1000}
    pope = scores(results, "pope_public")
    assert (pope["pope_accuracy"], pope["pope_f1_score"]) == (0.5, pytest.approx(2 / 3))
    assert scores(results, "vstar")["accuracy"] == pytest.approx(2 / 3)
    assert scores(results, "vstar_direct_attributes")["accuracy"] == 0.5
    assert scores(results, "vstar")["answered_a"] == 1
    assert scores(results, "vstar_harness") == {
        "vstar_overall_acc": pytest.approx(200 / 3),
        "vstar_direct_attributes_acc": 50,
        "vstar_relative_position_acc": 100,
    }
    moved = [vstar.shuffled(doc)["label"] for doc in vstar_true_rows().to_list()]
    assert scores(results, "vstar_shuffled")["accuracy"] == moved.count("A") / 3
    # The fake engine's loss is the length; rubber is as short as any, red and left shortest.
    assert scores(results, "vstar_likelihood") == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy_direct_attributes": 0.5,
        "accuracy_relative_position": 0,
    }
    for task in ("hrbench4k_offline", "hrbench8k_offline"):
        expected = {"average": 0.25, "single": 0.25, "cross": 0.25, "unparsed": 0}
        assert scores(results, task) == expected
    texts = [q.text for batch in engine.batches for q in batch]
    assert sum("\nReference OCR token: STOP, sign\n" in text for text in texts) == 4
    assert sum("leather" in text for text in texts) == 3  # not where each option has its own loss
    table = make_table(results)
    assert "textvqa_val_public (no OCR tokens in the prompt)" in table
    assert "textvqa_val_ocr (OCR tokens in the prompt)" in table


def test_the_subsets_for_ci_on_local_samples(data: Path) -> None:
    results = run(LlavaSdrpn(pretrained=FakeEngine(reply), batch_size=4), ["sdrpn_ci"])
    assert {n: s["original"] for n, s in results["n-samples"].items()} == {
        "docvqa_ci": 3,
        "chartqa_ci": 4,
        "ocrbench_ci": 3,
        "infovqa_ci": 3,
        "textvqa_ci": 4,
        "vstar_ci": 3,
        "pope_ci": 4,
        "hrbench4k_ci": 8,
        "hrbench8k_ci": 8,
    }
    assert scores(results, "ocrbench_ci") == {"ocrbench_accuracy": 1}
    assert scores(results, "vstar_ci")["accuracy_direct_attributes"] == 0.5
    assert scores(results, "hrbench8k_ci")["average"] == 0.25
    assert scores(results, "pope_ci")["pope_f1_score"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_every_task_with_a_real_model(data: Path, tmp_path: Path) -> None:
    """The embedded model knows no such question; what counts is that it is asked and looks."""
    lm = LlavaSdrpn(pretrained="tiny", batch_size=4, device="cpu", record=tmp_path / "record")
    tasks = ["sdrpn_paper", *VARIANTS, "vstar_ci", "hrbench4k_ci"]
    results = run(lm, tasks, limit=1, gen_kwargs="max_new_tokens=2")
    asked = {name for name, s in results["n-samples"].items() if s["effective"] == 1}
    index = manager(*PAPER).task_index
    assert asked == {task for name in tasks for task in parts(name, index)}
    lines = [
        json.loads(line)
        for path in (tmp_path / "record").glob("record_*.jsonl")
        for line in path.open()
    ]
    assert {line["task"] for line in lines} == asked
    said = [line["continuation"] for line in lines if line["task"] == "vstar_likelihood"]
    assert len(said) == 4
    assert " The material of the glove is kevlar." in said


# What compare makes of them


def test_variants_are_compared_and_their_scorers_known(data: Path, tmp_path: Path) -> None:
    tasks = ["textvqa_ci", "textvqa_val_ocr", "vstar_ci", "vstar_shuffled", "vstar_likelihood"]
    for name, say in (("one", reply), ("two", lambda q: "C")):
        evaluate_into(tmp_path / name, FakeEngine(say), tasks)
    comparison = compare([read_run(tmp_path / "one"), read_run(tmp_path / "two")])
    main = {r.task: r.metric for r in comparison.rows if r.main}
    assert main == {task: "accuracy" for task in tasks if task.startswith("vstar")} | {
        task: "exact_match" for task in tasks if task.startswith("textvqa")
    }
    skipped = {(one.task, one.metric) for one in comparison.not_compared}
    assert skipped == {("textvqa_ci", "submission"), ("textvqa_val_ocr", "submission")}
    marks = [one.fingerprints(task) for one in comparison.evidence for task in tasks]
    assert all(mark and mark.scorer for mark in marks)


def test_the_scorer_s_fingerprint_moves_with_the_letter_parser(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint() -> str:
        (task,) = manager().load_task_or_group(["vstar_ci"]).values()
        return scorer_fingerprint(task)

    before = fingerprint()
    assert fingerprint() == before

    def answer_letter(response: str, valid: set[str]) -> str | None:
        return response[:1] if response[:1] in valid else None

    answer_letter.__module__ = "sdrpn_eval.scoring"
    monkeypatch.setattr("sdrpn_eval.scoring.answer_letter", answer_letter)
    assert fingerprint() != before


# The harness's own tasks and ours


def full(path: Path) -> dict[str, Any]:
    return load_yaml_config(str(path), mode="full")


def told(value: Any) -> Any:
    """A value of a configuration so that the same function is equal however it was imported."""
    if isinstance(value, Callable):
        return (value.__code__.co_filename, value.__qualname__)  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return {k: told(v) for k, v in value.items()}
    return [told(v) for v in value] if isinstance(value, list) else value


OURS = {
    "textvqa/textvqa_val_ocr": "textvqa/textvqa_val",
    "public/textvqa_val_public": "textvqa/textvqa_val",
    "public/docvqa_val_public": "docvqa/docvqa_val",
    "public/infovqa_val_public": "infovqa/infovqa_val",
    "public/chartqa_public": "chartqa/chartqa",
    "public/ocrbench_public": "ocrbench/ocrbench",
    "public/pope_public": "pope/pope",
    "ci/textvqa_ci": "textvqa/textvqa_val",
    "ci/docvqa_ci": "docvqa/docvqa_val",
    "ci/infovqa_ci": "infovqa/infovqa_val",
    "ci/chartqa_ci": "chartqa/chartqa",
    "ci/ocrbench_ci": "ocrbench/ocrbench",
    "ci/pope_ci": "pope/pope",
    "vstar/vstar_harness": "vstar_bench/vstar_bench",
}
OF_ITS_OWN = {"task", "task_alias", "process_docs", "metadata", "tag", "dataset_kwargs"}


@pytest.mark.parametrize(("ours", "theirs"), OURS.items())
def test_ours_is_the_harness_s_but_for(ours: str, theirs: str) -> None:
    """A harness that moves its data, prompts or graders is noticed here."""
    mine, its = (
        told({k: v for k, v in full(path).items() if k not in OF_ITS_OWN})
        for path in (tasks_folder() / f"{ours}.yaml", THEIRS / f"{theirs}.yaml")
    )
    kwargs = its["lmms_eval_specific_kwargs"]["default"]
    if ours.endswith("_ocr"):
        assert (kwargs.pop("ocr"), mine["lmms_eval_specific_kwargs"]["default"].pop("ocr")) == (
            False,
            True,
        )
    assert mine.pop("lmms_eval_specific_kwargs")["default"] == kwargs
    its.pop("lmms_eval_specific_kwargs")
    metrics, of_theirs = (
        {m["metric"]: m["aggregation"] for m in config.pop("metric_list")} for config in (mine, its)
    )
    for name, aggregation in metrics.items():
        if name != "ocrbench_accuracy" and name in of_theirs:  # theirs divides by 1000
            assert aggregation == of_theirs[name]
    # Theirs writes a file to hand in, too; ours gives V* by category, too.
    assert set(of_theirs) - {"submission"} <= set(metrics)
    if ours.endswith("vstar_harness"):
        mine["process_results"] = its["process_results"]  # the same in another order, see below
    assert mine == its


def test_the_harness_s_v_star_grades_by_its_overall_score_first() -> None:
    from lmms_eval.tasks.vstar_bench.utils import vstar_process_results

    doc = vstar_true_rows()[1]
    for response in ("C", "Blue", "Cannot tell", ""):
        ours, theirs = (
            f(doc, [response]) for f in (vstar.process_as_harness, vstar_process_results)
        )
        assert ours == theirs
        assert next(iter(ours)) == "vstar_overall_acc"


def test_hrbench_asks_what_the_harness_asks() -> None:
    for size in ("4k", "8k"):
        theirs = full(THEIRS / "hrbench" / f"hrbench{size}.yaml")
        for name in (f"hrbench{size}_offline", f"hrbench{size}_ci"):
            ours = full(tasks_folder() / "hrbench" / f"{name}.yaml")
            for key in ("dataset_path", "dataset_name", "test_split", "doc_to_text"):
                assert told(ours[key]) == told(theirs[key])
            assert ours["output_type"] == theirs["output_type"]
            assert "generation_kwargs" not in ours | theirs


# Names


def test_the_group_is_the_paper_s() -> None:
    index = manager(*PAPER).task_index
    thresholds = {task: threshold_of(task) for task in parts("sdrpn_paper", index)}
    assert thresholds == {
        "docvqa_val_public": 0.1,
        "chartqa_public": 0.15,
        "ocrbench_public": 0.05,
        "infovqa_val_public": 0.15,
        "textvqa_val_public": 0.15,
        "vstar_direct_attributes": 0.1,
        "vstar_relative_position": 0.1,
        "pope_public": 0.15,
        "hrbench4k_offline": 0.1,
        "hrbench8k_offline": 0.1,
    }
    ci = {task: threshold_of(task) for task in parts("sdrpn_ci", index)}
    assert sorted(ci.values()) == sorted([*thresholds.values()][:-1])  # V* is one task there


def test_the_protocol_stands_beside_each_score() -> None:
    """lmms-eval's table shows a task's alias: ours says how it is scored."""
    aliases = {
        config[kind]: config[f"{kind}_alias"]
        for path in tasks_folder().rglob("*.yaml")
        for kind in ("group", "task")
        if f"{kind}_alias" in (config := load_yaml_config(str(path), mode="simple"))
    }
    assert aliases == {task: f"{task} ({PROTOCOLS[task]})" for task in aliases}
    ours = {p.stem for p in tasks_folder().rglob("*.yaml")}
    assert set(aliases) == set(PROTOCOLS) & ours
