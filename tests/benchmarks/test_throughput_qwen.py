"""The throughput benchmark on Qwen2.5-VL's shape: systems answer alike, and the command runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from benchmarks.measuring import Job
from benchmarks.plot_throughput import page, ratio_table
from benchmarks.setups import Setup, qwen_setup
from benchmarks.shapes_qwen import QWEN_SHAPES, QwenShape, qwen_rpn, random_qwen
from benchmarks.workload import questions
from tests.helpers.qwen_tiny import draw_weights

TOY = QwenShape(5, 64, 96, 4, 2, 700, 3, 32, 48, 2, (1,))
IMAGE = (280, 280)


@pytest.fixture(scope="module")
def setup() -> Setup:
    """Loud weights, so that answers differ; stock has the 576 tokens of the others too."""
    qwen = random_qwen(TOY, "toy")
    draw_weights(qwen.model, 7)
    return qwen_setup(
        qwen, qwen_rpn(qwen), cells=8, new_tokens=6, image_size=IMAGE, stock_tokens=(576, 64)
    )


@pytest.mark.parametrize(("one", "other"), [("stock", "none"), ("two_pass", "sdrpn")])
def test_systems_that_compute_the_same_say_the_same(setup: Setup, one: str, other: str) -> None:
    by_name = {s.name: s for s in reversed(setup.systems)}
    asked = questions(setup.backbone, [2, 2], 24, IMAGE)
    said = [[a.text for a in Job(by_name[name], 1).run(asked)] for name in (one, other)]
    assert said[0] == said[1]
    assert len(set(said[0])) > 1
    assert [a.text for a in Job(by_name[other], 4).run(asked)] == said[0]


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QWEN_SHAPES, "toy", TOY)
    out = tmp_path / "qwen.json"
    work = ["--question-tokens", "20", "--new-tokens", "2", "--repeats", "1", "--per-image", "2"]
    names = ["--systems", "none", "two_pass", "sdrpn", "--image-size", "224", "224"]
    model = ["--family", "qwen2_5_vl", "--shape", "toy", "--device", "cpu", "--batch-sizes", "2"]
    throughput.main([*model, *work, *names, "--out", str(out)])
    result = json.loads(out.read_text())
    rows = {(r["system"], r["preset"], r["batch_size"]): r for r in result["rows"]}
    stock = {("stock", preset, size) for preset in (None, "1024", "576") for size in (1, 2)}
    assert set(rows) == stock | {("none", None, 2), ("sdrpn", "paper", 2)}
    for row in rows.values():
        assert row["flops_per_question"] == pytest.approx(row["flops_formula"], rel=0.01)
    assert rows["sdrpn", "paper", 2]["crop_tokens"] == 576
    assert rows["stock", None, 2]["ratio_to_stock"] == 1
    assert rows["stock", "576", 2]["ratio_to_stock"] > 1
    assert result["shape"]["image_tokens"] == 576
    assert "stock, 1024 tokens" in ratio_table(result)
    assert "stock Qwen2.5-VL" in page(result, "qwen.png")


def test_shapes_of_another_family_are_refused() -> None:
    with pytest.raises(SystemExit, match="must be one of 32b, 3b, 72b, 7b, small, got 13b"):
        throughput.main(["--family", "qwen2_5_vl", "--shape", "13b"])


def test_small_is_a_sixteenth_of_7b() -> None:
    small, seven = QWEN_SHAPES["small"], QWEN_SHAPES["7b"]
    assert (small.hidden, small.intermediate) == (seven.hidden // 16, seven.intermediate // 16)
    assert small.heads / small.kv_heads == seven.heads / seven.kv_heads
    assert (small.layers, small.full_attention) == (seven.layers, seven.full_attention)
    shape = replace(small, layers=5, vision_layers=1, full_attention=(0,))
    qwen = random_qwen(shape, "small", torch.float32, "meta")
    assert qwen.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
