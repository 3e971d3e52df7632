"""The benchmark's operation counts: torch's counter against the closed formulas, and the floor."""

from __future__ import annotations

import pytest
import torch

from benchmarks.flops import (
    FORMULAS,
    STATIONS,
    Load,
    Sizes,
    counted,
    floor,
    least,
    sdrpn,
    span,
    stock,
    tower,
)
from benchmarks.measuring import Job
from benchmarks.setups import Setup, llava_setup
from benchmarks.systems import Said, System, all_systems, middle_box
from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import RPNConfig
from sdrpn.engine import Question
from sdrpn.roi.vicrop import NEUTRAL_QUESTION
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.args import LlavaArguments
from tests.conftest import make_image, make_rpn

NEW = 3
CELLS = 3
TEXTS = ("what is on the red disc ?", "what is on the pink disc ?", "the cyan disc and the red ?")
"""Of one length: the formulas count no padding."""
CASES = [("stock", None), ("none", None), ("two_pass", "paper"), ("sdrpn", "paper")]
CASES += [("sdrpn", "fast"), ("vicrop", None)]


def sizes(**changes: int) -> Sizes:
    """A model whose sizes multiply in the head."""
    plain = {
        "layers": 2,
        "hidden": 10,
        "intermediate": 20,
        "kv_width": 10,
        "vocabulary": 100,
        "head_tokens": 3,
        "image_tokens": 4,
        "branch_layer": 1,
        "depth": 1,
        "vision_layers": 2,
        "vision_hidden": 5,
        "vision_intermediate": 10,
        "patch_inputs": 12,
        "feature_layers": 1,
    }
    return Sizes(**(plain | changes))


def system_of(llava: Llava15, rpn: RPN, name: str, preset: str | None) -> System:
    systems = all_systems(llava, rpn, middle_box(llava.grid, CELLS), NEW, vicrop_batched=True)
    return next(s for s in systems if (s.name, s.preset) == (name, preset))


def questions(count: int) -> list[Question]:
    """So many questions on one image."""
    image = make_image(120, 100, 3)
    return [Question(TEXTS[i], (image,)) for i in range(count)]


def load_of(llava: Llava15, asked: list[Question], crop: int) -> Load:
    lengths = {len(llava.prompt_ids(q.text).after) for q in asked}
    assert len(lengths) == 1
    neutral = len(llava.prompt_ids(NEUTRAL_QUESTION).after)
    layer = round(llava.num_layers * 14 / 32)
    return Load(len(asked), lengths.pop(), crop, NEW, neutral, layer, len(asked))


def _answered(stations: dict[str, float]) -> dict[str, float]:
    """Prefill and decoding as one: whose the last prompt token is differs between systems."""
    rest = {k: v for k, v in stations.items() if k not in ("prefill", "decode")}
    return rest | {"answer": stations["prefill"] + stations["decode"]}


def compare(llava: Llava15, rpn: RPN, name: str, preset: str | None, asked: list[Question]) -> None:
    """Count a system on questions about one image, and compare with its formula and its floor."""
    system = system_of(llava, rpn, name, preset)
    batch = 1 if name == "two_pass" else len(asked)
    said = Job(system, batch).run(asked)
    own = counted(lambda: Job(system, batch).run(asked)) / len(asked)
    load = load_of(llava, asked, said[0].crop_tokens)
    formula = FORMULAS[name](Sizes.of(llava, rpn.config), load)
    assert own == pytest.approx(sum(formula.values()), rel=0.01)
    assert set(formula) <= set(STATIONS)
    least = _answered(floor(name, Sizes.of(llava, rpn.config), load))
    formula = _answered(formula)
    for station, needed in least.items():
        # A first look from scratch reads what the floor counts as the prefix.
        if (name, station) not in (("two_pass", "read"), ("stock", "read")):
            assert needed <= formula[station]


@pytest.mark.parametrize(("name", "preset"), CASES)
@pytest.mark.parametrize("count", [1, 3])
def test_counter_agrees_with_the_formula(
    llava: Llava15, perturbed_rpn: RPN, name: str, preset: str | None, count: int
) -> None:
    compare(llava, perturbed_rpn, name, preset, questions(count))


