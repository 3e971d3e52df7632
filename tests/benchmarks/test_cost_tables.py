"""The cost of Qwen2.5-VL by formula: ratios at 7B's proportions, memory, and the page's tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cost_tables
from benchmarks.cost_tables import prefix_bytes, ratio, rpn_parameters
from benchmarks.shapes_qwen import QWEN_SHAPES, QwenShape, qwen_rpn, random_qwen, with_tokens
from sdrpn.config import RPNConfig
from sdrpn.inference.prefix import prefill
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import make_image

SPEED = Path(__file__).parents[2] / "docs" / "speed.md"
SEVEN = QWEN_SHAPES["7b"]


def test_sdrpn_costs_a_third_of_stock_with_4096_tokens() -> None:
    assert ratio(SEVEN, 1) <= 0.36
    assert ratio(SEVEN, 4) <= 0.23
    # Also where masked keys are not counted, which favours long prompts.
    assert ratio(SEVEN, 1) < ratio(SEVEN, 1, unmasked=True) <= 0.36
    assert ratio(SEVEN, 4) < ratio(SEVEN, 4, unmasked=True) <= 0.23


def test_the_language_model_of_7b_by_hand() -> None:
    # Per token and layer: q and o of 3584 squared, k and v of 3584 x 512, an MLP of 3 x 18944.
    weights = 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    tokens = 15 + 4096 + 60
    prefill_of_stock = 28 * (2 * weights * tokens + 4 * tokens**2 * 3584)
    sizes = cost_tables.sizes_of(SEVEN, 4096)
    stations = cost_tables.FORMULAS["stock"](sizes, cost_tables.Load(1, 60, 0, 4))
    assert stations["prefill"] == prefill_of_stock


def test_a_prefix_by_hand() -> None:
    # 28 layers and 2 of the RPN, keys and values of 4 heads of 128, two bytes; then the map's keys.
    assert prefix_bytes(SEVEN, 576) == 30 * 2 * 591 * 512 * 2 + 576 * 512 * 2


def test_a_prefix_is_as_large_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = QwenShape(5, 64, 96, 4, 2, 700, 3, 32, 48, 2, (1,))
    qwen = with_tokens(random_qwen(shape, "toy", torch.bfloat16), 36)
    (ready,) = qwen.preprocess([make_image(112, 112, 1)])
    (prefix,) = prefill(qwen, qwen_rpn(qwen), [ready])
    monkeypatch.setattr(cost_tables, "HEAD_TOKENS", len(qwen.head_ids))
    assert prefix.image_tokens == 36
    assert prefix.nbytes == prefix_bytes(shape, 36)


@pytest.mark.parametrize(
    ("name", "millions"), [("3b", 159), ("7b", 481), ("32b", 1007), ("72b", 1831)]
)
def test_parameters_of_an_rpn(name: str, millions: int) -> None:
    shape = QWEN_SHAPES[name]
    assert round(rpn_parameters(shape) / 1e6) == millions
    few = replace(shape, layers=5, vocabulary=700, vision_layers=1, full_attention=(0,))
    with torch.device("meta"):
        rpn = RPN(RPNConfig(**random_qwen(few, name, device="meta").rpn_shape(), depth=3))
    assert sum(p.numel() for p in rpn.parameters()) == rpn_parameters(shape)


def test_the_page_has_these_tables() -> None:
    between = SPEED.read_text().partition(cost_tables.BEGIN)[2].partition(cost_tables.END)[0]
    assert between.strip() == cost_tables.section()
