"""One question of a run asked again: the same answer, pictures, and what has moved since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.results.read import BadRun, read_run
from sdrpn_eval.results.replay import Replay, arguments_again, ask_again
from sdrpn_eval.results.responses import read_source
from tests.helpers.local_benchmarks import manager
from tests.helpers.run_folders import evaluate, sample, write_facts, write_run

DOCUMENT = ("tiny_vstar", 2)
INDEX = "sdrpn_eval.results.documents.task_manager"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model on the first questions of its benchmark."""
    folder = tmp_path_factory.mktemp("replay")
    return evaluate(folder / "run", "tiny", ["tiny_vstar"], limit=4)


@pytest.fixture
def run(shipped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shipped, tmp_path / "run")


def again(run: Path, out: Path, model_args: str = "") -> Replay:
    return ask_again(read_source(run, [DOCUMENT[0]]), DOCUMENT, model_args, manager(), out)


def test_the_same_model_gives_the_recorded_answer_and_pictures(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    replay = again(run, out)
    assert replay.same
    assert replay.moved == []
    assert replay.now.regions == replay.then.regions
    recorded = read_run(run).tasks["tiny_vstar"].samples[2]
    assert (replay.prompt, replay.target) == (recorded.prompt, recorded.target)
    assert replay.now.answer == recorded.answer
    content = json.loads((out / "replay.json").read_text())
    assert (content["task"], content["doc_id"], content["same"]) == ("tiny_vstar", 2, True)
    assert content["scores"]["accuracy,none"]["score"] in (0.0, 1.0)
    (box,) = replay.now.regions
    with Image.open(out / "crop_1.png") as crop:
        assert crop.size == (box.x1 - box.x0, box.y1 - box.y0)
    with Image.open(out / "replay.png") as picture:
        assert picture.height > 600  # two cards, then and now


def test_other_arguments_are_named_and_take_effect(run: Path, tmp_path: Path) -> None:
    replay = again(run, tmp_path / "out", "proposer=none")
    assert replay.moved == ["argument proposer: rpn then, none now"]
    assert replay.then.regions
    assert not replay.now.regions


def test_a_preset_replaces_what_was_recorded(tmp_path: Path) -> None:
    folder = write_run(tmp_path, {"toy": [sample(0)]}, model_args="pretrained=tiny,policy=mask")
    write_facts(folder, "aa", arguments={"pretrained": "x", "policy": "mask", "padding": "crop"})
    source = read_source(folder)
    assert arguments_again(source, {}) == {"pretrained": "x", "policy": "mask", "padding": "crop"}
    given = {"pretrained": "x", "preset": "paper", "policy": "bbox"}
    assert arguments_again(source, {"preset": "paper", "policy": "bbox"}) == given


def test_what_moved_is_named_and_another_answer_is_said(run: Path, tmp_path: Path) -> None:
    (file,) = run.rglob("run_facts_*.json")
    facts = json.loads(file.read_text())
    name = next(iter(facts["weights"]))
    facts["weights"][name] = "0123"
    facts["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(facts))
    for path in run.rglob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line |= {k: "no colour" for k in ("answer", "filtered_resps") if k in line}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replay = again(run, tmp_path / "out")
    assert not replay.same
    assert replay.then.answer == "no colour"
    assert [line.split(" then")[0] for line in replay.moved] == [
        f"weights {name}: 0123",
        "version of torch: 1.0",
    ]


def test_a_run_without_a_record_is_compared_by_its_samples(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "sdrpn_record")
    read = read_run(run)
    config = dict(read.results["config"]) | {"model_args": "pretrained=tiny"}
    read.file.write_text(json.dumps(dict(read.results) | {"config": config}))
    replay = again(run, tmp_path / "out", "proposer=rpn")
    assert replay.same
    assert replay.then.line is None
    assert replay.moved == [
        "the run left no facts: what else has moved is not known",
        "proposer is rpn, as asked for here",
    ]


# Refusals, and the command


@pytest.mark.parametrize(
    ("document", "model", "says"),
    [
        (("toy", 7), "llava_sdrpn", "has no document 7 of toy, only 0 to 1"),
        (("toy", 0), "llava_hf", "is a run of llava_hf; replay asks llava_sdrpn or"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, document: Any, model: str, says: str
) -> None:
    folder = write_run(tmp_path / "run", {"toy": [sample(0), sample(1)]}, model=model)
    with pytest.raises(BadRun) as error:
        ask_again(read_source(folder, ["toy"]), document, "", None, tmp_path / "out")
    assert says in str(error.value)


def test_command_shows_then_and_now(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INDEX, lambda path: manager())
    words = ["replay", str(run), "--doc", "tiny_vstar:2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("question: what pattern is on the ")
    assert lines[2].removeprefix("then: ") == lines[3].removeprefix("now: ")
    assert "the answer is the recorded one" in lines


@pytest.mark.parametrize("doc", ["tiny_vstar", "tiny_vstar:", ":3", "tiny_vstar:x"])
def test_a_document_is_named_by_task_and_number(tmp_path: Path, doc: str) -> None:
    done = CliRunner().invoke(app, ["replay", str(tmp_path), "--doc", doc])
    assert done.exit_code == 2
    assert "--doc must be TASK:ID, such as tiny_vstar:17" in " ".join(done.output.split())
