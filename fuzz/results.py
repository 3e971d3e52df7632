"""Fuzzes what reads runs: results, samples, records, facts, baselines; whole, or refused by name.

python -m fuzz.results --minutes 10
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.harness import cut, harmed, holds, main, refused
from sdrpn_eval.record import read_records
from sdrpn_eval.report.html import write_page
from sdrpn_eval.results.baseline import make_baseline, read_baseline
from sdrpn_eval.results.compare import compare, gather
from sdrpn_eval.results.documents import read_boxes
from sdrpn_eval.results.gate import BROKEN, Rules, check, safely_check
from sdrpn_eval.results.read import BadRun, Run, read_run
from tests.helpers.run_folders import (
    FACTS,
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-results-"))
ROWS = [sample(i, "red" if i % 3 else "blue") for i in range(6)]


def _whole(folder: Path) -> Path:
    write_run(folder, {"toy": ROWS})
    write_record(folder, [record_line(i, ROWS[i]["filtered_resps"]) for i in range(6)])
    write_facts(folder, "3")
    return folder


WHOLE = _whole(FOLDER / "whole")
RUN = read_run(WHOLE)
BASELINE_FILE = FOLDER / "line.json"
make_baseline(gather(RUN), {}).save(BASELINE_FILE)
BASELINE = read_baseline(BASELINE_FILE)
RESULTS, SAMPLES, RECORD, FACTS_FILE = (
    next(WHOLE.rglob(name)).relative_to(WHOLE)
    for name in ("*_results.json", "*_samples_toy.jsonl", "record_toy_*.jsonl", "run_facts_*.json")
)


def with_file(name: Path, content: bytes) -> Path:
    """The whole run with other content in one of its files."""
    folder = FOLDER / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(WHOLE, folder)
    (folder / name).write_bytes(content)
    return folder


def lines(values: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON lines, some of them harmed, and then the whole."""
    plain = [json.dumps(value).encode() for value in values]
    each = [st.one_of(st.just(p), harmed(v)) for p, v in zip(plain, values, strict=True)]
    return st.tuples(*each).map(b"\n".join).flatmap(cut)


def check_run(folder: Path) -> None:
    """A run that is read can be gathered, compared, shown and held; else a sentence names it."""
    try:
        run = read_run(folder)
    except BadRun as error:
        refused(error, str(folder))
        assert [v.code for v in safely_check(folder, BASELINE, Rules({}))] == [BROKEN]
        return
    _use(run, folder)
    for verdict in check(folder, BASELINE, Rules({})):
        assert verdict.reason
        assert verdict.code in (0, 1, 2)


def _use(run: Run, folder: Path) -> None:
    try:
        make_baseline(gather(run), {})
        comparison = compare([run, run])
    except ValueError as error:
        refused(error)
        return
    json.dumps(comparison.as_dict())
    write_page(comparison, {}, folder / "page.html")


@holds(content=st.sampled_from([json.loads((WHOLE / RESULTS).read_text())]).flatmap(harmed))
def results_files(content: bytes) -> None:
    check_run(with_file(RESULTS, content))


@holds(content=lines(ROWS))
def samples_files(content: bytes) -> None:
    check_run(with_file(SAMPLES, content))


@holds(content=lines([json.loads(line) for line in (WHOLE / RECORD).read_text().splitlines()]))
def records(content: bytes) -> None:
    folder = with_file(RECORD, content)
    for line in read_records((folder / RECORD).parent):
        assert line.task
    check_run(folder)


@holds(content=harmed(FACTS))
def facts_files(content: bytes) -> None:
    check_run(with_file(FACTS_FILE, content))


def _refused_or_used(read: Callable[[Path], Any], path: Path, use: Callable[[Any], Any]) -> None:
    try:
        value = read(path)
    except ValueError as error:
        refused(error, str(path))
        return
    use(value)


@holds(content=harmed(json.loads(BASELINE_FILE.read_text())))
def baselines(content: bytes) -> None:
    path = FOLDER / "other.json"
    path.write_bytes(content)
    _refused_or_used(read_baseline, path, lambda b: safely_check(WHOLE, b, Rules({})))


@holds(content=harmed({"toy": {"0": [0, 0, 10, 10], "1": [5, 5, 6, 8]}}))
def boxes(content: bytes) -> None:
    path = FOLDER / "boxes.json"
    path.write_bytes(content)
    _refused_or_used(read_boxes, path, lambda given: compare([RUN, RUN], boxes=given))


PROPERTIES = (results_files, samples_files, records, facts_files, baselines, boxes)

if __name__ == "__main__":
    main(PROPERTIES, __doc__ or "")
