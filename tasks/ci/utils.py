"""The documents of each subset, and OCRBench's mean over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdrpn_eval import scoring
from sdrpn_eval.subsets import subset

mean_score = scoring.mean_score


def _of(task: str) -> Callable[[Any], Any]:
    def process_docs(dataset: Any) -> Any:
        return subset(task, dataset)

    return process_docs


textvqa, docvqa, infovqa = _of("textvqa_ci"), _of("docvqa_ci"), _of("infovqa_ci")
chartqa, ocrbench, pope = _of("chartqa_ci"), _of("ocrbench_ci"), _of("pope_ci")
