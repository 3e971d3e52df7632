"""A comparison in words and tables."""

from __future__ import annotations

from pathlib import Path

from sdrpn_eval.report import text
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import read_run
from tests.helpers.comparisons import compared, pair
from tests.helpers.run_folders import (
    sample,
    write_facts,
    write_run,
)


def test_documents_that_failed_are_told(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows)
    write_facts(folders[1], "aa", skipped={"toy": 1})
    said = "\n".join(text.cautions(compared(*folders)))
    assert "rpn: 1 document(s) of toy were skipped or answered without a second look" in said


def test_the_protocol_stands_beside_a_score(tmp_path: Path) -> None:
    """58.2 and 46.1 are both TextVQA: the table says which one this is."""
    scores = {"textvqa_val_ocr": [sample(i) for i in range(3)], "toy": [sample(0)]}
    runs = [read_run(write_run(tmp_path / name, scores)) for name in ("a", "b")]
    comparison = compare(runs)
    said = {row.task: row.protocol for row in comparison.rows}
    assert said == {"textvqa_val_ocr": "OCR tokens in the prompt", "toy": ""}
    table = text.markdown(comparison)
    assert "| task | protocol | metric |" in table
    assert "OCR tokens in the prompt" in table
    toys = compare([read_run(run.folder, tasks=["toy"]) for run in runs])
    assert "protocol" not in text.markdown(toys)


def test_markdown_holds_hostile_names(tmp_path: Path) -> None:
    rows = [sample(0)]
    one = write_run(tmp_path / "a|b", {"toy": rows})
    page = text.markdown(compared(one, write_run(tmp_path / "<b>", {"toy": rows})))
    assert r"a\|b" in page
    assert r"\<b\>" in page
