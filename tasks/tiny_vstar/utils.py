"""tiny_vstar: exact match of the pattern's word, on all questions and by fine and coarse."""

from __future__ import annotations

from typing import Any

from sdrpn_eval import scoring
from sdrpn_eval.demo import BENCHMARK

PARQUET = str(BENCHMARK)
"""The shipped documents. (`!function` hands lmms-eval any attribute of this module.)"""
mean_score = scoring.mean_score
doc_to_visual, doc_to_text = scoring.doc_to_visual, scoring.doc_to_text


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """One document's part in the three metrics."""
    return scoring.match_by_group(
        results[0], doc, name=doc["colour"], own=[doc["category"]], groups=("fine", "coarse")
    )
