"""benchmarks/gpu.sh: its steps run on a CPU, and its limits hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu

SMALL = ["--device", "cpu", "--shape", "small", "--layers", "5", "--dtypes", "float32"]
CHEAP = ["--batch-sizes", "1", "2", "--repeats", "1", "--questions", "6"]


@pytest.mark.slow
def test_every_step_writes_its_part_of_the_report(tmp_path: Path) -> None:
    names = ["llava-float32", "qwen", "batch_changes", "compiled"]
    assert gpu.main([*SMALL, *CHEAP, "--out", str(tmp_path), "--steps", *names]) == 0
    states = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert states == dict.fromkeys(names, "ok")
    report = (tmp_path / "report.md").read_text()
    assert "| 2 | sdrpn, fastest |" in report
    assert "| stock, left-padded | float32 | 6 | 2 | 0 | 0 |" in report
    assert "| sdrpn-fast | " in report.partition("torch.compile")[2]


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


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no GPU here; --device cpu" in capsys.readouterr().err
