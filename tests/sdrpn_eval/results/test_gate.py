"""Runs that lmms-eval calls good, and a gate does not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdrpn_eval.results import gate
from sdrpn_eval.results.baseline import TaskBaseline, read_baseline
from sdrpn_eval.results.gate import Broken, check, check_rules, check_run, safely_check
from sdrpn_eval.results.read import BadRun, read_run
from sdrpn_eval.results.verdicts import BROKEN, PASSED, Rules
from tests.helpers.comparisons import N, metric, rows, run_gate, task
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
    assert f"another scorer than the baseline's: {setting} is " in line


def test_another_scorer_is_named_by_what_changed(tmp_path: Path) -> None:
    base = tmp_path / "b.json"
    run_gate(write_run(tmp_path / "good", {"x": rows()}), base, "--update")
    run = write_run(tmp_path / "run", {"x": rows()}, config={"repeats": 3, "score_key": "points"})
    told = "gate: broken: x accuracy: another scorer than the baseline's: "
    assert run_gate(run, base) == (
        2,
        f"{told}score_key is points, was score; repeats is 3, was None",
    )
    older = json.loads(base.read_text())
    del older["tasks"]["x"]["scoring"]
    base.write_text(json.dumps(older))
    assert run_gate(run, base) == (2, f"{told}its settings changed")


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


# By hand


@pytest.fixture
def held() -> dict[str, TaskBaseline]:
    """Two tasks, of shares and of points up to 20, which also have a score that should be low."""
    points = metric([5.0] * 14, better=False)
    return {"x": task([1.0] * 14), "y": task([20.0] * 14, points=points)}


@pytest.mark.parametrize(
    "rules",
    [
        Rules({}),
        Rules({}, 0.00021),
        Rules({"x": 0.5}, 0.0002),  # one task waits for its p, which can be 0.0001
        Rules({"": 0.5}, 1e-9),
        Rules({"x": 0.0, "y": 19.9}),
        Rules({"": 5.0, "x": 0.99}),
        Rules({"y": 1e6}, metrics={"y": "points"}),  # it can rise without end
    ],
)
def test_rules_that_can_have_an_effect(rules: Rules, held: dict[str, TaskBaseline]) -> None:
    check_rules(rules, held)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules({}, 0.0), "--alpha must be in (0, 1), got 0"),
        (Rules({}, 1.0), "--alpha must be in (0, 1), got 1"),
        (Rules({}, math.nan), "--alpha must be in (0, 1), got nan"),
        (Rules({"z": 0.1}), "--tolerance z=0.1: the baseline has no task z, only x, y"),
        (
            Rules({}, metrics={"z": "accuracy"}),
            "--metric z=accuracy: the baseline has no task z, only x, y",
        ),
        (
            Rules({"": 1.0}),
            "--tolerance 1 would pass every fall: scores of x can fall by 1 at most; give a value "
            "in [0, 1)",
        ),
        (
            Rules({"": 20.0, "x": 0.5}),
            "--tolerance 20 would pass every fall: scores of y can fall by 20 at most; give a "
            "value in [0, 20)",
        ),
        (
            Rules({"y": 20.5}),
            "--tolerance y=20.5 would pass every fall: scores of y can fall by 20 at most; give a "
            "value in [0, 20)",
        ),
        (Rules({"x": -0.1}), "--tolerance x=-0.1 must be a finite number, 0 or more"),
        (Rules({"": math.nan}), "--tolerance nan must be a finite number, 0 or more"),
        (
            Rules({"y": math.inf}, metrics={"y": "points"}),
            "--tolerance y=inf must be a finite number, 0 or more",
        ),
        (
            Rules({}, 0.0002),
            "--alpha 0.0002 cannot be reached: the smallest p-value of 2 task(s) is 0.0002; give "
            "a larger --alpha, or a --tolerance",
        ),
        (
            Rules({"x": 0.1}, 0.0001),
            "--alpha 0.0001 cannot be reached: the smallest p-value of 1 task(s) is 0.0001; give "
            "a larger --alpha, or a --tolerance",
        ),
    ],
)
def test_rules_that_cannot_mean_anything(
    rules: Rules, message: str, held: dict[str, TaskBaseline]
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_rules(rules, held)


def test_a_run_that_cannot_be_read_has_one_verdict(tmp_path: Path, baseline: Path) -> None:
    stored = read_baseline(baseline)
    (one,) = check(tmp_path / "gone", stored, Rules({}))
    assert (one.task, one.metric, one.code) == ("run", "", BROKEN)
    gone = f"{tmp_path / 'gone'} does not exist; give the --output_path of an lmms-eval run"
    assert one.reason == gone
    other = write_run(tmp_path / "other", {"z": rows(n=1)})
    (one,) = check(other, stored, Rules({}))
    first, second = one.reason.split("; ")
    assert first.endswith("has no results for x")
    assert second.endswith("has no results for y")
    (one,) = check(other, replace(stored, tasks={}), Rules({}))
    assert (one.code, one.reason) == (BROKEN, f"{other}: the baseline holds no task")


def test_an_error_of_any_other_kind_is_no_fall(
    tmp_path: Path, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(gate, "check", crash)
    (one,) = safely_check(tmp_path, read_baseline(baseline), Rules({}))
    assert (one.task, one.metric, one.code) == ("run", "", BROKEN)
    assert one.reason == f"{tmp_path} cannot be read as a run: RuntimeError: boom"
    with pytest.raises(ValueError, match="--alpha must be in"):
        safely_check(tmp_path, read_baseline(baseline), Rules({}, 2.0))


def test_a_broken_task_does_not_hide_another(tmp_path: Path, baseline: Path) -> None:
    run = write_run(tmp_path / "run", {"x": rows(n=10), "y": rows()})
    broken, passed = check(run, read_baseline(baseline), Rules({}))
    assert (broken.task, broken.metric, broken.code) == ("x", "accuracy,none", BROKEN)
    assert broken.reason == "30 of the baseline's 40 documents are missing, such as 10"
    assert (passed.task, passed.code, passed.reason) == ("y", PASSED, "did not fall")
    one = write_run(tmp_path / "one", {"x": [*rows()[:39]], "y": rows()})
    assert check(one, read_baseline(baseline), Rules({}))[0].reason == (
        "1 of the baseline's 40 documents is missing, such as 39"
    )


def test_the_age_of_results_is_counted_from_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun at noon, they took 10 seconds, and a second more as both are whole ones."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 3, 11, 12, 0, 11, tzinfo=tz)

    monkeypatch.setattr(gate, "datetime", Clock)
    run = read_run(write_run(tmp_path / "run", {"x": rows(n=1)}))
    check_run(run)
    check_run(run, timedelta(hours=240))
    message = f"^{re.escape(str(run.file))}: the results are 240.0 hours old: this run left none$"
    with pytest.raises(BadRun, match=message):
        check_run(run, timedelta(hours=240, seconds=-1))


def test_documents_that_may_be_skipped() -> None:
    def evidence(skipped: dict[str, int] | None) -> Any:
        return SimpleNamespace(
            facts=skipped if skipped is None else SimpleNamespace(skipped=skipped)
        )

    gate.refuse_skipped(evidence(None), "toy", 0)
    gate.refuse_skipped(evidence({"other": 5}), "toy", 0)
    gate.refuse_skipped(evidence({"toy": 3}), "toy", 3)
    message = (
        "3 document(s) of toy were skipped or answered without a second look (on_error; see "
        "`error` in the record); mend them, or allow as many: --allow-skipped 3"
    )
    with pytest.raises(Broken, match=f"^{re.escape(message)}$"):
        gate.refuse_skipped(evidence({"toy": 3}), "toy", 2)


def test_what_an_update_says(tmp_path: Path) -> None:
    """Notes, then the file; the tolerance of the file before is kept unless another is given."""
    base, folder = tmp_path / "b.json", tmp_path / "run"
    run = write_run(folder, {"x": rows(n=3), "y": rows()})
    note, last = gate.update_baseline(folder, base, Rules({}))
    assert note.startswith("note: x: only 3 images can fall, too few to tell a fall from noise (")
    assert note.endswith("are needed; until then every fall fails, unless a --tolerance is given")
    file = next(run.rglob("*_results.json"))
    assert last == f"{base}: x by accuracy,none, y by accuracy,none, from {file}"
    assert gate.update_baseline(folder, base, Rules({"": 0.1})) == [last]
    assert gate.update_baseline(folder, base, Rules({})) == [last]
    assert read_baseline(base).tolerance == {"": 0.1}
    assert gate.update_baseline(folder, base, Rules({"x": 0.2})) == [last]
    assert read_baseline(base).tolerance == {"x": 0.2}
    before = base.read_text()
    with pytest.raises(ValueError, match="--tolerance y=2 would pass every fall"):
        gate.update_baseline(folder, base, Rules({"y": 2.0}))
    with pytest.raises(BadRun, match="hours old"):
        gate.update_baseline(folder, base, Rules({}, max_age=timedelta(seconds=1)))
    assert base.read_text() == before
