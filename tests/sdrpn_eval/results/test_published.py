"""The paper's numbers, found by model, task and metric."""

from __future__ import annotations

from typing import Any

from sdrpn_eval.results.published import COLUMN_OF, PUBLISHED, published_score


def test_published_numbers_are_found_by_model_and_task() -> None:
    def published(given: dict[str, str], task: str, metric: str, model: str = "llava_sdrpn") -> Any:
        return published_score(model, given, task, metric)

    seven = {"pretrained": "llava-hf/llava-1.5-7b-hf"}
    stock = {**seven, "proposer": "none"}
    assert published(seven, "textvqa_val", "exact_match") == 58.7
    assert published({}, "textvqa_val", "exact_match") == 58.7  # the default is LLaVA-1.5-7B
    assert published(stock, "textvqa_val", "exact_match") == 46.1
    assert published(seven, "pope", "pope_f1_score", "llava_hf") == 85.9
    thirteen = {"pretrained": "llava-hf/llava-1.5-13b-hf", "proposer": "vicrop"}
    assert published(thirteen, "vstar", "accuracy") == 51.8
    for other in ({**seven, "proposer": "attention"}, {"pretrained": "tiny"}):
        assert published(other, "textvqa_val", "exact_match") is None
    assert published(seven, "textvqa_val", "exact_match", "qwen2_5_vl") is None
    assert published(seven, "textvqa_val_lite", "exact_match") is None
    assert published(stock, "textvqa_val_ocr", "exact_match") == 58.2
    assert published(seven, "textvqa_val_ocr", "exact_match") is None
    assert set(COLUMN_OF.values()) < set(PUBLISHED["7b", "rpn"])
