"""The shipped second edition scores, and is labelled, as its pages say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset

from sdrpn import Question, ZoomModel
from sdrpn.config import ZoomConfig
from sdrpn_eval.demo import TRIO_BENCHMARK, embedded_trio
from tests.docs.pages import commands
from tools.tiny_trio import benchmark, distil, report, score
from tools.tiny_trio import scenes as sc
from tools.tiny_vstar.make_questions import label_quality
from tools.tiny_vstar.train_rpn import run

ROOT = Path(__file__).parents[2]
EVERY = 9
"""One question in so many of the first seed's is asked again."""


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads((ROOT / report.FRESH).read_text())


def test_pages_show_the_measured_numbers(published: dict) -> None:
    assert len(published["by_seed"]) >= 5
    facts = json.loads(report.FACTS.read_text())
    measured = json.loads((ROOT / report.COST).read_text())
    assert report.section(published, facts, measured) in (ROOT / report.PAGE).read_text()
    assert report.brief(published) in (ROOT / "README.md").read_text()


def test_the_shipped_benchmark_is_drawn_from_its_seed() -> None:
    shipped = load_dataset("parquet", data_files=str(TRIO_BENCHMARK), split="train")
    drawn = benchmark.rows_of([0], 2, benchmark.SHIPPED)
    kept = {row["question_id"]: row for row in shipped.select_columns(["question_id", "answer"])}
    assert {r["question_id"]: r["answer"] for r in drawn}.items() <= {
        name: row["answer"] for name, row in kept.items()
    }.items()
    assert len(kept) == len(shipped)
    assert TRIO_BENCHMARK.stat().st_size < 5e6


@pytest.mark.slow
def test_headline_is_recomputed_on_a_subset(published: dict) -> None:
    folder, rpn = embedded_trio()
    loaded = ZoomModel.from_pretrained(
        folder, rpn, dtype="float32", zoom=ZoomConfig(threshold=score.PUBLISHED)
    )
    stock = ZoomModel(loaded.backbone, proposer="none")
    seed, scenes = published["by_seed"][0]["seed"], published["scenes"]
    rows = benchmark.rows_of([seed], scenes)
    for engine, key in ((stock, "stock"), (loaded, report.RPN)):
        said = [c == "1" for c in published["right"][key][: len(rows)]][::EVERY]
        asked = [Question(row["question"], (row["image"],)) for row in rows[::EVERY]]
        answers = [
            answer
            for start in range(0, len(asked), 16)
            for answer in engine.ask_batch(asked[start : start + 16], score.GENERATION)
        ]
        right = [
            score.is_right(a.text, row["name"], row["answer"])
            for a, row in zip(answers, rows[::EVERY], strict=True)
        ]
        # Another processor's rounding may turn an answer that hung in the balance.
        assert sum(a != b for a, b in zip(right, said, strict=True)) <= 2
        assert np.mean(right) > 0


@pytest.mark.slow
def test_the_commands_of_tiny_trio_md_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`score` on fewer scenes; the README's test runs the other one."""
    ran = [words for words in commands("docs/tiny_trio.md") if words[0] == "python"]
    assert [words[1:] for words in ran] == [["-m", "tools.tiny_trio.score", "--scenes-seed", "7"]]
    out = tmp_path / "result.json"
    fewer = ["--scenes", "1", "--thresholds", "0.15", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["score", *ran[0][3:], *fewer])
    score.main()
    result = json.loads(out.read_text())
    assert result["images"] == len(sc.KINDS)
    assert {"stock", "oracle", "vicrop", report.RPN, "attention, t = 0.15"} <= set(result["rows"])
    assert "rpn - stock" in capsys.readouterr().out


@pytest.mark.slow
def test_labels_are_as_good_as_the_page_says(tmp_path: Path) -> None:
    """Labels of other pictures, from the shipped weights and heads."""
    facts = json.loads(report.FACTS.read_text())
    questions = tmp_path / "questions"
    questions.mkdir()
    distil.write_questions(questions, scenes=15, seed=1)
    model = Path(embedded_trio()[0])
    lines = distil.commands(
        model, tmp_path, tmp_path, branch_layer=3, steps=1, seed=0, relabel=distil.RELABEL
    )
    heads = lines["label"].index("--heads") + 1
    lines["label"][heads] = str(model / distil.ALL_HEADS)
    run(lines["label"])
    run(lines["relabel"])
    found = label_quality(tmp_path / "labels", questions)
    for name in ("kept", "precision", "iou"):
        assert found[name] == pytest.approx(facts["labels"][name], abs=0.12)


def test_kinds_are_those_of_the_benchmark() -> None:
    rows = load_dataset("parquet", data_files=str(TRIO_BENCHMARK), split="train")
    assert {name.split("/")[1].rsplit("_", 1)[0] for name in rows["image_id"]} == set(sc.KINDS)
