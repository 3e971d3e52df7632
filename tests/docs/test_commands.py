"""Every command of a page is run by a test, or its block says that it needs real weights.

Commands are run in this process and in order, in a folder that looks like a clone, with fewer
pictures, steps and documents than a reader would take.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.utils import simple_parse_args_string
from typer.testing import CliRunner

import sdrpn.cli
import sdrpn_eval.cli
from sdrpn.engine import ZoomModel
from sdrpn.model_registry import resolve
from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.demo.run import MODEL, TASK
from sdrpn_eval.loading import EMBEDDED
from tests.docs.pages import PAGES, ROOT, blocks, commands
from tests.helpers.run_folders import evaluate
from tools.lint.dependencies import OPTIONAL
from tools.tiny_vstar import make_benchmark, make_questions

RUN_BY = {
    "README.md": "tests/docs/test_commands.py",
    "CONTRIBUTING.md": "tests/docs/test_commands.py",
    "docs/app.md": "tests/sdrpn/cli/test_app_command.py",
    "docs/budgets.md": "tests/docs/test_commands.py",
    "docs/ci.md": "tests/sdrpn_eval/cli/test_gate.py",
    "docs/evaluate.md": "tests/docs/test_commands.py",
    "docs/heads.md": "tests/docs/test_commands.py",
    "docs/speed.md": "tests/benchmarks/test_gpu_script.py",
    "docs/own_questions.md": "tests/sdrpn/cli/test_answer.py",
    "docs/tiny_trio.md": "tests/tools/test_trio_results.py",
    "docs/tiny_vstar.md": "tests/tools/test_tiny_vstar.py",
    "jobs/README.md": "tests/jobs/test_row.py",
}
"""Pages with commands, and the test that runs them."""
HERE = [page for page, test in RUN_BY.items() if test == "tests/docs/test_commands.py"]
FEWER = {"--scenes": "6", "--max_steps": "2", "--preview": "2", "--global-batch": "16"}
ONE = [
    word
    for name in ("gate", "crop-tokens", "tiles", "keep-tokens")
    for word in (f"--{name}", "none")
]
MORE = {
    "heads": ["--scenes", "6"],
    "make_benchmark": ["--images", "2"],
    "sweep": ["--limit", "6", *ONE],
    "train": ["--held-out", "0.2"],
}
"""What the reader's sizes do not need."""
LIMIT = 6
APPS: dict[str, Any] = {"sdrpn": sdrpn.cli.app, "sdrpn-eval": sdrpn_eval.cli.app}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_every_page_with_commands_has_a_test() -> None:
    pages = {page for page in PAGES if any(commands(page))}
    assert pages == set(RUN_BY)
    for page, test in RUN_BY.items():
        source = (ROOT / test).read_text()
        assert Path(page).name in source or "spaces" in source, f"{test} does not read {page}"


def run(words: list[str]) -> None:
    if words[0].startswith("SDRPN_DATA="):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(*words[0].split("="))
            return run(words[1:])
    program, *rest = words
    name = Path(program).name
    if name == "pip":
        (extras,) = re.findall(r"\[(.*)\]", rest[-1])
        assert set(extras.split(",")) <= OPTIONAL.keys()
    elif name == "make":
        assert rest[0] in TARGETS
        if rest == ["demo"]:  # what it leaves; tests/sdrpn_eval/demo runs it
            stock = ZoomModel.from_pretrained(resolve(MODEL, None)[0], proposer="none")
            lmms_eval("out/demo/stock", stock, TASK)
            lmms_eval("out/demo/rpn", MODEL, TASK)
    elif name in APPS:
        if rest != ["app"]:  # in test_app_command.py
            fewer = [FEWER.get(before, word) for before, word in zip(words, rest, strict=False)]
            fewer += MORE.get(rest[0], [])
            done = CliRunner().invoke(APPS[name], fewer)
            assert done.exit_code == 0, (words, done.output, done.exception)
    elif name == "python":
        modules = {"make_benchmark": make_benchmark, "make_questions": make_questions}
        assert rest[0] == "-m"
        package, _, module = rest[1].rpartition(".")
        assert package == "tools.tiny_vstar"
        with pytest.MonkeyPatch.context() as patch:
            words = [FEWER.get(before, word) for before, word in zip(words, rest, strict=False)]
            patch.setattr(sys, "argv", [*words[1:], *MORE.get(module, [])])
            modules[module].main()
    else:
        assert name == "lmms-eval", words
        options = dict(zip(rest[::2], rest[1::2], strict=False))
        assert options["--model"] == "llava_sdrpn"
        task = options["--tasks"]
        given = simple_parse_args_string(options["--model_args"])
        LlavaArguments.of(given)  # a file of zoom settings is there
        model, rpn = resolve(given["pretrained"], given.get("rpn"))
        assert EMBEDDED[given["pretrained"]] == task
        engine = ZoomModel.from_pretrained(model, rpn=rpn)
        lmms_eval(options.get("--output_path", "out"), engine, task)


def lmms_eval(out: str, engine: Any, task: str) -> None:
    evaluate(Path(out), engine, [task], limit=LIMIT, log_samples=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", HERE)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    ran = list(commands(page))
    for words in ran:
        run(words)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})
    if page == "README.md":
        assert len(ran) >= 15
        left = ("look.png", "out/my-rpn/rpn.safetensors", "out/my-model/README.md", "out/base.json")
        assert all((tmp_path / name).is_file() for name in left)
        assert list((tmp_path / "out" / "mine").rglob("*_results.json"))
