"""Costs against numbers worked out by hand, at the proportions of LLaVA-1.5-7B (docs/speed.md)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdrpn.costs import Costs, relative_cost
from sdrpn.question import Answer
from tests.helpers.families import FAMILIES

# A weight per layer: what is counted is tokens times layers.
UNIT = Costs(layer=1, layers=32, branch=15, rpn=2, encoder=0, head=0, text_before=35)
MAP = np.zeros((24, 24), dtype=np.float32)
STOCK = Answer("", (), None, "proposer none", 576, 0, 60, 0)
ZOOMED = Answer("", (), MAP, None, 576, 576, 60, 0)
NO_REGION = replace(STOCK, roi_map=MAP, reason="no cell over the threshold 0.15")


def test_stock_and_prefix() -> None:
    assert UNIT.stock(STOCK) == 671 * 32
    assert UNIT.image([STOCK]) == 611 * 32  # nobody looked
    assert UNIT.image([NO_REGION]) == 611 * 32 + 611 * 2
    assert UNIT.question(STOCK) == 1920


def test_a_question_without_a_region_is_run_once() -> None:
    assert UNIT.question(NO_REGION) == 1920 + 120


def test_a_zoom_looks_and_reads_the_crop() -> None:
    assert UNIT.question(ZOOMED) == 60 * 17 + 636 * 32
    assert UNIT.question(replace(ZOOMED, crop_tokens=64)) == 1020 + 124 * 32


def test_a_gate_costs_the_first_answer() -> None:
    sure = replace(STOCK, confidence=0.95, first_tokens=3, new_tokens=3)
    assert UNIT.question(sure) == 1920 + 3 * 32
    unsure = replace(ZOOMED, confidence=0.5, first_tokens=3, new_tokens=2)
    # The RPN reads the states of the first answer: 60 tokens in 2 layers.
    assert UNIT.question(unsure) == 1920 + 96 + 120 + 636 * 32 + 64
    no_region = replace(NO_REGION, confidence=0.5, first_tokens=3, new_tokens=3)
    assert UNIT.question(no_region) == 1920 + 96 + 120


def test_thinned_layers_read_what_is_kept() -> None:
    thin = replace(ZOOMED, crop_tokens=64, kept_tokens=128)
    assert UNIT.image([thin, thin]) == 611 * 15 + 611 * 2
    assert UNIT.image([thin, NO_REGION]) == 611 * 32 + 611 * 2
    assert UNIT.question(thin) == 1020 + 124 * 15 + 287 * 17
    # 0.84 and 0.48 of stock with one question an image and with four.
    assert relative_cost(UNIT, [thin], ["a"]) == pytest.approx(0.846, abs=0.002)
    assert relative_cost(UNIT, [thin] * 4, ["a"] * 4) == pytest.approx(0.48, abs=0.003)


def test_questions_on_one_image_share_its_prefix() -> None:
    alone = relative_cost(UNIT, [NO_REGION, NO_REGION], ["a", "b"])
    shared = relative_cost(UNIT, [NO_REGION, NO_REGION], ["a", "a"])
    assert alone == pytest.approx((20774 + 2040) / 21472)
    assert shared == pytest.approx((20774 / 2 + 2040) / 21472)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_weights_are_counted_by_part(name: str) -> None:
    family = FAMILIES[name]()
    backbone = family.backbone
    costs = Costs.of(backbone, family.rpn)
    whole = sum(p.numel() for p in backbone.model.parameters())
    table = backbone.model.get_input_embeddings().weight.numel()
    norm = backbone.decoder.norm.weight.numel()
    head = (
        0
        if backbone.model.lm_head.weight is backbone.model.get_input_embeddings().weight
        else (costs.head)
    )
    rest = whole - table - norm - head - costs.layer * costs.layers
    assert costs.encoder == rest * (4 if name == "qwen" else 1)
    assert (costs.layers, costs.branch) == (backbone.num_layers, family.rpn.branch_layer)
    assert costs.rpn == sum(p.numel() for p in family.rpn.layers.parameters())
