"""Comparisons and gates on run folders written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.results.comparability import NotComparable
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.comparison import Comparison, MetricRow
from sdrpn_eval.results.read import read_run
from tests.helpers.run_folders import (
    sample,
    write_run,
)

STOCK = "pretrained=tiny,proposer=none"


def pair(tmp_path: Path, first: list, second: list, **more: Any) -> tuple[Path, Path]:
    """Two runs of the task `toy`; more: for the second one."""
    a = write_run(tmp_path / "stock", {"toy": first}, model_args=STOCK)
    return a, write_run(tmp_path / "rpn", {"toy": second}, **more)


def compared(*folders: Path, **more: Any) -> Comparison:
    return compare([read_run(folder) for folder in folders], **more)


def row_of(comparison: Comparison, task: str, metric: str) -> MetricRow:
    (row,) = [r for r in comparison.rows if (r.task, r.metric) == (task, metric)]
    return row


def refusal(*folders: Path) -> str:
    with pytest.raises(NotComparable) as error:
        compared(*folders)
    return str(error.value)


N = 40


def rows(wrong: int = 0, n: int = N) -> list[dict[str, Any]]:
    return [sample(i, "blue" if i < wrong else "red") for i in range(n)]


def run_gate(run: Path, baseline: Path, *words: str) -> tuple[int, str]:
    """(exit code, the last line)."""
    done = CliRunner().invoke(app, ["gate", str(run), "--baseline", str(baseline), *words])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output.strip().splitlines()[-1]
