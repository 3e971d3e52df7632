"""`sdrpn train-gate`: from a file of questions to an RPN whose gate the engine reads."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sdrpn.backbones.llava15 import Llava15
from sdrpn.cli import app
from sdrpn.config import ZoomConfig
from sdrpn.distill import gate
from sdrpn.distill.gate_job import GateJob
from sdrpn.engine import ZoomModel
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import QUESTIONS, THRESHOLD, make_image

ZOOM = ZoomConfig(threshold=THRESHOLD, policy="strongest", min_cells=1)
COMMAND = importlib.import_module("sdrpn.cli.train_gate")
IMAGES = 12
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and four questions on each."""
    made = tmp_path_factory.mktemp("gate")
    (made / "images").mkdir()
    lines = []
    for i in range(IMAGES):
        make_image(112, 112 - 4 * i, seed=i).save(made / "images" / f"{i}.png")
        for j, text in enumerate(QUESTIONS):
            lines.append(json.dumps({"id": f"{i}-{j}", "image": f"{i}.png", "question": text}))
    (made / "questions.jsonl").write_text("\n".join(lines))
    return made


@pytest.fixture
def rpn_folder(perturbed_rpn: RPN, tmp_path: Path) -> Path:
    perturbed_rpn.save_pretrained(tmp_path / "rpn")
    return tmp_path / "rpn"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few labels do here."""
    monkeypatch.setattr(gate, "MIN_LABELS", 3)


@pytest.fixture
def train(
    llava: Llava15, perturbed_rpn: RPN, folder: Path, rpn_folder: Path, monkeypatch: Any
) -> Callable[..., tuple[int, str]]:
    monkeypatch.setattr(COMMAND, "load_zoom", lambda *_: ZoomModel(llava, perturbed_rpn, zoom=ZOOM))

    def run(*options: str, out: Path) -> tuple[int, str]:
        words = ["train-gate", str(folder / "questions.jsonl"), "--images", str(folder / "images")]
        words += ["--out", str(out), "--rpn", str(rpn_folder), "--max-new-tokens", "3", *options]
        result = runner.invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return result.exit_code, " ".join(result.output.split())

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_gate_is_trained_and_read(
    train: Any, rpn_folder: Path, folder: Path, llava: Llava15, tmp_path: Path
) -> None:
    out, before = tmp_path / "out", contents(rpn_folder)
    code, said = train("--rule", "agreement", out=out)
    assert code == 0, said
    assert contents(rpn_folder) == before
    assert re.search(r"held-out AUC: 0\.\d{3}|held-out AUC: 1\.000", said)
    assert "skipped threshold agreement with the labels" in said
    gated = RPN.from_pretrained(out)
    assert gated.config.gate
    assert gated.config.zoom.learned_gate is None
    bare = RPN.from_pretrained(rpn_folder)
    for name, weight in bare.state_dict().items():
        assert gated.state_dict()[name].equal(weight)
    zeros, ones = gated.facts["gate labels 0, 1"]
    held = gated.facts["gate held-out labels 0, 1"]
    ignored = sum(gated.facts["gate ignored"].values())
    assert zeros + ones + sum(held) + ignored == IMAGES * len(QUESTIONS)
    assert gated.facts["gate rule"] == "agreement"
    assert gated.facts["gate thresholds"] == [THRESHOLD, THRESHOLD / 2]
    assert "- gate held-out AUC: " in (out / "README.md").read_text()
    image = make_image(112, 112, seed=0)
    answer = ZoomModel(llava, gated, zoom=ZOOM).ask(image, QUESTIONS[0], max_new_tokens=3)
    assert answer.gate is not None
    assert 0 < answer.gate < 1


def test_again_asks_nothing_and_gives_the_same(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert train("--rule", "agreement", out=out)[0] == 0
    before = contents(out)

    def never(*_: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(GateJob, "_ask", never)
    assert train("--rule", "agreement", out=out)[0] == 0
    assert contents(out) == before
    assert train("--rule", "agreement", "--learned-gate", "0.4", out=out)[0] == 0
    assert RPN.from_pretrained(out).config.zoom.learned_gate == 0.4
    code, said = train("--rule", "consensus", out=out)
    assert code == 2
    assert "rule: agreement there, consensus now" in said
    assert "use another --out" in said


def test_consensus_trains_too(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MIN_LABELS", 1)
    out = tmp_path / "out"
    code, said = train("--thresholds", "0.5,0.52", "--kappa", "0", "--held-out", "0.4", out=out)
    assert code == 0, said
    facts = RPN.from_pretrained(out).facts
    assert facts["gate thresholds"] == [0.5, 0.52]
    assert facts["gate kappa"] == 0


def test_too_few_labels_say_what_is_missing(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MIN_LABELS", 1000)
    code, said = train("--rule", "agreement", out=tmp_path / "out")
    assert code == 2
    assert re.search(r"too few labels [01]: \d+, and \d+ labels [01] \(ignored: no region: ", said)
    assert "a gate needs 1000 of each: add questions" in said
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "votes"], "rule must be one of consensus, agreement, got 'votes'"),
        (["--thresholds", "0.1"], "thresholds must be two, such as 0.15,0.075, got '0.1'"),
        (["--batch-size", "0"], "batch_size and max_new_tokens must be 1 or more"),
        (["--held-out", "1"], "held_out must be a share in (0, 1), got 1.0"),
        (["--learned-gate", "1.5"], "learned_gate must be in (0, 1) or None, got 1.5"),
        (["--images", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_wrong_options_are_refused_at_once(
    train: Any, options: list[str], message: str, tmp_path: Path
) -> None:
    code, said = train(*options, out=tmp_path / "out")
    assert (code, message in said) == (2, True), said
    assert not (tmp_path / "out").exists()


def test_a_model_without_an_rpn_is_refused(folder: Path, tmp_path: Path) -> None:
    words = ["train-gate", str(folder / "questions.jsonl"), "--images", str(folder / "images")]
    words += ["--out", str(tmp_path / "out"), "--model", "someone/llava"]
    result = runner.invoke(app, words)
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "the gate needs an RPN, and none is known for someone/llava: give one with --rpn" in said


def test_other_models_are_not_overwritten(train: Any, rpn_folder: Path, tmp_path: Path) -> None:
    before = contents(rpn_folder)
    code, said = train(out=rpn_folder)
    assert code == 2
    assert "is the RPN's own folder, which is not changed; use another --out" in said
    assert contents(rpn_folder) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    code, said = train(out=tmp_path / "other")
    assert code == 2
    assert "holds a model that was not begun by `sdrpn train-gate`" in said


def test_the_published_rpn_is_the_default(tmp_path: Path) -> None:
    assert COMMAND.find_rpn("llava-hf/llava-1.5-7b-hf", None, tmp_path).startswith("YuhengSSS/")
    assert COMMAND.find_rpn("tiny", None, tmp_path).endswith("tiny/rpn")
    assert COMMAND.find_rpn("tiny", "mine", tmp_path) == "mine"


def test_help_teaches() -> None:
    shown = runner.invoke(app, ["train-gate", "--help"], env={"COLUMNS": "200"}).output
    shown = " ".join(shown.split())
    assert "sdrpn train-gate questions.jsonl --images photos/ --out rpn-gated/" in shown
    assert "--learned-gate" in shown


def test_an_rpn_with_a_gate_gets_a_new_one(train: Any, perturbed_rpn: RPN, tmp_path: Path) -> None:
    older = perturbed_rpn.with_gate(torch.ones(perturbed_rpn.config.hidden_size), 0.5)
    older.config = replace(older.config, zoom=replace(ZOOM, learned_gate=0.7))
    older.facts = {"seed": 0, "gate kappa": 1.0, "gate rule": "consensus"}
    older.save_pretrained(tmp_path / "older")
    out = tmp_path / "out"
    code, said = train("--rule", "agreement", "--rpn", str(tmp_path / "older"), out=out)
    assert code == 0, said
    gated = RPN.from_pretrained(out)
    assert gated.gate is not None
    assert not gated.gate.weight.equal(torch.ones_like(gated.gate.weight))
    assert gated.config.zoom.learned_gate is None
    assert (gated.facts["seed"], gated.facts["gate rule"]) == (0, "agreement")
    assert "gate kappa" not in gated.facts
