"""`make demo`: stock and second look through lmms-eval, compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdrpn_eval.demo import HERE, run


def test_what_is_shipped_is_small() -> None:
    shipped = [p for p in HERE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in shipped) < 10e6


@pytest.mark.slow
def test_demo_fails_loudly_when_lmms_eval_leaves_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TASK", "no_such_task")
    with pytest.raises(run.EvaluationFailed, match="wrote no results for stock"):
        run.evaluate("stock", tmp_path, 4, 2)


@pytest.mark.slow
def test_demo_on_a_few_documents(tmp_path: Path) -> None:
    summary = run.demo(tmp_path, batch_size=8, limit=12)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["n"] == 12
    assert set(summary["accuracy"]) == {"stock", "rpn", "attention"}
    low, high = summary["gain_interval_95"]
    assert low <= summary["gain"] <= high
    assert (tmp_path / "contact_sheet.png").stat().st_size > 50_000
