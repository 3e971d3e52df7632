"""Runs that lmms-eval calls good, and a gate does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.comparisons import N, rows, run_gate
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import tiny_vstar_rows, write
from tests.helpers.run_folders import (
    SCORER_SETTINGS,
    evaluate,
    record_line,
    write_facts,
    write_record,
    write_run,
)


def _cut(folder: Path, keep: int) -> None:
    path = next(folder.rglob("*_samples_x.jsonl"))
    path.write_text("".join(path.read_text().splitlines(True)[:keep]))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = next(folder.rglob("*_results.json"))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _nan(content: dict[str, Any]) -> None:
    content["results"]["x"]["accuracy,none"] = float("nan")


def _none(content: dict[str, Any]) -> None:
    content["results"]["x"]["accuracy,none"] = None


def _missing(content: dict[str, Any]) -> None:
    del content["configs"]["x"], content["results"]["x"]


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no results": (lambda f: next(f.rglob("*_results.json")).unlink(), "holds no *_results.json"),
    "no samples": (lambda f: next(f.rglob("*_samples_x.jsonl")).unlink(), "no samples of x"),
    "cut samples": (lambda f: _cut(f, 30), "holds 30 of 40 documents"),
    "empty samples": (lambda f: _cut(f, 0), "holds 0 of 40 documents"),
    "missing task": (lambda f: _edit(f, _missing), "has no results for x"),
    "no tasks": (lambda f: _edit(f, lambda c: c["configs"].clear()), "holds no task"),
    "nan": (lambda f: _edit(f, _nan), "accuracy,none is nan"),
    "no score": (lambda f: _edit(f, _none), "accuracy,none is missing"),
    "budget": (
        lambda f: _edit(f, lambda c: c.update(usage={"budget_exceeded": True})),
        "the token budget ended the run early",
    ),
    "other kind": (lambda f: _edit(f, lambda c: c.update(config=[])), "config: Input should be"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_lmms_eval_hides_is_broken(tmp_path: Path, baseline: Path, harm: str) -> None:
    run = write_run(tmp_path / "run", {"x": rows(), "y": rows()})
    assert run_gate(run, baseline)[0] == 0
    act, says = HARMS[harm]
    act(run)
    code, line = run_gate(run, baseline)
    assert code == 2
    assert line.startswith("gate: broken: ")
    assert says in line


def test_a_run_that_is_nowhere_is_broken(tmp_path: Path, baseline: Path) -> None:
    code, line = run_gate(tmp_path / "gone", baseline)
    assert code == 2
    assert "gone does not exist" in line


def test_a_half_written_line_is_broken(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(), "y": rows()})
    path = next(run.rglob("*_samples_x.jsonl"))
    path.write_text(path.read_text()[:-30])
    code, line = run_gate(run, baseline)
    assert code == 2
    assert "cut off or broken in line 40" in line


def test_fewer_documents_than_the_baseline_are_broken(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(n=10), "y": rows()}, limit=10)
    code, line = run_gate(run, baseline)
    assert code == 2
    assert "30 of the baseline's 40 documents are missing, such as 10" in line


def test_a_scorer_that_one_run_did_not_record_is_no_other(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    bare = write_run(tmp_path / "bare", {"toy": rows()})
    run_gate(bare, base, "--update")
    recorded = _recorded(tmp_path / "recorded")
    assert run_gate(recorded, base)[0] == 0
    run_gate(recorded, base, "--update")
    assert run_gate(bare, base)[0] == 0


@pytest.mark.parametrize("setting", SCORER_SETTINGS)
def test_each_setting_that_makes_a_score_is_held(
    tmp_path: Path, baseline: Path, setting: str
) -> None:
    run = write_run(
        tmp_path / "run", {"x": rows(), "y": rows()}, config={setting: SCORER_SETTINGS[setting]}
    )
    code, line = run_gate(run, baseline)
    assert code == 2
    assert "another scorer" in line


def test_more_documents_than_the_baseline_are_broken(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    run_gate(write_run(tmp_path / "ten", {"x": rows(n=10)}), base, "--update")
    assert run_gate(write_run(tmp_path / "all", {"x": rows()}), base) == (
        2,
        "gate: broken: x accuracy: 40 documents, the baseline has 10: run with the same --limit, "
        "or --update",
    )


@pytest.mark.parametrize("total", [0.99, 1.01, 0.9999])
def test_a_score_that_is_not_its_documents_mean_is_broken(
    tmp_path: Path, baseline: Path, total: float
) -> None:
    """A total that disagrees by as little as a hundredth of a percent is another metric."""
    totals = {"x": {"accuracy,none": total}, "y": {"accuracy,none": 1.0}}
    run = write_run(tmp_path / "run", {"x": rows(), "y": rows()}, totals)
    assert run_gate(run, baseline) == (
        2,
        "gate: broken: x accuracy: accuracy,none cannot be read document by document, the "
        "baseline's could",
    )
    code, line = run_gate(run, tmp_path / "other.json", "--update")
    assert code == 0
    assert line.endswith("without a score a document: x")


def test_a_score_over_other_documents_is_broken(tmp_path: Path, baseline: Path) -> None:
    some = rows()
    del some[3]["accuracy"]
    totals = {"x": {"accuracy,none": 1.0}, "y": {"accuracy,none": 1.0}}
    run = write_run(tmp_path / "run", {"x": some, "y": rows()}, totals)
    assert run_gate(run, baseline) == (
        2,
        "gate: broken: x accuracy: accuracy,none is scored on other documents than the baseline's",
    )


def test_other_prompts_images_and_scorers_are_broken(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    run_gate(_recorded(tmp_path / "good"), base, "--update")

    def says(folder: Path) -> str:
        code, line = run_gate(folder, base)
        assert code == 2, line
        return line

    assert run_gate(_recorded(tmp_path / "same"), base)[0] == 0
    prompt = rows()
    prompt[3] = prompt[3] | {"input": "else"}
    assert "another prompt or target in 1 document, such as 3" in says(
        write_run(tmp_path / "prompt", {"toy": prompt})
    )
    image = {"images": [{"hash": "else", "size": [1, 1]}]}
    assert "another image in 40 documents, such as 0" in says(
        _recorded(tmp_path / "image", **image)
    )
    settings = {"process_results": "<function strict at 0x7f>"}
    assert "another scorer" in says(
        write_run(tmp_path / "settings", {"toy": rows()}, config=settings)
    )
    source = _recorded(tmp_path / "source")
    write_facts(source, "other")
    assert "another scorer" in says(source)
    data = _recorded(tmp_path / "data")
    write_facts(data, "same", "7")
    told = f"({1:032x} and {7:032x})"
    assert f"other data, in columns that prompts do not show {told}" in says(data)
    failed = _recorded(tmp_path / "failed")
    write_facts(failed, "same", skipped={"toy": 3})
    assert "3 document(s) of toy were skipped" in says(failed)


def _recorded(folder: Path, **more: Any) -> Path:
    write_run(folder, {"toy": rows()})
    write_record(folder, [record_line(i, "red", **more) for i in range(N)])
    write_facts(folder, "same")
    return folder


def test_old_results_are_not_this_job_s(tmp_path: Path, baseline: Path) -> None:
    assert run_gate(tmp_path / "good", baseline, "--max-age", "1e9")[0] == 0
    code, line = run_gate(tmp_path / "good", baseline, "--max-age", "0.001")
    assert code == 2
    assert "hours old" in line


def test_a_crash_in_the_middle_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tiny_vstar_rows(8), tmp_path / "data" / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    base, out = tmp_path / "b.json", tmp_path / "out"
    evaluate(out, FakeEngine(lambda q: "red level"), ["tiny_vstar"])
    assert run_gate(out, base, "--update")[0] == 0
    assert run_gate(out, base)[0] == 0
    asked = []

    def crash(question: Any) -> str:
        asked.append(question)
        if len(asked) > 4:
            raise RuntimeError("CUDA error")
        return "red level"

    fresh = tmp_path / "fresh"
    with pytest.raises(RuntimeError):
        evaluate(fresh, FakeEngine(crash), ["tiny_vstar"])
    assert list(fresh.rglob("record_*.jsonl"))
    code, line = run_gate(fresh, base)
    assert code == 2
    assert "holds no *_results.json" in line
    # In a folder that holds an older run's results, these must not pass for the new run's.
    asked.clear()
    _date_back(out)
    assert run_gate(out, base)[0] == 0
    with pytest.raises(RuntimeError):
        evaluate(out, FakeEngine(crash), ["tiny_vstar"])
    code, line = run_gate(out, base)
    assert code == 2
    assert "a run that began later" in line


def _date_back(folder: Path) -> None:
    """Make a run an hour older: its results and its record say when it was."""
    _edit(folder, lambda c: c.update(date="20200101_120000"))
    for path in folder.rglob("record_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        early = [line | {"run": "20200101T040000.000000Z"} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in early))
    for path in folder.rglob("run_facts_*.json"):
        facts = json.loads(path.read_text()) | {"run": "20200101T040000.000000Z"}
        path.unlink()
        path.with_name("run_facts_20200101T040000.000000Z_rank0.json").write_text(json.dumps(facts))


@pytest.mark.slow
def test_a_worse_rpn_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model, and the same with noise in its RPN's weights."""
    from sdrpn import ZoomModel
    from sdrpn_eval.demo import embedded_model

    monkeypatch.delenv("SDRPN_DATA", raising=False)
    folder, rpn = embedded_model()
    engine = ZoomModel.from_pretrained(folder, rpn, dtype="float32")
    engine.zoom = replace(engine.zoom, policy="strongest")
    base = tmp_path / "b.json"
    evaluate(tmp_path / "good", engine, ["tiny_vstar"], limit=60)
    assert run_gate(tmp_path / "good", base, "--update")[0] == 0
    evaluate(tmp_path / "again", engine, ["tiny_vstar"], limit=60)
    assert run_gate(tmp_path / "again", base, "--tolerance", "0")[0] == 0
    assert engine.rpn is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in engine.rpn.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
    evaluate(tmp_path / "worse", engine, ["tiny_vstar"], limit=60)
    code, line = run_gate(tmp_path / "worse", base)
    assert code == 1
    assert "gate: fell: tiny_vstar accuracy" in line
