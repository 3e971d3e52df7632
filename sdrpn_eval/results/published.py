"""The paper's scores (arXiv 2509.16944), and our tasks and metrics for its columns.

In percent. `throughput` is relative to stock on one A6000. The paper's TextVQA prompt carries no
OCR tokens; with them (as in LLaVA's own evaluation) stock LLaVA-1.5-7B is at 58.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdrpn.backbones import qwen25_vl_published as qwen
from sdrpn.model_registry import LLAVA_7B, QWEN_7B

_TABLE = """
size method throughput docvqa chartqa ocrbench infovqa textvqa vstar_attribute vstar_spatial
 vstar_overall pope_f1 pope_accuracy hrbench4k hrbench8k
7b  stock  1 21.5 18.1 31.4 20.4 46.1 48.7 52.6 50.3 85.9 87.4 37.5 33.8
7b  S2     0.7 27.1 18.9 32.6 22.5 52.6 53.0 59.1 55.5 87.1 87.9 44.0 38.5
7b  vicrop 0.42 27.0 20.0 33.2 21.4 57.2 53.9 50.0 52.4 88.0 88.6 47.8 36.1
7b  rpn    0.62 33.9 20.1 37.0 22.0 58.7 67.8 67.1 67.5 87.1 87.8 48.0 39.1
13b stock  1 23.5 18.1 33.7 23.4 48.7 47.0 56.6 50.8 85.9 87.1 43.0 36.6
13b S2     0.71 30.7 20.3 36.4 24.7 54.5 43.5 59.2 49.7 87.3 88.1 49.1 42.9
13b vicrop 0.39 30.2 20.1 36.1 25.9 60.3 47.8 57.9 51.8 88.0 88.7 53.3 40.6
13b rpn    0.51 39.7 21.4 38.8 24.7 62.3 59.1 67.1 62.3 87.3 88.1 52.8 43.6
qwen-3b stock 1   87.1 82.6 73.8 62.7 76.9 81.7 60.5 73.3 87.8 88.6 66.3 58.9
qwen-3b rpn  0.56 89.5 83.8 76.3 67.0 79.7 91.3 65.8 81.2 88.9 89.3 73.1 65.3
qwen-7b stock 1   92.0 82.6 81.5 70.2 81.1 80.0 75.0 78.0 86.7 87.9 72.5 63.6
qwen-7b rpn  0.57 93.6 85.5 82.9 76.9 83.5 96.5 79.0 89.5 88.4 88.9 78.5 73.5
"""


def _parsed(table: str) -> dict[tuple[str, str], dict[str, float]]:
    header, *rows = table.strip().replace("\n ", " ").splitlines()
    columns = header.split()[2:]
    cells = [row.split() for row in rows]
    return {(s, m): dict(zip(columns, map(float, v), strict=True)) for s, m, *v in cells}


PUBLISHED: Mapping[tuple[str, str], Mapping[str, float]] = _parsed(_TABLE)
"""Scores by (size, method) and column."""

COLUMN_OF: Mapping[tuple[str, str], str] = {
    ("docvqa_val", "anls"): "docvqa",
    ("chartqa", "relaxed_overall"): "chartqa",
    ("ocrbench", "ocrbench_accuracy"): "ocrbench",
    ("infovqa_val", "anls"): "infovqa",
    ("textvqa_val", "exact_match"): "textvqa",
    ("vstar_direct_attributes", "accuracy"): "vstar_attribute",
    ("vstar_relative_position", "accuracy"): "vstar_spatial",
    ("vstar", "accuracy"): "vstar_overall",
    ("vstar_bench", "vstar_overall_acc"): "vstar_overall",
    ("vstar_bench_direct_attributes", "vstar_direct_attributes_acc"): "vstar_attribute",
    ("vstar_bench_relative_position", "vstar_relative_position_acc"): "vstar_spatial",
    ("pope", "pope_f1_score"): "pope_f1",
    ("pope", "pope_accuracy"): "pope_accuracy",
    ("hrbench4k", "average"): "hrbench4k",
    ("hrbench8k", "average"): "hrbench8k",
    ("hrbench4k_offline", "average"): "hrbench4k",
    ("hrbench8k_offline", "average"): "hrbench8k",
    ("vstar_harness", "vstar_overall_acc"): "vstar_overall",
    ("vstar_harness", "vstar_direct_attributes_acc"): "vstar_attribute",
    ("vstar_harness", "vstar_relative_position_acc"): "vstar_spatial",
}
"""Columns by (task, metric), for whole datasets only; `X_public` counts as X."""

WITH_OCR: Mapping[tuple[str, str], float] = {("7b", "stock"): 58.2, ("13b", "stock"): 61.3}
"""`textvqa_val_ocr` from the paper of LLaVA-1.5 (arXiv 2310.03744), by row."""


def row_of(model: str, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    """The published row that a run corresponds to; None for other models and proposers."""
    proposer = str(arguments.get("proposer", "rpn"))
    method = "stock" if model == "llava_hf" or proposer == "none" else proposer
    if model == "qwen2_5_vl_sdrpn":
        name = str(arguments.get("pretrained", QWEN_7B)).lower()
        follows_paper = arguments.get("short_answer") is True or arguments.get("preset") == "paper"
        known = follows_paper and "qwen2.5-vl-" in name
        size = next((f"qwen-{size}" for size in ("3b", "7b") if f"-{size}" in name), "")
    else:
        name = str(arguments.get("pretrained", LLAVA_7B)).lower()
        known = model in ("llava_sdrpn", "llava_hf") and "llava" in name and "1.5" in name
        size = next((size for size in ("13b", "7b") if size in name), "")
    return (size, method) if known and (size, method) in PUBLISHED else None


def _is_published_resolution(
    row: tuple[str, str], column: str, arguments: Mapping[str, Any]
) -> bool:
    """Whether a run of Qwen2.5-VL has the image tokens of a column's published score."""
    least, most = (
        int(arguments.get(name, qwen.PIXELS)) // qwen.CELL_PIXELS
        for name in ("min_pixels", "max_pixels")
    )
    benchmark = column.partition("_")[0]
    if benchmark not in ("vstar", "hrbench4k", "hrbench8k"):
        return (least, most) == (576, 576)
    if row[1] == "stock":
        return most == 4096
    (size,) = (one for one in qwen.SIZES if one.base.lower().endswith(f"{row[0][5:]}-instruct"))
    runs = size.high_resolution.get(benchmark) or size.high_resolution["hrbench"]
    return any((run.least, run.most) == (least, most) for run in runs)


def published_score(
    model: str, arguments: Mapping[str, Any], task: str, metric: str
) -> float | None:
    """The paper's score, in percent, for a metric of a task or group.

    None if it has none for the model with these arguments, as resolved or as given.
    """
    column, row = COLUMN_OF.get((task.removesuffix("_public"), metric)), row_of(model, arguments)
    if row and (task, metric) == ("textvqa_val_ocr", "exact_match"):
        return WITH_OCR.get(row)
    if not column or not row:
        return None
    if row[0].startswith("qwen") and not _is_published_resolution(row, column, arguments):
        return None
    return PUBLISHED[row][column]
