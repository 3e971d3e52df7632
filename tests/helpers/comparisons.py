"""Comparisons and gates on run folders written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.results.baseline import MetricBaseline, TaskBaseline
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


def metric(scores: Sequence[float | None], better: bool = True) -> MetricBaseline:
    """A metric of a baseline, by hand."""
    known = [score for score in scores if score is not None]
    return MetricBaseline(better, sum(known) / len(known), list(scores))


def task(
    scores: Sequence[float | None],
    clusters: Sequence[int] | None = None,
    *,
    better: bool = True,
    empty: int = 0,
    **more: MetricBaseline,
) -> TaskBaseline:
    """A task of a baseline with the metric `accuracy`, and more; each on an image of its own."""
    n = len(scores)
    return TaskBaseline(
        documents=list(range(n)),
        questions=["q"] * n,
        images=[None] * n,
        clusters=list(range(n) if clusters is None else clusters),
        clustered_by="images",
        empty_answers=empty,
        scorer=None,
        settings="s",
        metrics={"accuracy,none": metric(scores, better)}
        | {f"{name},none": value for name, value in more.items()},
    )
