"""`sdrpn look` as a user types it, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdrpn.cli import app
from sdrpn.model_registry import known, resolve
from sdrpn_eval.demo import tiny_path
from tests.helpers.qwen_tiny import CELL_PIXELS, make_qwen, write_checkpoint

QUESTION = "what pattern is on the red disc ?"
runner = CliRunner()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.new("RGB", (448, 300), (90, 120, 90)).save(path)
    return path


def test_look_says_what_it_saw_and_draws_it(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen" / "look.png"
    result = runner.invoke(
        app, ["look", str(picture), QUESTION, "--model", "tiny", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    for word in ("stock:", "second look:", "region (x0", "map maximum", "tokens: 64 image"):
        assert word in result.output
    assert Image.open(out).size[0] > 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["nowhere.png", QUESTION, "--model", "tiny"], "nowhere.png: missing"),
        (["{picture}", QUESTION, "--model", "nowhere"], "--model tiny"),
        (["{picture}", QUESTION, "--model", "tiny", "--threshold", "7"], "threshold must be in"),
        (["{picture}", QUESTION, "--model", "tiny", "--policy", "best"], "policy must be one of"),
        (["{picture}", QUESTION, "--model", "tiny", "--proposer", "me"], "proposer must be one"),
        (["{picture}", QUESTION, "--model", "tiny", "--dtype", "int8"], "dtype must be"),
    ],
)
def test_bad_input_gets_one_sentence(picture: Path, change: list[str], message: str) -> None:
    result = runner.invoke(app, ["look", *(word.format(picture=picture) for word in change)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(make_qwen(), tmp_path_factory.mktemp("qwen"))


def limits(least: int, most: int) -> list[str]:
    """Options with sizes in tokens."""
    return ["--min-pixels", str(least * CELL_PIXELS), "--max-pixels", str(most * CELL_PIXELS)]


def test_the_size_of_images_sets_the_number_of_tokens(qwen: Path, picture: Path) -> None:
    """448 x 300 pixels become 7 x 5 cells within 40 tokens, and 4 x 2 within 12."""
    words = ["look", str(picture), QUESTION, "--model", str(qwen), "--proposer", "none"]
    words += ["--out", str(picture.with_name("look.png"))]
    for most, tokens in ((40, 35), (12, 8)):
        result = runner.invoke(app, [*words, *limits(4, most)])
        assert result.exit_code == 0, result.output
        assert f"tokens: {tokens} image, 0 crop" in result.output


@pytest.mark.parametrize("command", ["look", "answer"])
@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("qwen", limits(40, 12), "in order, got 31360 and 9408"),
        ("qwen", ["--max-pixels", "100"], "must be 784 (one token) or more and in order, got 4515"),
        ("tiny", limits(4, 40), "is a llava model, which has no max_pixels, min_pixels: omit it"),
        ("qwen", ["--padding", "crop"], "is a qwen2_5_vl model, which has no padding: omit it"),
    ],
)
def test_sizes_are_checked_before_weights_are_read(
    qwen: Path,
    picture: Path,
    command: str,
    model: str,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("llava15", "qwen25_vl"):
        monkeypatch.setattr(f"sdrpn.backbones.{module}.load_model", None)
    given = [str(picture), QUESTION]
    if command == "answer":
        questions = picture.with_name("questions.json")
        questions.write_text(json.dumps([{"id": 1, "image": picture.name, "question": QUESTION}]))
        given = [str(questions), "--images", str(picture.parent)]
        given += ["--out", str(picture.with_name("answers.jsonl"))]
    name = str(qwen) if model == "qwen" else model
    result = runner.invoke(
        app, [command, *given, "--model", name, "--proposer", "attention", *words]
    )
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    result = runner.invoke(app, ["look", str(broken), QUESTION, "--model", "tiny"])
    assert result.exit_code == 2
    assert "broken.png: not an image" in result.output


def test_a_truncated_image_is_named(picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:200])
    result = runner.invoke(app, ["look", str(picture), QUESTION, "--model", "tiny"])
    assert result.exit_code == 2
    assert "scene.png: truncated or unreadable" in result.output


def test_help_teaches() -> None:
    for command, lesson in (([], "lmms-eval --model llava_sdrpn"), (["look"], "--model tiny")):
        shown = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "200"}).output
        assert lesson in " ".join(shown.split())


def test_the_embedded_model_is_found_by_its_name() -> None:
    assert "tiny" in known()
    folder = str(tiny_path())
    assert resolve("tiny", None) == (folder, f"{folder}/rpn")
    assert resolve("tiny", "mine") == (folder, "mine")
    assert resolve("some/hub-id", None) == ("some/hub-id", None)
