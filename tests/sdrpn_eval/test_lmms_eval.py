"""The plugin in lmms-eval's own evaluator: scores of our tasks, the command line, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lmms_eval.evaluator import simple_evaluate

from sdrpn_eval.model import LlavaSdrpn
from sdrpn_eval.record import RecordLine, read_records
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import (
    docvqa_rows,
    manager,
    textvqa_rows,
    tiny_vstar_rows,
    vstar_rows,
    write,
)
from tools.tiny_vstar.tiny_model import build_model, build_processor


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    write(textvqa_rows(5), folder / "textvqa_val")
    write(textvqa_rows(3), folder / "textvqa_test")
    write(docvqa_rows(4), folder / "docvqa", "validation-00000-of-00001.parquet")
    write(docvqa_rows(2), folder / "docvqa", "test-00000-of-00001.parquet")
    write(vstar_rows(5, 3), folder / "vstar")
    write(tiny_vstar_rows(8), folder / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.chdir(tmp_path)  # tasks write their submission files to the working directory
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return folder


def evaluate(model: Any, task: str, index: Any = None, **more: Any) -> dict[str, Any]:
    if isinstance(model, FakeEngine):
        model = LlavaSdrpn(pretrained=model, batch_size=3)
    results = simple_evaluate(
        model=model, tasks=[task], task_manager=index or manager(), bootstrap_iters=100, **more
    )
    assert results
    return results


# In this process, with a stand-in engine


def test_vstar_s_overall_score_is_over_all_questions(data: Path) -> None:
    """Right on 4 of 5 attributes (shade 4 says "Blue") and on no position: 4 of 8 overall."""

    def say(question: Any) -> str:
        shade = question.images[0].getpixel((0, 0))[0]
        return "Blue" if shade == 4 else "A" if shade < 5 else "Answer: B"

    results = evaluate(FakeEngine(say), "vstar")["results"]
    assert results["vstar"]["accuracy,none"] == pytest.approx(4 / 8)
    assert results["vstar"]["unparsed,none"] == pytest.approx(1 / 8)
    assert results["vstar_direct_attributes"]["accuracy,none"] == pytest.approx(4 / 5)
    assert results["vstar_relative_position"]["accuracy,none"] == 0
    assert results["vstar_direct_attributes"]["unparsed,none"] == pytest.approx(1 / 5)


def test_vstar_reaches_every_answer_under_a_limit(data: Path) -> None:
    results = evaluate(FakeEngine(lambda q: "A"), "vstar", limit=2)
    assert {n: s["effective"] for n, s in results["n-samples"].items()} == {
        "vstar_direct_attributes": 2,
        "vstar_relative_position": 2,
    }
    assert results["results"]["vstar"]["accuracy,none"] == 1


def test_tiny_vstar_by_group_and_clustered(data: Path) -> None:
    """Right on both questions of image 0, wrong on the six others: all clustering there is."""

    def say(question: Any) -> str:
        return "red level" if question.images[0].getpixel((0, 0))[0] == 0 else "red dotted"

    results = evaluate(FakeEngine(say), "tiny_vstar")
    scores = results["results"]["tiny_vstar"]
    assert scores["accuracy,none"] == pytest.approx(2 / 8)
    assert scores["accuracy_fine,none"] == pytest.approx(1 / 4)
    assert scores["accuracy_coarse,none"] == pytest.approx(1 / 4)
    assert results["n-samples"]["tiny_vstar"]["effective"] == 8
    assert scores["accuracy_stderr_clustered,none"] > scores["accuracy_stderr_clt,none"]


def test_gen_kwargs_from_the_command_line_reach_the_engine(data: Path) -> None:
    engine = FakeEngine()
    evaluate(engine, "textvqa_val", gen_kwargs="temperature=0.5,max_new_tokens=7,until=STOP")
    expected = {"temperature": 0.5, "max_new_tokens": 7, "do_sample": True, "stop": ["STOP"]}
    assert engine.generations[0] == expected


def test_a_multiple_choice_task_takes_the_smallest_loss(data: Path, tmp_path: Path) -> None:
    config = {
        "task": "by_loss",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data / "tiny_vstar" / "data.parquet")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_visual": "image",
        "doc_to_text": "question",
        "doc_to_choice": ["dotted", "A", "checked"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "by_loss").mkdir()
    (tmp_path / "by_loss" / "by_loss.yaml").write_text(yaml.safe_dump(config))
    from lmms_eval.tasks import TaskManager

    index = TaskManager(include_path=str(tmp_path / "by_loss"), include_defaults=False)
    results = evaluate(FakeEngine(), "by_loss", index)["results"]
    assert results["by_loss"]["acc,none"] == 1


@pytest.mark.slow
def test_use_cache_answers_again_without_the_model(data: Path, tmp_path: Path) -> None:
    engine = FakeEngine(lambda q: "stop")
    lm = LlavaSdrpn(pretrained=engine, batch_size=3)
    for _ in range(2):
        results = evaluate(lm, "textvqa_val", use_cache=str(tmp_path / "responses"))["results"]
        assert results["textvqa_val"]["exact_match,none"] == 1
        assert len(engine.batches) == 2


# The same again, with the embedded model


def embedded(out: Path, limit: int, **more: Any) -> tuple[list[RecordLine], list[Any]]:
    """Evaluate tiny_vstar: the record's lines, and what each sample kept of the answer."""
    lm = LlavaSdrpn(pretrained="tiny", device="cpu", record=out, **more)
    results = evaluate(lm, "tiny_vstar", limit=limit, log_samples=True)
    samples = results["samples"]["tiny_vstar"]
    return read_records(out), [(s["doc_id"], s["resps"], s["token_counts"]) for s in samples]


