"""How images are made square: `--padding`, `padding=` and what is recorded of it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn.backbones.llava15 import Llava15
from sdrpn.cli import app
from sdrpn.config import RPNConfig
from sdrpn.engine import ZoomModel
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.demo import tiny_path
from sdrpn_eval.model import LlavaSdrpn
from tests.conftest import make_image

QUESTION = "what pattern is on the red disc ?"
runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six wide pictures with a question each."""
    lines = []
    for i in range(6):
        make_image(224, 112, i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"id": f"q{i}", "image": f"{i}.png", "question": QUESTION}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def square(tmp_path: Path) -> Path:
    """The embedded model, noted as trained on crops."""
    path = tmp_path / "square"
    shutil.copytree(tiny_path(), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "square"}))
    return path


def words(command: str, folder: Path, *more: str) -> list[str]:
    """The command on the embedded model."""
    questions, images = str(folder / "questions.jsonl"), ["--images", str(folder)]
    given = {
        "look": [str(folder / "0.png"), QUESTION, "--out", str(folder / "look.png")],
        "answer": [questions, *images, "--out", str(folder / "answers.jsonl")],
        "heads": ["--out", str(folder / "heads"), "--scenes", "4"],
        "label": ["--data", questions, *images, "--out", str(folder / "labels")],
        "train": ["--labels", str(folder / "labels"), "--out", str(folder / "rpn")],
    }
    return [command, *given[command], "--model", "tiny", *more]


def run(*words: str) -> tuple[int, str]:
    result = runner.invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("command", ["look", "answer", "heads", "label"])
@pytest.mark.parametrize(("given", "used"), [(["--padding", "crop"], "crop"), ([], "pad")])
def test_commands_show_images_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, given: list[str], used: str
) -> None:
    loaded: list[Llava15] = []
    load = Llava15.load.__func__

    def spied(cls: type[Llava15], *args: Any, **options: Any) -> Llava15:
        loaded.append(load(cls, *args, **options))
        raise ValueError("that is enough")

    monkeypatch.setattr(Llava15, "load", classmethod(spied))
    code, told = run(*words(command, folder, *given))
    assert (code, "that is enough" in told) == (2, True)
    assert [one.padding for one in loaded] == [used]


@pytest.mark.parametrize("command", ["look", "answer", "heads", "label"])
def test_a_wrong_padding_is_one_sentence(folder: Path, command: str) -> None:
    code, told = run(*words(command, folder, "--padding", "stretch"))
    assert code == 2
    assert "padding must be one of pad, crop, got 'stretch'" in told


def test_from_labels_to_an_rpn(folder: Path) -> None:
    """Labels note their padding, training follows it and notes it in the RPN."""
    assert run(*words("label", folder, "--padding", "crop"))[0] == 0
    assert json.loads((folder / "labels" / "settings.json").read_text())["padding"] == "crop"
    code, told = run(*words("label", folder))
    assert code == 2
    assert "padding: crop there, pad now" in told
    few = ["--held-out", "0", "--global-batch", "2", "--per_device_train_batch_size", "2"]
    few += ["--max_steps", "1", "--branch-layer", "3"]
    code, told = run(*words("train", folder, *few, "--padding", "pad"))
    assert code == 2
    assert (
        f"--padding pad, but {folder / 'labels'} was labelled with padding crop: omit --padding, "
        "or label again with it" in told
    )
    code, told = run(*words("train", folder, *few, "--padding", "stretch"))
    assert (code, "padding must be one of pad, crop, got 'stretch'" in told) == (2, True)
    code, told = run(*words("train", folder, *few))
    assert code == 0, told
    assert RPN.from_pretrained(str(folder / "rpn")).config.padding == "crop"
    begun = json.loads((folder / "rpn" / "checkpoints" / "settings.json").read_text())
    assert begun["padding"] == "crop"


def test_an_rpn_of_another_padding_is_told(
    llava: Llava15, perturbed_rpn: RPN, caplog: pytest.LogCaptureFixture
) -> None:
    assert RPN.from_backbone(llava, 2, 3).config.padding == "pad"
    cropping = Llava15(llava.model, llava.processor, padding="crop", name="my/llava")
    assert RPN.from_backbone(cropping, 2, 3).config.padding == "crop"
    rpn = RPN(replace(perturbed_rpn.config, padding="pad"))
    told = (
        "this RPN was trained with padding=pad and my/llava is loaded with padding=crop: its maps "
        "may be off; load it with padding=pad"
    )
    with caplog.at_level(logging.WARNING):
        rpn.attach(llava)
        assert told not in caplog.messages
        rpn.attach(cropping)
    assert told in caplog.messages
    caplog.clear()
    RPN(replace(perturbed_rpn.config, padding="")).attach(cropping)
    assert not any("padding" in one for one in caplog.messages)


def test_an_rpn_s_config_knows_paddings_only(perturbed_rpn: RPN) -> None:
    values = perturbed_rpn.config.to_dict()
    assert RPNConfig.from_dict(values | {"padding": "crop"}).padding == "crop"
    values.pop("padding")
    assert RPNConfig.from_dict(values).padding == ""
    with pytest.raises(ValueError, match="padding must be one of pad, crop, got 'wide'"):
        RPNConfig.from_dict(values | {"padding": "wide"})


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, "crop"),
        ({"padding": "pad"}, "pad"),
        ({"padding": "crop"}, "crop"),
        ({"preset": "paper"}, "pad"),
        ({"preset": "paper", "padding": "crop"}, "crop"),
    ],
)
def test_the_plugin_follows_the_note_and_records_what_it_does(
    square: Path, given: dict[str, Any], used: str
) -> None:
    model = LlavaSdrpn(pretrained=str(square), rpn=str(square / "rpn"), device="cpu", **given)
    assert model.engine.backbone.padding == used
    assert model.arguments.padding == used


def test_without_a_note_the_plugin_pads(llava: Llava15) -> None:
    model = LlavaSdrpn(pretrained="tiny", device="cpu")
    assert (model.engine.backbone.padding, model.arguments.padding) == ("pad", "pad")
    cropping = Llava15(llava.model, llava.processor, padding="crop")
    model = LlavaSdrpn(pretrained=ZoomModel(cropping, proposer="none"), proposer="none")
    assert model.arguments.padding == "crop"
