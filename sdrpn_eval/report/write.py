"""Writes a comparison as JSON, Markdown and a page, and prints its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from sdrpn.boxes import PixelBox
from sdrpn_eval.report import text
from sdrpn_eval.report.html import BUDGET_MB, write_page
from sdrpn_eval.results.comparability import Evidence
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.comparison import Comparison
from sdrpn_eval.results.documents import Documents
from sdrpn_eval.results.read import Run
from sdrpn_eval.results.scores import Document


def write_comparison(
    runs: Sequence[Run | Evidence],
    data: Mapping[str, Documents],
    stem: Path,
    *,
    boxes: Mapping[Document, PixelBox] | None = None,
    budget_mb: float = BUDGET_MB,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> tuple[Comparison, list[str]]:
    """Compares runs with the first; writes STEM.json, STEM.md and STEM.html.

    Args:
        runs: Runs, or runs whose records have been read.
        data: Documents by task, for tasks that are on this machine.
        stem: Path of the files, without their suffix.
        boxes: True boxes by document, in pixels of its image.
        budget_mb: Maximum size of the page.
        seed: Of intervals, tests and the choice of pictures.
        notes: Sentences about data that is missing here.

    Returns:
        The comparison, and these notes with those about what the page leaves out.

    Raises:
        NotComparable: If runs differ in more than the model; names what differs.
    """
    comparison = compare(runs, data, boxes, seed)
    stem.parent.mkdir(parents=True, exist_ok=True)
    comparison.save(stem.with_suffix(".json"))
    stem.with_suffix(".md").write_text(text.markdown(comparison), encoding="utf-8")
    page = stem.with_suffix(".html")
    notes = write_page(comparison, data, page, budget_mb=budget_mb, seed=seed, notes=notes)
    return comparison, notes


def show(comparison: Comparison, notes: Sequence[str], console: Console) -> None:
    """Prints tables, verdicts, cautions and notes."""
    text.show(comparison, console)
    for line in notes:
        console.print(f"note: {line}", highlight=False, markup=False)