def test_counter_agrees_with_grouped_keys(gqa_llava: Llava15) -> None:
    rpn = make_rpn(gqa_llava, perturbed=False)
    for name, preset in CASES:
        compare(gqa_llava, rpn, name, preset, questions(2))


@pytest.fixture(scope="module")
def setup(llava: Llava15, perturbed_rpn: RPN) -> Setup:
    return llava_setup(llava, perturbed_rpn, cells=CELLS, new_tokens=NEW, vicrop_batched=False)


def check_setup(setup: Setup, label: str, batch: int) -> list[Said]:
    """Compare a system of a setup on four questions about one image with the setup's formula."""
    system = next(s for s in setup.systems if s.label == label)
    asked = [*questions(3), *questions(1)]
    job = Job(system, batch)
    said = job.run(asked)
    crops = sum(one.crop_tokens for one in said) / 4
    words = len(setup.backbone.prompt_ids(asked[0].text).after)
    sizes, load = setup.work(4, words, system, crops)
    own = counted(lambda: job.run(asked)) / 4
    formula = FORMULAS[system.name](sizes, load)
    assert own == pytest.approx(sum(formula.values()), rel=0.01)
    least, formula = _answered(floor(system.name, sizes, load)), _answered(formula)
    assert all(needed <= formula[station] for station, needed in least.items())
    return said


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("percent", "zoomed"), [(0, 4), (25, 3), (50, 2), (75, 1)])
def test_gated_shares(setup: Setup, percent: int, zoomed: int, batch: int) -> None:
    said = check_setup(setup, f"gated-{percent}", batch)
    assert sum(one.crop_tokens > 0 for one in said) == zoomed


