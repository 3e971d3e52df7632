"""Fixtures of the evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.comparisons import rows, run_gate
from tests.helpers.run_folders import (
    write_run,
)


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """From a run of two tasks, all right."""
    good = write_run(tmp_path / "good", {"x": rows(), "y": rows()})
    code, line = run_gate(good, tmp_path / "base" / "line.json", "--update")
    assert code == 0, line
    assert "x by accuracy,none, y by accuracy,none" in line
    return tmp_path / "base" / "line.json"
