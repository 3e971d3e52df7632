"""The paper's numbers, found by model, task and metric."""

from __future__ import annotations

from typing import Any

import pytest

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
    assert published({}, "pope", "pope_f1_score", "llava_sdrpn") == 87.1
    assert set(COLUMN_OF.values()) < set(PUBLISHED["7b", "rpn"])


TOKEN = 784


@pytest.mark.parametrize(
    ("arguments", "task", "metric", "score"),
    [
        ({}, "docvqa_val", "anls", 93.6),  # the default is Qwen2.5-VL-7B
        ({"proposer": "none"}, "docvqa_val_public", "anls", 92.0),
        ({"pretrained": "Qwen/Qwen2.5-VL-3B-Instruct"}, "textvqa_val", "exact_match", 79.7),
        ({"pretrained": "/models/Qwen2.5-VL-3B-Instruct"}, "pope", "pope_accuracy", 89.3),
        # V* and HR-Bench were run at a higher resolution, stock up to 4096 tokens.
        ({}, "vstar", "accuracy", None),
        ({"max_pixels": 3072 * TOKEN}, "vstar", "accuracy", 89.5),
        ({"max_pixels": 3072 * TOKEN}, "docvqa_val", "anls", None),
        ({"max_pixels": 4096 * TOKEN, "proposer": "none"}, "vstar", "accuracy", 78.0),
        ({"max_pixels": 3072 * TOKEN, "proposer": "none"}, "vstar", "accuracy", None),
        ({"max_pixels": 4096 * TOKEN}, "hrbench8k", "average", 73.5),
        ({"max_pixels": 4096 * TOKEN}, "vstar", "accuracy", None),
        # Without the sentence that asks for a short answer it is another protocol.
        ({"preset": None}, "docvqa_val", "anls", None),
        ({"proposer": "attention"}, "docvqa_val", "anls", None),
        ({"pretrained": "Qwen/Qwen2.5-VL-72B-Instruct"}, "docvqa_val", "anls", None),
    ],
)
def test_published_numbers_of_qwen_need_its_protocol(
    arguments: dict[str, Any], task: str, metric: str, score: float | None
) -> None:
    given = {"preset": "paper", **arguments}
    assert published_score("qwen2_5_vl_sdrpn", given, task, metric) == score
