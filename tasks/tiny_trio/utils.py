"""tiny_trio: exact match of a word or digit, on all questions, by kind and by fine and coarse."""

from __future__ import annotations

from typing import Any

from sdrpn_eval import scoring
from sdrpn_eval.demo import TRIO_BENCHMARK

PARQUET = str(TRIO_BENCHMARK)
"""The shipped documents. (`!function` hands lmms-eval any attribute of this module.)"""
GROUPS = ("fine", "coarse", "vstar", "textvqa", "docvqa")
mean_score = scoring.mean_score
doc_to_visual, doc_to_text = scoring.doc_to_visual, scoring.doc_to_text


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """One document's part in the metrics."""
    own = (doc["category"], doc["group"])
    return scoring.match_by_group(results[0], doc, name=doc["name"], own=own, groups=GROUPS)
