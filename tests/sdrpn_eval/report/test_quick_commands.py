"""Commands that read JSON import nothing that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdrpn_eval.report import documents
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


def imported(
    words: list[str], names: list[str], module: str = "sdrpn_eval.report.cli"
) -> list[Any]:
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
    rows = [sample(i) for i in range(6)]
    folders = [
        write_run(tmp_path / "stock", {"tiny_vstar": rows}, model_args="proposer=none"),
        write_run(tmp_path / "rpn", {"tiny_vstar": rows}),
    ]
    write_record(folders[1], [record_line(i, "red", task="tiny_vstar") for i in range(6)])
    write_facts(folders[1], "aa")
    return folders


@pytest.mark.slow
def test_the_list_names_what_is_slow(tmp_path: Path) -> None:
    """The check below would see it: `--update` writes versions down, and needs torch for it."""
    run = write_run(tmp_path / "run", {"toy": [sample(i) for i in range(6)]})
    words = ["gate", str(run), "--baseline", str(tmp_path / "b.json"), "--update"]
    assert imported(words, ["torch"]) == [0, ["torch"]]


@pytest.mark.parametrize("words", [[], ["gate"], ["compare"], ["ladder"], ["curve"], ["score"]])
def test_help_imports_nothing_slow(words: list[str]) -> None:
    assert imported([*words, "--help"], [*SLOW, "scipy"]) == [0, []]


def test_help_of_sdrpn_imports_nothing_slow() -> None:
    assert imported(["--help"], [*SLOW, "scipy"], module="sdrpn.cli") == [0, []]


@pytest.mark.slow
@pytest.mark.parametrize("good", [True, False])
def test_a_gate_imports_nothing_slow(tmp_path: Path, runs: list[Path], good: bool) -> None:
    base = tmp_path / "b.json"
    assert imported(["gate", str(runs[1]), "--baseline", str(base), "--update"], []) == [0, []]
    if not good:
        next(runs[1].rglob("*_samples_*.jsonl")).unlink()
    words = ["gate", str(runs[1]), "--baseline", str(base), "--junit", str(tmp_path / "x.xml")]
    assert imported(words, SLOW) == [0 if good else 2, []]


@pytest.mark.slow
def test_a_comparison_imports_only_what_looks_tasks_up(tmp_path: Path, runs: list[Path]) -> None:
    """lmms-eval's index of tasks, for the pictures, imports torch; our model is not needed."""
    names = [
        "transformers.models.llama.modeling_llama",
        "sdrpn.engine",
        "sdrpn.inference.prefix",
        "matplotlib",
    ]
    words = ["compare", *map(str, runs), "--out", str(tmp_path / "out")]
    assert imported(words, names) == [0, []]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "everything"), [("tiny_vstar", [False]), ("mme", [False, True])])
def test_the_files_of_all_tasks_are_read_only_where_a_task_is_theirs(
    monkeypatch: pytest.MonkeyPatch, name: str, everything: list[bool]
) -> None:
    asked, original = [], documents.task_manager

    def recorded(include_path: Any = None, include_defaults: bool = True) -> Any:
        asked.append(include_defaults)
        return original(include_path, include_defaults)

    monkeypatch.setattr(documents, "task_manager", recorded)
    documents.load_data([name])
    assert asked == everything
