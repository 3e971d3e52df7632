"""benchmarks/gpu.sh: its steps run on a CPU, and its limits hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import batch_changes, compiled, gpu, throughput
from tests.docs.pages import ROOT, commands

SMALL = ["--device", "cpu", "--shape", "small", "--layers", "5", "--dtypes", "float32"]
CHEAP = ["--batch-sizes", "1", "--repeats", "1", "--questions", "6"]
PARSERS = {"benchmarks.throughput": throughput.parser, "benchmarks.compiled": compiled.parser}
PARSERS |= {"benchmarks.batch_changes": batch_changes.parser}


@pytest.mark.slow
def test_every_step_writes_its_part_of_the_report(tmp_path: Path) -> None:
    # Not qwen: 4096 tokens an image take minutes on a CPU.
    names = ["llava-float32", "batch_changes", "compiled"]
    assert gpu.main([*SMALL, *CHEAP, "--out", str(tmp_path), "--steps", *names]) == 0
    states = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert states == dict.fromkeys(names, "ok")
    report = (tmp_path / "report.md").read_text()
    assert "| 1 | sdrpn, fastest |" in report
    assert "| stock, left-padded | float32 | 6 | 1 | 0 | 0 |" in report
    assert "| sdrpn-fast | " in report.partition("torch.compile")[2]


def test_every_command_is_one_that_its_module_reads() -> None:
    steps = gpu.steps(gpu.parser().parse_args([]))
    read = []
    for step in steps:
        module, *words = step.command
        if module != "pytest":
            read.append(PARSERS[module]().parse_args(words))
    assert len(read) >= 5
    assert {found.dtype for found in read if "dtype" in found} == {"float16", "bfloat16"}
    assert [found.family for found in read if "family" in found].count("qwen2_5_vl") == 1


def test_steps_without_time_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*SMALL, "--out", str(tmp_path), "--minutes", "0"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert report.count("**not run: no time left**") >= 5
    assert report in capsys.readouterr().out


def test_a_failed_step_is_named_and_the_others_run(tmp_path: Path) -> None:
    words = [*SMALL, "--questions", "-1", "--batch-sizes", "0", "--out", str(tmp_path)]
    assert gpu.main([*words, "--steps", "batch_changes"]) == 1
    report = (tmp_path / "report.md").read_text()
    assert "**failed, see batch_changes.log**" in report
    assert "Error" in (tmp_path / "batch_changes.log").read_text()


def test_the_command_of_the_page_runs() -> None:
    (words,) = commands("docs/speed.md")
    done = subprocess.run(
        [ROOT / words[0], "--help"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: benchmarks/gpu.sh" in done.stdout


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no GPU here; --device cpu" in capsys.readouterr().err
