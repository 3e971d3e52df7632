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
    """One document's part in the three metrics; `image_id` is what intervals are clustered by.

    A document of another group has its entry without a score, so that every metric sees every
    document and lmms-eval counts samples right.
    """
    response = " ".join(results[0].lower().split())
    correct = response in (doc["answer"], f"{doc['colour']} {doc['answer']}")
    item: dict[str, Any] = {"image_id": doc["image_id"], "score": float(correct)}
    unscored = {"image_id": doc["image_id"]}
    groups = {g: item if doc["category"] == g else unscored for g in ("fine", "coarse")}
    return {"accuracy": item} | {f"accuracy_{g}": entry for g, entry in groups.items()}
