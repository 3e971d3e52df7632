"""JUnit XML and GitHub's summary."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.helpers.comparisons import rows, run_gate
from tests.helpers.run_folders import (
    write_run,
)


def test_junit_and_step_summary(
    tmp_path: Path, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", {"x": rows(wrong=9), "y": rows()})
    _cut_y = next(run.rglob("*_samples_y.jsonl"))
    _cut_y.write_text("")
    summary, junit = tmp_path / "summary.md", tmp_path / "reports" / "gate.xml"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert run_gate(run, baseline, "--junit", str(junit))[0] == 2
    suite = ElementTree.parse(junit).getroot()[0]
    assert [suite.get(k) for k in ("tests", "failures", "errors")] == ["2", "1", "1"]
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {"x accuracy,none": ["failure"], "y accuracy,none": ["error"]}
    text = summary.read_text()
    assert "### gate: broken: y accuracy" in text
    assert "| x | accuracy,none | 1.0000 | 0.7750 | fell: fell by 0.2250" in text
    run_gate(tmp_path / "good", baseline)
    assert "### gate: passed, 2 task(s) stand" in summary.read_text()
