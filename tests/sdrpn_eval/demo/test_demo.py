"""`make demo`: stock and second look through lmms-eval, compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdrpn_eval.demo import HERE, run
from sdrpn_eval.results.ladder import RunFailed, make_run


@pytest.mark.parametrize(("model", "data"), [("tiny", "tiny_vstar"), ("trio", "tiny_trio")])
def test_what_is_shipped_is_small(model: str, data: str) -> None:
    shipped = [*(HERE / model).rglob("*"), *(HERE / "data").glob(f"{data}.*")]
    assert sum(p.stat().st_size for p in shipped if p.is_file()) < 10e6


@pytest.mark.slow
def test_demo_fails_loudly_when_lmms_eval_leaves_no_results(tmp_path: Path) -> None:
    plan = run.Demo(tmp_path, "no_such_task", "pretrained=tiny", 2, "4")
    with pytest.raises(RunFailed, match=r"lmms-eval left no results in .*stock"):
        make_run(plan, "none")


@pytest.mark.slow
def test_demo_on_a_few_documents(tmp_path: Path) -> None:
    comparison = run.demo(tmp_path, batch_size=8, limit=12)
    assert comparison.as_dict() == json.loads((tmp_path / "comparison.json").read_text())
    assert [one.name for one in comparison.runs] == ["stock", "rpn", "attention"]
    row = comparison.rows[0]
    assert (row.metric, row.questions) == ("accuracy", 12)
    # The shipped weights, on the first 12 questions.
    assert [round(12 * score.mean) for score in row.scores] == [7, 12, 12]
    assert (tmp_path / "contact_sheet.png").stat().st_size > 50_000
    assert (tmp_path / "comparison.html").exists()
    assert list((tmp_path / "stock").rglob("*_results.json"))