def same(line: RecordLine) -> dict[str, Any]:
    """A line without what a clock told."""
    return line.model_dump(exclude={"run", "seconds"})


@pytest.fixture
def shipped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny_vstar with its own images."""
    monkeypatch.delenv("SDRPN_DATA")


@pytest.mark.slow
def test_two_runs_of_one_command_give_byte_equal_answers(shipped: None, tmp_path: Path) -> None:
    given = {"batch_size": 5, "resume": False}
    one, samples = embedded(tmp_path / "one", 18, **given)
    two, samples_two = embedded(tmp_path / "two", 18, **given)
    assert [*map(same, one)] == [*map(same, two)]
    assert samples == samples_two
    # Another composition of batches and no cache: the same words, from the same regions.
    three, samples_three = embedded(tmp_path / "three", 18, batch_size=7, prefix_cache="none")
    assert samples == samples_three
    assert [line.regions for line in one] == [line.regions for line in three]
    assert len({line.answer for line in one}) > 5


@pytest.mark.slow
def test_use_cache_is_refused_before_anything_is_loaded(
    shipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By lmms-eval's own command line, in this process."""
    from lmms_eval.__main__ import cli_evaluate_single, parse_eval_args

    words = ["--model", "llava_sdrpn", "--model_args", "pretrained=tiny", "--tasks", "tiny_vstar"]
    words += ["--limit", "2", "--use_cache", str(tmp_path / "responses")]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *words])
    monkeypatch.setattr("sdrpn_eval.model.load_engine", None)  # must not be needed
    with pytest.raises(ValueError, match="sdrpn does not work with --use_cache"):
        cli_evaluate_single(parse_eval_args()[1])
    assert not (tmp_path / "responses").exists()


# The command line, with a random model of LLaVA's layout


@pytest.fixture(scope="module")
def random_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sdrpn.backbones.llava15 import Llava15
    from sdrpn.rpn.checkpoint import RPN

    folder = tmp_path_factory.mktemp("random_llava")
    torch.manual_seed(0)
    processor = build_processor()
    build_model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    RPN.from_backbone(Llava15.load(str(folder), device="cpu"), 3, 3).save_pretrained(folder / "rpn")
    return folder


