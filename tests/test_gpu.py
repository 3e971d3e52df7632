"""What holds on a GPU: the answers of the CPU in float32, at any batch size, and half precision.

On a machine without one the same tests run on the CPU; benchmarks/gpu.sh runs them with a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.demo import tiny_path
from tests.conftest import QUESTIONS
from tests.helpers.families import FAMILIES, NEW_TOKENS
from tools.tiny_vstar.score import GENERATION, is_right
from tools.tiny_vstar.tune import benchmark_rows

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("SDRPN_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = {"max_new_tokens": NEW_TOKENS}


def asked(family: str, device: str, batch: int, **zoom: Any) -> list[Answer]:
    """Answers of a family's tiny model, with its weights on a device."""
    one = FAMILIES[family]()
    one.backbone.model.to(device)
    engine = ZoomModel(one.backbone, one.rpn, zoom=replace(one.zoom, **zoom))
    questions = [Question(text, (image,)) for image in one.images for text in QUESTIONS]
    starts = range(0, len(questions), batch)
    return [a for i in starts for a in engine.ask_batch(questions[i : i + batch], SETTINGS)]


@pytest.mark.parametrize("zoom", [{}, {"keep_tokens": 8}, {"gate": 0.02}], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_answers_are_those_of_the_cpu_at_any_batch_size(family: str, zoom: dict[str, Any]) -> None:
    reference = asked(family, "cpu", 1, **zoom)
    assert any(answer.regions for answer in reference)
    for batch in (1, 5):
        found = asked(family, DEVICE, batch, **zoom)
        for answer, expected in zip(found, reference, strict=True):
            assert answer.text == expected.text
            assert answer.regions == expected.regions
            if expected.roi_map is not None:
                assert answer.roi_map is not None
                assert np.abs(answer.roi_map - expected.roi_map).max() < 1e-4


def score(dtype: str, zoom: ZoomConfig, rows: Sequence[dict[str, Any]]) -> float:
    llava = Llava15.load(str(tiny_path()), dtype=dtype, device=DEVICE)
    engine = ZoomModel(llava, RPN.from_pretrained(str(tiny_path() / "rpn")), zoom=zoom)
    questions = [Question(row["question"], (row["picture"],)) for row in rows]
    answers = engine.ask_batch(questions, GENERATION)
    return sum(is_right(a.text, r) for a, r in zip(answers, rows, strict=True)) / len(rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_costs_little(dtype: str) -> None:
    """By the way, stock answers about half of these questions."""
    rows = benchmark_rows(60)
    zoom = ZoomConfig(threshold="peak", min_cells=1)
    assert score(dtype, zoom, rows) >= score("float32", zoom, rows) - 0.05 >= 0.8
