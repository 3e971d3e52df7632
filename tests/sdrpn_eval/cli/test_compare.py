"""`sdrpn-eval compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from tests.helpers.comparisons import pair
from tests.helpers.run_folders import (
    sample,
    write_run,
)


def test_command_writes_everything(tmp_path: Path) -> None:
    wrong, right = [[sample(i, a) for i in range(10)] for a in ("blue", "red")]
    folders = pair(tmp_path, wrong, right)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", *map(str, folders), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "rpn is better than stock" in " ".join(done.output.split())
    content = json.loads((out / "compare.json").read_text())
    assert content["rows"][0]["scores"][1]["mean"] == 1.0
    assert content["rows"][0]["differences"][0]["wins"] == 10
    page = (out / "compare.md").read_text()
    assert "| toy | accuracy | 10 / 10 | stock | 0.0 [0.0, 30.8] |" in page
    assert "**toy: rpn is better than stock" in page
    assert "<title>stock / rpn</title>" in (out / "compare.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}"], "compare needs two runs or more, got 1"),
        (["{run}", "{run}/gone"], "gone does not exist"),
        (["{run}", "{run}", "--names", "a"], "--names has 1 name for 2 runs"),
        (["{run}", "{run}", "--names", "a,a"], "runs need different names"),
        (["{run}", "{run}", "--names", "a,b", "--tasks", "nope"], "has no results for nope"),
        (["{run}", "{run}", "--names", "a,b", "--boxes", "{run}/no.json"], "no.json must hold"),
        (["{run}", "{run}", "--budget-mb", "nan"], "--budget-mb must be greater than 0, got nan"),
        (["{run}", "{run}", "--budget-mb", "0"], "--budget-mb must be greater than 0, got 0"),
        (["{run}", "{run}", "--budget-mb", "inf"], "--budget-mb must be greater than 0, got inf"),
        (["{run}", "{run}", "--seed", "-1"], "--seed must be 0 or more, got -1"),
    ],
)
def test_wrong_use_ends_with_one_sentence(tmp_path: Path, words: list[str], says: str) -> None:
    run = write_run(tmp_path / "run", {"toy": [sample(0)]})
    done = CliRunner().invoke(app, ["compare", *(w.format(run=run) for w in words)])
    assert done.exit_code == 2
    assert says in " ".join(done.output.split()).replace("\n", "")
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["compare", "gate"])
def test_help_teaches(command: str) -> None:
    help_ = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"}).output
    assert help_.count(f"  sdrpn-eval {command} out/") == 2
    assert ("[x0, y0, x1, y1]" in help_) == (command == "compare")
