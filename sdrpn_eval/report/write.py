"""Runs compared and written down: JSON, Markdown and the page, and the tables in the terminal."""

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
from sdrpn_eval.results.scores import Document


def write_comparison(
    evidence: Sequence[Evidence],
    data: Mapping[str, Documents],
    stem: Path,
    *,
    boxes: Mapping[Document, PixelBox] | None = None,
    budget_mb: float = BUDGET_MB,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> tuple[Comparison, list[str]]:
    """Compare runs with the first; write STEM.json, STEM.md and STEM.html.

    notes: about data that is not here. Returns the comparison, and those notes with what the page
    leaves out. Raises NotComparable, naming what moved.
    """
    comparison = compare(evidence, data, boxes, seed)
    stem.parent.mkdir(parents=True, exist_ok=True)
    comparison.save(stem.with_suffix(".json"))
    stem.with_suffix(".md").write_text(text.markdown(comparison), encoding="utf-8")
    page = stem.with_suffix(".html")
    notes = write_page(comparison, data, page, budget_mb=budget_mb, seed=seed, notes=notes)
    return comparison, notes


def show(comparison: Comparison, notes: Sequence[str], console: Console) -> None:
    """Print the tables, the verdicts and all that is to be said about them."""
    text.show(comparison, console)
    for line in notes:
        console.print(f"note: {line}", highlight=False, markup=False)
