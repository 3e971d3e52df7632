"""tiny_vstar: exact match of the pattern's word, on all questions and by fine and coarse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sdrpn_eval
from sdrpn_eval import scoring

PARQUET = str(Path(sdrpn_eval.__file__).parent / "demo" / "data" / "tiny_vstar.parquet")
"""The shipped documents. (`!function` hands lmms-eval any attribute of this module.)"""
mean_score = scoring.mean_score


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """One document's part in the three metrics."""
    return scoring.match_by_group(
        results[0], doc, name=doc["colour"], own=[doc["category"]], groups=("fine", "coarse")
    )
