"""Qwen2.5-VL's operation counts: torch's counter against the closed formula, and the ratios."""

from __future__ import annotations

import pytest

from benchmarks.flops import FORMULAS, counted, floor
from benchmarks.flops_qwen import QwenSizes, tower, window_sides
from benchmarks.measuring import Job
from benchmarks.setups import Setup, qwen_setup
from benchmarks.shapes_qwen import QwenShape, qwen_rpn, random_qwen, with_tokens
from benchmarks.workload import questions
from sdrpn.backbones.qwen25_vl import Qwen25VL

# Windows of 4 x 4 cells, full attention in one of three layers, M-RoPE of 2, 3 and 3 frequencies.
TOY = QwenShape(5, 64, 96, 4, 2, 700, 3, 32, 48, 2, (1,))
IMAGE = (280, 196)
NEW = 3
CASES = [("stock", None), ("stock", "20"), ("none", None), ("two_pass", "paper")]
CASES += [("sdrpn", "paper")]


@pytest.fixture(scope="module")
def qwen() -> Qwen25VL:
    """A toy with 40 tokens an image, at most."""
    return with_tokens(random_qwen(TOY, "toy"), 40)


@pytest.fixture(scope="module")
def setup(qwen: Qwen25VL) -> Setup:
    return qwen_setup(
        qwen, qwen_rpn(qwen), cells=3, new_tokens=NEW, image_size=IMAGE, stock_tokens=(90, 20)
    )


@pytest.mark.parametrize(("name", "preset"), CASES)
@pytest.mark.parametrize("count", [1, 3])
def test_counter_agrees_with_the_formula(
    setup: Setup, name: str, preset: str | None, count: int
) -> None:
    system = next(s for s in setup.systems if (s.name, s.preset) == (name, preset))
    asked = questions(setup.backbone, [count], 20, IMAGE)
    words = {len(setup.backbone.prompt_ids(q.text).after) for q in asked}
    assert words == {20}
    job = Job(system, 1 if name == "two_pass" else count)
    said = job.run(asked)
    assert {one.crop_tokens > 0 for one in said} == {name in ("two_pass", "sdrpn")}
    own = counted(lambda: job.run(asked)) / count
    sizes, load = setup.work(count, words.pop(), system, said[0].crop_tokens)
    formula = FORMULAS[name](sizes, load)
    assert own == pytest.approx(sum(formula.values()), rel=0.01)
    assert sum(floor(name, sizes, load).values()) < sum(formula.values())


def test_stock_has_its_own_tokens(setup: Setup) -> None:
    grids = {}
    for system in setup.systems:
        sizes, _ = setup.work(1, 20, system, 0)
        assert isinstance(sizes, QwenSizes)
        grids[system.name, system.preset] = sizes.grid
    # 280 x 196 pixels: 10 x 7 cells at their own size, then to 90, 20 and 40 cells of that shape.
    assert grids["stock", None] == (8, 12)
    assert grids["stock", "20"] == (3, 5)
    assert grids["sdrpn", "paper"] == grids["two_pass", "paper"] == (5, 7)


def plain_sizes(**changes: object) -> QwenSizes:
    """A model whose sizes multiply in the head."""
    plain = {
        "layers": 2,
        "hidden": 10,
        "intermediate": 20,
        "kv_width": 10,
        "vocabulary": 100,
        "head_tokens": 3,
        "image_tokens": 30,
        "branch_layer": 1,
        "depth": 1,
        "vision_layers": 3,
        "vision_hidden": 5,
        "vision_intermediate": 10,
        "patch_inputs": 12,
        "feature_layers": 3,
        "crop_marks": 2,
        "grid": (5, 6),
        "crop_grid": (1, 1),
        "window": 4,
        "merge": 2,
        "full_layers": 1,
    }
    return QwenSizes(**(plain | changes))  # type: ignore[arg-type]


def test_the_tower_by_hand() -> None:
    assert window_sides(5, 4) == [4, 1]
    assert window_sides(8, 4) == [4, 4]
    # 120 patches, in windows of 64, 32, 16 and 8 of them.
    linear = 120 * 2 * (4 * 25 + 3 * 50)
    full, windows = 120**2, 64**2 + 32**2 + 16**2 + 8**2
    attention = 4 * 5 * (full + 2 * windows)
    around = 2 * 120 * 12 * 5 + 2 * 30 * (20 * 20 + 20 * 10)
    assert tower(plain_sizes(), (5, 6), 3) == 3 * linear + attention + around


def test_marks_stand_around_a_crop_only() -> None:
    assert (plain_sizes().inserted(0), plain_sizes().inserted(9)) == (0, 11)