def test_thinned_upper_layers(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    # The preset keeps 128, twice what this image has.
    presets = dict(LlavaArguments.presets)
    monkeypatch.setattr(LlavaArguments, "presets", presets)
    presets["fastest"] = presets["fastest"] | {"keep_tokens": 20}
    assert isinstance(setup.backbone, Llava15)
    thin = llava_setup(
        setup.backbone,
        make_rpn(setup.backbone, perturbed=False),
        cells=CELLS,
        new_tokens=NEW,
        vicrop_batched=False,
    )
    for batch in (1, 4):
        said = check_setup(thin, "sdrpn-fastest", batch)
        assert all(one.crop_tokens > 0 for one in said)


def test_thinned_operations_by_hand() -> None:
    s = sizes(layers=3)
    load = Load(1, question=6, crop=4, new=1, kept=2)
    found = sdrpn(s, load)
    # The image passes the one layer below the branch.
    whole = 2 * (4 * 100 + 3 * 200)
    assert found["read"] - s.image_tower(2) - 2 * 4 * 10 * 10 == 7 * whole + 4 * 7 * 7 * 10
    # The suffix of 10 passes it too; above, 3 + 2 + 10 tokens pass one layer and fill the keys of
    # the last, which the last token passes.
    lower = 10 * whole + 4 * 10 * 17 * 10
    upper = 15 * whole + 4 * 15 * 15 * 10 + 15 * 2 * 200
    assert found["prefill"] == lower + upper + (whole - 2 * 200) + 4 * 15 * 10


def test_seven_billion_by_formula() -> None:
    """The ratios to stock's operations at 7B's proportions, 60 tokens of the question, 4 new."""
    seven = sizes(
        layers=32,
        hidden=4096,
        intermediate=11008,
        kv_width=4096,
        vocabulary=32064,
        head_tokens=35,
        image_tokens=576,
        branch_layer=15,
        depth=3,
        vision_layers=24,
        vision_hidden=1024,
        vision_intermediate=4096,
        patch_inputs=588,
        feature_layers=23,
    )

    def ratio(name: str, load: Load) -> float:
        whole = sum(stock(seven, Load(load.questions_per_image, 60, 0, 4)).values())
        return round(sum(FORMULAS[name](seven, load).values()) / whole, 2)

    # By token-layers: 611 of the prefix, 60 of the question, 64 of the crop, two layers of the RPN.
    # (671 * 32 + 671 * 2 + 60 * 15 + 64 * 32) / (671 * 32) = 1.20; the rest is image encoding.
    assert [ratio("sdrpn", Load(n, 60, 64, 4)) for n in (1, 4)] == [1.21, 0.5]
    # 611 in 15 + 2 layers, 60 in 15 + 2, 124 in 15, and 35 + 128 + 124 in 17: 0.85.
    assert [ratio("sdrpn", Load(n, 60, 64, 4, kept=128)) for n in (1, 4)] == [0.88, 0.5]
    # A first answer costs 60 in 17 layers more; one that stands needs neither map nor crop.
    gated = [Load(1, 60, 64, 4, sure=share) for share in (0, 0.25, 0.5, 0.75)]
    assert [ratio("gated", load) for load in gated] == [1.26, 1.2, 1.14, 1.09]


def test_a_repeat_starts_with_no_image_read(llava: Llava15, perturbed_rpn: RPN) -> None:
    job = Job(system_of(llava, perturbed_rpn, "sdrpn", "paper"), 1)
    first, second = (counted(lambda: job.run(questions(2))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_on_the_cpu_is_counted(masked: bool) -> None:
    query, keys = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 9, 16)
    mask = torch.ones(7, 9, dtype=torch.bool) if masked else None
    attention = torch.nn.functional.scaled_dot_product_attention
    seen = counted(lambda: attention(query, keys, keys, attn_mask=mask))
    assert seen == 2 * (2 * 4 * 7 * 9 * 16) * 2


def test_a_layer_by_hand() -> None:
    # One token: four projections of 10 x 10, an MLP of three 10 x 20, itself to look at.
    assert span(sizes(), 1, 1, 0) == 2 * (4 * 100 + 3 * 200) + 4 * 10
    # Three more behind five: each of them sees all eight.
    assert span(sizes(), 2, 3, 5) == 2 * (3 * 2 * (4 * 100 + 3 * 200) + 4 * 3 * 8 * 10)


def test_the_least_of_layers_by_hand() -> None:
    whole = 2 * (4 * 100 + 3 * 200)
    # The first layer: 3 tokens that see 6, 7 and 8. The last: keys of all, the rest of one.
    first = 3 * whole + 4 * (6 + 7 + 8) * 10
    last = 3 * 2 * 200 + (whole - 2 * 200) + 4 * 8 * 10
    assert least(sizes(), 2, 3, 5, 1) == first + last
    # Of one layer nobody reads, only the keys are left.
    assert least(sizes(), 1, 3, 5, 0) == 3 * 2 * 200


def test_the_tower_by_hand() -> None:
    each = 5 * 2 * (4 * 25 + 2 * 50) + 4 * 25 * 5
    around = 2 * 4 * 12 * 5 + 2 * 4 * (5 * 10 + 100)
    assert tower(sizes(), 2) == 2 * each + around


def test_floors() -> None:
    one, many = (Load(q, question=6, crop=4, new=2) for q in (1, 8))
    stock = Load(1, question=6, crop=0, new=2)
    assert floor("stock", sizes(), stock) == floor("none", sizes(), stock)
    assert floor("two_pass", sizes(), one) == floor("sdrpn", sizes(), one)
    assert set(floor("sdrpn", sizes(), one)) == set(STATIONS)
    first, shared = floor("sdrpn", sizes(), one), floor("sdrpn", sizes(), many)
    assert shared == first | {"read": first["read"] / 8}


def test_sizes_are_the_models(llava: Llava15, perturbed_rpn: RPN) -> None:
    config: RPNConfig = perturbed_rpn.config
    found = Sizes.of(llava, config)
    assert (found.layers, found.hidden, found.image_tokens) == (6, 128, 64)
    assert (found.branch_layer, found.depth) == (config.branch_layer, config.depth)
    assert (found.vision_layers, found.feature_layers) == (4, 3)
    assert found.prefix == len(llava.head_ids) + 64
