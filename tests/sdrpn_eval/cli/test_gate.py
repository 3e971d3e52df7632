"""`sdrpn-eval gate`: options, and the guide's commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.comparisons import N, rows, run_gate
from tests.helpers.run_folders import (
    sample,
    write_run,
)


@pytest.mark.parametrize("text", ["much", "-1", "x=nan", "x=", "inf", "x=-inf", "-0.01"])
def test_a_bad_tolerance_is_named(tmp_path: Path, baseline: Path, text: str) -> None:
    for more in ([], ["--update"]):
        code, line = run_gate(tmp_path / "good", baseline, f"--tolerance={text}", *more)
        assert code == 2
        assert "must be 0 or more, and finite, got" in line
        assert line.endswith(text.rpartition("=")[2])


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown task": (
        ["--tolerance", "z=0.02"],
        "--tolerance z=0.02: the baseline has no task z, only x, y",
    ),
    "one task unknown": (
        ["--tolerance", "x=0.02", "--tolerance", "X=0.02"],
        "--tolerance X=0.02: the baseline has no task X, only x, y",
    ),
    "more than a score": (
        ["--tolerance", "2"],
        "--tolerance 2 would pass every fall: scores of x can fall by 1 at most; give a value in "
        "[0, 1)",
    ),
    "all of a score": (
        ["--tolerance", "y=1"],
        "--tolerance y=1 would pass every fall: scores of y",
    ),
    "percent": (["--tolerance", "x=5"], "--tolerance x=5 would pass every fall"),
    "no name": (["--tolerance", "=0.1"], "--tolerance =0.1: there is no task before the ="),
    "twice": (
        ["--tolerance", "0.1", "--tolerance", "0.2"],
        "--tolerance is given twice: 0.1 and 0.2",
    ),
    "a task twice": (
        ["--tolerance", "x=0.1", "--tolerance", "x=0.1"],
        "--tolerance of x is given twice: 0.1 and 0.1",
    ),
    "alpha 0": (["--alpha", "0"], "--alpha must be in (0, 1), got 0"),
    "alpha 1": (["--alpha", "1"], "--alpha must be in (0, 1), got 1"),
    "alpha 5": (["--alpha", "5"], "--alpha must be in (0, 1), got 5"),
    "alpha below 0": (["--alpha=-0.05"], "--alpha must be in (0, 1), got -0.05"),
    "alpha nan": (["--alpha", "nan"], "--alpha must be in (0, 1), got nan"),
    "alpha out of reach": (
        ["--alpha", "0.0002"],
        "--alpha 0.0002 cannot be reached: the smallest p-value of 2 task(s) is 0.0002; give a "
        "larger --alpha, or a --tolerance",
    ),
    "age 0": (["--max-age", "0"], "--max-age must be in (0, 24000000000) hours, got 0"),
    "age below 0": (["--max-age=-1"], "--max-age must be in (0, 24000000000) hours, got -1"),
    "age nan": (["--max-age", "nan"], "--max-age must be in (0, 24000000000) hours, got nan"),
    "age inf": (["--max-age", "inf"], "--max-age must be in (0, 24000000000) hours, got inf"),
    "age 1e300": (["--max-age", "1e300"], "hours, got 1e+300"),
    "skipped": (["--allow-skipped=-1"], "--allow-skipped must be 0 or more, got -1"),
    "metric of no task": (["--metric", "accuracy"], "--metric must be TASK=METRIC, got 'accuracy'"),
    "metric twice": (
        ["--metric", "x=accuracy", "--metric", "x=accuracy"],
        "--metric of x is given twice: accuracy and accuracy",
    ),
    "metric of an unknown task": (
        ["--metric", "z=accuracy"],
        "--metric z=accuracy: the baseline has no task z, only x, y",
    ),
}


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_mean_anything_are_refused(
    tmp_path: Path, baseline: Path, case: str, update: bool
) -> None:
    words, says = BAD_OPTIONS[case]
    before = baseline.read_text()
    run = write_run(tmp_path / "run", {"x": rows(wrong=1), "y": rows()})
    code, line = run_gate(run, baseline, *words, *(["--update"] if update else []))
    assert code == 2
    assert line.startswith("error: ")
    if not (update and case == "metric of an unknown task"):
        assert says in line
    assert baseline.read_text() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--junit", "gate.xml"], "--junit has no effect with --update"),
        (["--metric", "x=accuracy"], "--metric has no effect with --update"),
    ],
)
def test_options_of_a_check_are_refused_with_update(
    tmp_path: Path, baseline: Path, words: list[str], says: str
) -> None:
    code, line = run_gate(tmp_path / "good", baseline, "--update", *words)
    assert code == 2
    assert says in line


@pytest.mark.parametrize("allowed", [2.0, 1.0, -0.1])
def test_a_tolerance_in_the_baseline_is_checked_too(
    tmp_path: Path, baseline: Path, allowed: float
) -> None:
    content = json.loads(baseline.read_text()) | {"tolerance": {"x": allowed}}
    baseline.write_text(json.dumps(content))
    code, line = run_gate(tmp_path / "good", baseline)
    assert code == 2
    assert f"--tolerance x={allowed:g}" in line


def test_a_tolerance_has_the_scale_of_the_score(tmp_path: Path) -> None:
    """Points from 0 to 20: a fall of 5 can be allowed, one of 20 is a fall to nothing."""
    base = tmp_path / "b.json"

    def run(name: str, points: float) -> Path:
        lines = [sample(i, accuracy=points if i else 20.0) for i in range(N)]
        mean = (points * (N - 1) + 20) / N
        return write_run(tmp_path / name, {"toy": lines}, {"toy": {"accuracy,none": mean}})

    run_gate(run("good", 20), base, "--update")
    assert run_gate(run("less", 16), base, "--tolerance", "5")[0] == 0
    assert run_gate(run("less", 16), base, "--tolerance", "3")[0] == 1
    code, line = run_gate(run("less", 16), base, "--tolerance", "20")
    assert code == 2
    assert "scores of toy can fall by 20 at most; give a value in [0, 20)" in line


@pytest.mark.slow
def test_commands_of_the_guide_and_the_workflow_run(tmp_path: Path) -> None:
    """docs/ci.md's commands, then the workflow's, in an empty folder: as written, but for how many
    questions they ask, which decides what a gate can see and not whether a command runs."""
    docs = Path(__file__).parents[3] / "docs"
    guide = re.findall(r"```bash\n(.*?)```", (docs / "ci.md").read_text(), re.DOTALL)
    (job,) = yaml.safe_load((docs / "github-actions.yml").read_text())["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps.pop(0) == "pip install '.[eval]'"
    commands = [*guide, *steps]
    assert sum("sdrpn-eval gate" in command for command in commands) == 5
    programs = {"lmms-eval": "lmms_eval", "sdrpn-eval": "sdrpn_eval"}
    for name, module in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "ACCELERATE_USE_CPU": "1",
        **job["env"],
    }
    environment.pop("SDRPN_DATA", None)
    # The workflow evaluates and gates with the guide's own commands: once is enough here.
    assert len(set(commands)) == len(commands) - 2
    assert sum("--limit 400 " in command for command in commands) == 4
    for command in dict.fromkeys(commands):
        done = subprocess.run(
            ["bash", "-e", "-c", command.replace("--limit 400 ", "--limit 80 ")],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "out" / "comparison" / "compare.html").stat().st_size > 20_000
    assert (tmp_path / "replay" / "tiny_vstar_7" / "crop_1.png").exists()
    summary = (tmp_path / "summary.md").read_text()
    assert summary.count("### gate: passed") == 3
    assert "### Scores" in summary
