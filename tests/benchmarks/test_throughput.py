"""The throughput benchmark: its systems answer alike, and its JSON, page and figure are as told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot_throughput, throughput, true_size
from benchmarks.measuring import Job, jobs_of
from benchmarks.shapes import SHAPES, Shape
from benchmarks.systems import (
    System,
    all_systems,
    generation_of,
    middle_box,
    preset_zoom,
    zooming_engine,
)
from benchmarks.workload import MIXES, Cell
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import GridBox
from sdrpn.engine import Question
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import QUESTIONS, make_image

TOY = Shape(4, 32, 64, 2, 128, 2, 32, 64, 2)
ROW_KEYS = {
    "system",
    "preset",
    "batch_size",
    "questions_per_image",
    "crop_tokens",
    "seconds_per_question",
    "ratio_to_stock",
    "ratio_to_stock_batch1",
    "ratio_spread",
    "flops_per_question",
    "time_over_floor",
}


def fast_tokens() -> int:
    """Crop tokens of a box of 3 x 3 cells on a grid of 8 x 8 at the preset's budget."""
    budget = preset_zoom("fast").token_budget
    assert budget is not None
    return min(round(3 * budget), 8) ** 2


@pytest.fixture(scope="module")
def systems(llava: Llava15, perturbed_rpn: RPN) -> dict[tuple[str, str | None], System]:
    box = middle_box(llava.grid, 3)
    made = all_systems(llava, perturbed_rpn, box, 4, vicrop_batched=True)
    return {(s.name, s.preset): s for s in made}


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    """Questions of several lengths on two images."""
    pictures = [make_image(120, 90, 1), make_image(70, 160, 2)]
    return [Question(text, (pictures[i // 2],)) for i, text in enumerate(QUESTIONS)]


def run_benchmark(out: Path, *more: str) -> dict[str, Any]:
    work = ["--question-tokens", "20", "--new-tokens", "2", "--repeats", "2"]
    throughput.main(["--shape", "toy", "--device", "cpu", *work, "--out", str(out), *more])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of a toy shape over two batch sizes and two columns."""
    out = tmp_path_factory.mktemp("throughput") / "toy.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "toy", TOY)
        # 112 px: a grid of 8 x 8.
        patch.setattr("benchmarks.shapes.SIDE", 112)
        columns = ["--per-image", "2", "--mix", "textvqa"]
        sizes = ["--layers", "4", "--cells", "3", "--batch-sizes", "2"]
        return run_benchmark(out, *sizes, *columns, "--profile")


def row_of(result: dict[str, Any], *key: Any) -> dict[str, Any]:
    names = ("system", "preset", "batch_size", "questions_per_image")
    (row,) = [r for r in result["rows"] if tuple(r[n] for n in names) == key]
    return row


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("stock", None), ("none", None)),
        (("two_pass", "paper"), ("sdrpn", "paper")),
    ],
)
def test_systems_that_compute_the_same_say_the_same(
    systems: dict[tuple[str, str | None], System], asked: list[Question], one: Any, other: Any
) -> None:
    said = [[a.text for a in Job(systems[key], 1).run(asked)] for key in (one, other)]
    assert said[0] == said[1]
    assert len(set(said[0])) > 1
    # And in a batch, whatever the neighbours.
    assert [a.text for a in Job(systems[other], 4).run(asked)] == said[0]


def test_every_question_has_its_crop(
    systems: dict[tuple[str, str | None], System], asked: list[Question]
) -> None:
    crops = {k: {a.crop_tokens for a in Job(s, 2).run(asked)} for k, s in systems.items()}
    # 64 cells; a box of 3 x 3.
    assert crops[("sdrpn", "paper")] == crops[("two_pass", "paper")] == {64}
    assert crops[("vicrop", None)] == {64}
    assert crops[("sdrpn", "fast")] == crops[("sdrpn", "fastest")] == {fast_tokens()}
    assert crops[("gated", "0")] == {fast_tokens()}
    assert crops[("gated", "50")] == {0, fast_tokens()}
    assert crops[("stock", None)] == crops[("none", None)] == {0}


def test_the_proposer_runs_before_its_box_is_set(
    llava: Llava15, perturbed_rpn: RPN, asked: list[Question]
) -> None:
    engine = zooming_engine(llava, perturbed_rpn, middle_box(llava.grid, 3), "paper")
    answers = engine.ask_batch(asked, generation_of(1))
    maps = [a.roi_map for a in answers]
    assert all(one is not None for one in maps)
    assert (maps[0] != maps[1]).any()
    assert all(len(a.regions) == 1 for a in answers)


def test_box_and_presets() -> None:
    assert middle_box(24, 8) == GridBox(8, 8, 16, 16)
    with pytest.raises(ValueError, match="1 to the grid's 24, got 25"):
        middle_box(24, 25)
    assert preset_zoom("paper").token_budget is None
    assert preset_zoom("fast").token_budget is not None


def test_mixes_have_the_benchmarks_means() -> None:
    means = {name: Cell(counts).mean for name, counts in MIXES.items()}
    assert means == {"textvqa": 1.6, "docvqa": 4.2, "pope": 18}
    assert Cell((4,)).enough(16) == (4, 4, 4, 4)
    assert sum(Cell(MIXES["docvqa"]).enough(16)) == 21


def test_jobs_are_every_batch_size_and_stock_at_one(
    systems: dict[tuple[str, str | None], System],
) -> None:
    jobs = jobs_of(list(systems.values()), ["sdrpn", "two_pass"], [2, 4])
    found = {(j.system.name, j.system.preset, j.batch_size) for j in jobs}
    stock = {("stock", None, size) for size in (1, 2, 4)}
    ours = {("sdrpn", p, size) for p in ("paper", "fast", "fastest") for size in (2, 4)}
    assert found == stock | ours
    one = jobs_of(list(systems.values()), ["gated-25"], [1])
    assert [(job.system.name, job.system.preset) for job in one] == [
        ("stock", None),
        ("gated", "25"),
    ]


def test_first_answers_stand_for_a_share(
    llava: Llava15, systems: dict[tuple[str, str | None], System]
) -> None:
    image = make_image(120, 90, 1)
    asked = [Question(text, (image,)) for text in [*QUESTIONS, *QUESTIONS]][:8]
    plain = [one.text for one in Job(systems["none", None], 1).run(asked)]
    zoomed = [one.text for one in Job(systems["sdrpn", "fast"], 1).run(asked)]
    for batch in (1, 4):
        said = Job(systems["gated", "25"], batch).run(asked)
        stands = [one.crop_tokens == 0 for one in said]
        assert stands == [False, False, False, True] * 2
        pairs = zip(plain, zoomed, stands, strict=True)
        assert [one.text for one in said] == [p if sure else z for p, z, sure in pairs]


@pytest.mark.slow
def test_rows_are_as_promised(result: dict[str, Any]) -> None:
    assert {"machine", "shape", "rows"} <= set(result)
    assert {"cpu", "threads", "torch"} <= set(result["machine"])
    for row in result["rows"]:
        assert set(row) >= ROW_KEYS
        low, high = row["ratio_spread"]
        assert low <= row["ratio_to_stock"] <= high
        assert row["flops_per_question"] == pytest.approx(row["flops_formula"], rel=0.01)
        assert row["time_over_floor"] > 0
    columns = {(r["questions_per_image"], r["mix"]) for r in result["rows"]}
    assert columns == {(2, None), (1.6, "textvqa")}
    systems = {(r["system"], r["preset"]) for r in result["rows"] if r["batch_size"] == 2}
    gated = {("gated", percent) for percent in ("0", "25", "50", "75")}
    ours = {("sdrpn", preset) for preset in ("paper", "fast", "fastest")}
    assert systems == {("stock", None), ("none", None)} | gated | ours
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_ratios_are_stocks_seconds_over_own(result: dict[str, Any]) -> None:
    own, equal = row_of(result, "sdrpn", "fast", 2, 2), row_of(result, "stock", None, 2, 2)
    alone = row_of(result, "stock", None, 1, 2)
    seconds = own["seconds_per_question"]
    assert own["ratio_to_stock"] == pytest.approx(equal["seconds_per_question"] / seconds)
    assert own["ratio_to_stock_batch1"] == pytest.approx(alone["seconds_per_question"] / seconds)
    assert equal["ratio_to_stock"] == 1
    assert row_of(result, "sdrpn", "paper", 2, 2)["crop_tokens"] == 64
    assert own["crop_tokens"] == fast_tokens()


@pytest.mark.slow
def test_profile_names_every_station(result: dict[str, Any]) -> None:
    for stations in result["profile"].values():
        for name in ("pixels", "read", "look", "crop", "prefill", "decode", "whole"):
            assert stations[name]["seconds"] > 0, name


@pytest.mark.slow
def test_page_and_figure(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, docs, readme = tmp_path / "toy.json", tmp_path / "docs", tmp_path / "README.md"
    file.write_text(json.dumps(result))
    readme.write_text(f"before\n{plot_throughput.BEGIN}\nold\n{plot_throughput.END}\nafter\n")
    arguments = [str(file), "--docs", str(docs), "--into", str(readme)]
    plot_throughput.main(arguments)
    assert (docs / "throughput.png").stat().st_size > 0
    page = docs / "throughput.md"
    assert "| batch size | system | 2 per image | textvqa, 1.6 per image |" in page.read_text()
    assert "old" not in readme.read_text()
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")
    page.write_text(page.read_text() + "\nProse.\n")
    plot_throughput.main(arguments)
    assert page.read_text().endswith("\nProse.\n")
    assert page.read_text().count("### Work") == 1
    assert "sdrpn, fast" in capsys.readouterr().out
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        plot_throughput.main(arguments)


def test_true_sizes_without_weights() -> None:
    seven = true_size.sizes_of("7b")
    assert seven["parameters"]["rpn"] == 438_329_344
    assert seven["parameters"]["base"] == 7_063_427_072
    # 32 layers, keys and values, 611 tokens, 4096 features, two bytes.
    assert seven["prefix_bytes"]["backbone_kv"] == 32 * 2 * 611 * 4096 * 2
    assert "| prefix, tokens | 611 |" in true_size.size_table({"7b": seven})
