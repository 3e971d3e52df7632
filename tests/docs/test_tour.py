"""docs/tour.ipynb, run from the first cell to the last."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install 'sdrpn[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'sdrpn[docs]'")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    last = notebook.cells[-2].outputs[-1]["data"]["text/plain"]
    scores = {name: float(text.split()[0]) for name, text in ast.literal_eval(last).items()}
    assert scores.keys() == {"stock", "RPN of ten images", "RPN that ships with the model"}
    stock, ten, shipped = scores.values()
    assert 45 < stock < 65
    assert stock < ten < shipped
    assert shipped > 90
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3


def test_the_first_cell_installs_and_no_cell_failed() -> None:
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert '%pip install -q "sdrpn[train,eval]"' in "".join(cells[0]["source"])
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result"}
    assert NOTEBOOK.stat().st_size < 300_000
