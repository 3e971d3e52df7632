"""Commands that read JSON import nothing that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.embedded_runs import N, embedded_hashes, shown
from tests.helpers.run_folders import record_line, sample, write_facts, write_record, write_run

SLOW = ["torch", "transformers", "datasets", "lmms_eval", "accelerate", "pandas", "matplotlib"]
SLOW += ["scipy.stats", "sklearn", "sdrpn.engine", "sdrpn.inference.prefix"]

PROGRAM = """
import json, sys
sys.argv = json.loads(sys.argv[1])
from {module} import app
try:
    app()
except SystemExit as done:
    code = done.code
print(json.dumps([code, [name for name in {names} if name in sys.modules]]))
"""


def imported(words: list[str], names: list[str], module: str = "sdrpn_eval.cli") -> list[Any]:
    """[exit code, which of the names a command imported], in a process of its own."""
    program = PROGRAM.format(module=module, names=names)
    argv = json.dumps(["sdrpn-eval", *words])
    done = subprocess.run(
        [sys.executable, "-c", program, argv], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Stock, and a run with a record and facts."""
    rows = [sample(i) for i in range(N)]
    folders = [
        write_run(tmp_path / "stock", {"tiny_vstar": rows}, model_args="proposer=none"),
        write_run(tmp_path / "rpn", {"tiny_vstar": rows}),
    ]
    write_record(folders[1], [record_line(i, "red", task="tiny_vstar") for i in range(N)])
    write_facts(folders[1], "aa")
    return folders


@pytest.mark.slow
def test_the_list_names_what_is_slow(tmp_path: Path) -> None:
    """The check below would see it: `--update` writes versions down, and needs torch for it."""
    run = write_run(tmp_path / "run", {"toy": [sample(i) for i in range(N)]})
    words = ["gate", str(run), "--baseline", str(tmp_path / "b.json"), "--update"]
    assert imported(words, ["torch"]) == [0, ["torch"]]


@pytest.mark.parametrize("words", [[], ["gate"], ["compare"], ["ladder"], ["curve"], ["score"]])
def test_help_imports_nothing_slow(words: list[str]) -> None:
    assert imported([*words, "--help"], [*SLOW, "scipy"]) == [0, []]


def test_help_of_sdrpn_imports_nothing_slow() -> None:
    assert imported(["--help"], [*SLOW, "scipy"], module="sdrpn.cli") == [0, []]


@pytest.mark.slow
@pytest.mark.parametrize(("state", "code"), [("equal", 0), ("fell", 1), ("broken", 2)])
def test_a_gate_imports_nothing_slow(
    tmp_path: Path, runs: list[Path], state: str, code: int
) -> None:
    base, run = tmp_path / "b.json", runs[1]
    assert imported(["gate", str(run), "--baseline", str(base), "--update"], []) == [0, []]
    if state == "broken":
        next(run.rglob("*_samples_*.jsonl")).unlink()
    elif state == "fell":
        wrong = [sample(i, "blue") for i in range(N)]
        run = write_run(tmp_path / "fell", {"tiny_vstar": wrong})
    words = ["gate", str(run), "--baseline", str(base), "--junit", str(tmp_path / "x.xml")]
    # The test of a difference is scipy's; where nothing differs, it is not needed.
    slow = [name for name in SLOW if name != "scipy.stats"] if state == "fell" else SLOW
    assert imported(words, slow) == [code, []]


def test_a_comparison_imports_nothing_slow_and_shows_pictures(tmp_path: Path) -> None:
    folders = [shown(tmp_path / name, embedded_hashes()) for name in ("stock", "rpn")]
    words = ["compare", *map(str, folders), "--out", str(tmp_path / "out")]
    slow = [name for name in SLOW if name not in ("datasets", "pandas")]
    assert imported(words, slow) == [0, []]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/webp") == len(set(embedded_hashes()))
    table = json.loads((tmp_path / "out" / "compare.json").read_text())["tasks"][0]
    assert table["boxes"]["rpn"][0]["questions"] == N
