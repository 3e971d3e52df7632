"""The core works without optional dependencies, and what needs one says which extra brings it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdrpn.convert.tokenizer import read_tokenizer
from sdrpn.io.checkpoint_files import Source
from sdrpn.io.extras import MissingExtra, needs

BLOCKED = (
    "bitsandbytes",
    "datasets",
    "gradio",
    "lmms_eval",
    "loguru",
    "matplotlib",
    "peft",
    "pyarrow",
    "sentencepiece",
    "sklearn",
)
"""Every top-level module that only an extra brings and the code imports."""
BLOCKER = f"""
import runpy, sys
for name in {BLOCKED}:
    sys.modules[name] = None  # as if it were not installed
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
ROOT = Path(__file__).parents[3]
SCENE, QUESTION = str(ROOT / "docs" / "scene.png"), "what pattern is on the yellow disc ?"


def run(*words: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output, as one line, of `python -m` without the optional dependencies."""
    command = [sys.executable, "-c", BLOCKER, *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_a_missing_module_names_its_distribution_and_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra) as error:
        needs("numpy", "sklearn", "no_such_module", extra="train", what="this")
    message = "this needs scikit-learn, no_such_module: pip install 'sdrpn[train]'"
    assert str(error.value) == message
    needs("numpy", "torch", extra="train", what="this")


def test_the_first_tokenizer_of_llava_needs_sentencepiece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    message = r"tokenizer\.model needs sentencepiece: pip install 'sdrpn\[convert\]'"
    with pytest.raises(MissingExtra, match=message):
        read_tokenizer(Source(str(tmp_path)))


@pytest.mark.slow
def test_the_public_names_import(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text(
        "import sdrpn\nfor name in sdrpn.__all__: getattr(sdrpn, name)\nprint('all there')\n"
    )
    assert run("names", cwd=tmp_path) == (0, "all there")


@pytest.mark.parametrize(
    "words",
    [
        ("sdrpn.cli", "--help"),
        ("sdrpn.cli", "train", "--help"),
        ("sdrpn.cli", "convert", "labels", "--help"),
        ("sdrpn_eval", "--help"),
        ("sdrpn_eval.demo", "--help"),
    ],
    ids=" ".join,
)
def test_help_works(words: tuple[str, ...], tmp_path: Path) -> None:
    code, output = run(*words, cwd=tmp_path)
    assert code == 0, output
    assert "Usage" in output or "usage" in output


@pytest.mark.slow
def test_look_answers_without_a_picture(tmp_path: Path) -> None:
    code, output = run("sdrpn.cli", "look", SCENE, QUESTION, "--model", "tiny", cwd=tmp_path)
    assert code == 0, output
    assert "second look: yellow checked" in output
    assert "no picture: drawing look.png needs matplotlib: pip install 'sdrpn[plot]'" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_answer_works(tmp_path: Path) -> None:
    line = {"id": "a", "image": "scene.png", "question": QUESTION}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    words = ("questions.jsonl", "--images", str(ROOT / "docs"), "--out", "answers.jsonl")
    code, output = run("sdrpn.cli", "answer", *words, "--model", "tiny", cwd=tmp_path)
    assert code == 0, output
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"] == "yellow checked"


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        ("sdrpn.cli look {scene} question --model tiny --out x.png", "matplotlib", "plot"),
        pytest.param(
            *("sdrpn.cli heads --out heads --model tiny", "datasets", "train"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("sdrpn.cli label --data x.json --out x --model tiny", "datasets", "train"),
            marks=pytest.mark.slow,
        ),
        ("sdrpn.cli relabel x --out y", "datasets", "train"),
        pytest.param(
            *("sdrpn.cli train --labels x --out y", "datasets", "train"), marks=pytest.mark.slow
        ),
        ("sdrpn.cli train-gate x --images . --out y", "datasets", "train"),
        ("sdrpn.cli convert labels {scene} --out x", "datasets", "train"),
        ("sdrpn.cli app", "gradio", "app"),
        ("sdrpn_eval compare a b", "lmms-eval", "eval"),
        ("sdrpn_eval card a --to b", "lmms-eval", "eval"),
        ("sdrpn_eval gate a --baseline b", "lmms-eval", "eval"),
        ("sdrpn_eval score a", "lmms-eval", "eval"),
        ("sdrpn_eval replay a --doc b:1", "lmms-eval", "eval"),
        ("sdrpn_eval ladder", "lmms-eval", "eval"),
        ("sdrpn_eval curve", "lmms-eval", "eval"),
        ("sdrpn_eval.demo", "lmms-eval", "eval"),
    ],
)
def test_a_command_says_which_extra_it_needs(
    words: str, missing: str, extra: str, tmp_path: Path
) -> None:
    code, output = run(*(word.format(scene=SCENE) for word in words.split()), cwd=tmp_path)
    assert code != 0
    assert re.search(rf"error: .* needs {missing}\b", output), output
    assert output.endswith(f"pip install 'sdrpn[{extra}]'")
    assert "Traceback" not in output
