"""`sdrpn look` as a user types it, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdrpn.cli import app
from sdrpn.model_registry import known, resolve
from sdrpn_eval.demo import tiny_path

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