def lmms_eval(*words: str, processes: int = 1) -> str:
    """Run lmms-eval on the CPU; its exit code says nothing, its output does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launch = [] if processes == 1 else launcher
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "-m", "lmms_eval", "--model", "llava_sdrpn", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tempfile.gettempdir(),
        timeout=120,
    )
    return done.stdout + done.stderr


def results_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/*_results.json")
    return json.loads(path.read_text())["results"]


def test_boxes_of_the_documents_with_a_real_engine(
    random_llava: Path, data: Path, tmp_path: Path
) -> None:
    lm = LlavaSdrpn(
        pretrained=str(random_llava), proposer="box", device="cpu", batch_size=8, record=tmp_path
    )
    assert evaluate(lm, "tiny_vstar")["results"]["tiny_vstar"]["accuracy,none"] >= 0
    lines = read_records(tmp_path)
    assert [line.doc_id for line in lines] == list(range(8))
    for line in lines:
        ((x0, y0, x1, y1),) = line.regions
        assert x0 <= 5
        assert y0 <= 5
        assert x1 >= 20
        assert y1 >= 20
        assert line.tokens["crop"] == line.tokens["image"] == 64


@pytest.mark.slow
def test_literal_command_resolves_up_to_the_weights(data: Path) -> None:
    output = lmms_eval("--tasks", "textvqa,docvqa,vstar")
    assert "Tasks were not found" not in output
    assert (
        "Tasks with a score: textvqa_val, docvqa_val, vstar_direct_attributes, "
        "vstar_relative_position. For submission only: textvqa_test, docvqa_test"
    ) in output
    assert "YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled" in output
    assert "pretrained=tiny" in output


@pytest.mark.slow
def test_literal_command_resolves_up_to_the_data(
    random_llava: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDRPN_DATA")
    model = f"pretrained={random_llava},rpn={random_llava}/rpn"
    output = lmms_eval("--tasks", "textvqa,docvqa,vstar", "--model_args", model)
    assert "Tasks with a score: textvqa_val" in output
    assert "textvqa_val: cannot fetch" in output
    assert "SDRPN_DATA=DIR reads DIR/textvqa_val/*.parquet instead" in output


@pytest.mark.slow
def test_literal_command_on_local_data(random_llava: Path, data: Path, tmp_path: Path) -> None:
    model = f"pretrained={random_llava},rpn={random_llava}/rpn,threshold=0.4"
    words = ["--tasks", "textvqa,docvqa,vstar", "--model_args", model, "--batch_size", "4"]
    out = tmp_path / "out"
    output = lmms_eval(*words, "--gen_kwargs", "max_new_tokens=4", "--output_path", str(out))
    assert "Traceback" not in output, output
    scores = results_of(out)
    assert scores["textvqa_val"]["exact_match,none"] >= 0
    assert scores["docvqa_val"]["anls,none"] >= 0
    assert scores["vstar"]["accuracy,none"] >= 0
    lines = read_records(out / "sdrpn_record")
    assert len(lines) == 5 + 3 + 4 + 2 + 5 + 3
    assert all(line.grid == (8, 8) and line.map_max > 0 for line in lines)


@pytest.mark.slow
def test_two_processes_share_the_work(random_llava: Path, data: Path, tmp_path: Path) -> None:
    model = f"pretrained={random_llava},rpn={random_llava}/rpn,record={tmp_path}/record"
    words = ["--tasks", "textvqa_val,vstar", "--model_args", model, "--batch_size", "2"]
    words += ["--gen_kwargs", "max_new_tokens=4", "--output_path", f"{tmp_path}/out"]
    output = lmms_eval(*words, "--log_samples", processes=2)
    assert "Traceback" not in output, output
    lines = read_records(tmp_path / "record")
    asked = sorted((line.task, line.doc_id) for line in lines)
    assert asked == sorted(
        [("textvqa_val", i) for i in range(5)]
        + [("vstar_direct_attributes", i) for i in range(5)]
        + [("vstar_relative_position", i) for i in range(3)]
    )
    for rank in (0, 1):
        (path,) = (tmp_path / "record").glob(f"record_textvqa_val_rank{rank}.jsonl")
        assert {json.loads(line)["doc_id"] % 2 for line in path.open()} == {rank}
    (samples,) = (tmp_path / "out").glob("*/*_samples_textvqa_val.jsonl")
    answered = {line.doc_id: line.answer for line in lines if line.task == "textvqa_val"}
    for line in map(json.loads, samples.open()):
        assert line["filtered_resps"] == [answered[line["doc_id"]]] or (
            line["filtered_resps"] == answered[line["doc_id"]]
        )
    assert "vstar" in results_of(tmp_path / "out")
