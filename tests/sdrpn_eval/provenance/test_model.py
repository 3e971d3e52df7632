"""The provenance of a run as it is read back: processes put together, older files, arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sdrpn_eval.provenance.model import (
    Provenance,
    begun_runs,
    merge,
    moment,
    parsed_arguments,
    read_latest,
    read_provenance,
)
from sdrpn_eval.results.read import read_run
from sdrpn_eval.results.records import record_folders
from tests.helpers.run_folders import FACTS, sample, write_facts, write_run

TEXT = "pretrained=tiny,record=elsewhere/record,threshold=0.2"
PARSED = {"pretrained": "tiny", "record": "elsewhere/record", "threshold": 0.2}


def part(rank: int, **more: Any) -> Provenance:
    return Provenance.model_validate({**FACTS, "rank": rank, **more})


def task(data: str, documents: int) -> dict[str, Any]:
    return {"toy": {"data": data, "prompts": "1", "scorer": "s", "documents": documents}}


def write(folder: Path, name: str, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"run_facts_{name}_rank0.json"
    path.write_text(json.dumps({**FACTS, "run": name, **more}))
    return path


def test_processes_are_put_together() -> None:
    parts = [
        part(1, tasks=task("ff", 2), skipped={"toy": 1}, weights={}),
        part(0, tasks=task("02", 3)),
    ]
    whole = merge(parts)
    assert whole.rank == 0
    assert whole.weights == {"rpn/rpn.safetensors": "ab"}
    assert whole.skipped == {"toy": 1}
    (toy,) = whole.tasks.values()
    assert (toy.documents, toy.data, toy.prompts) == (5, f"{0xFF + 2:032x}", f"{2:032x}")
    assert (toy.scorer, toy.scorer_source) == ("s", None)


def test_a_file_of_version_0_1_is_read(tmp_path: Path) -> None:
    """It has neither a format's later fields, nor arguments as given."""
    path = write(tmp_path, "20260301T120001.000000Z", note={"kept": 1})
    found = read_provenance([path])
    assert found.files == (path,)
    assert found.model_args is None
    assert found.tasks["toy"].documents == 0
    assert found.model_dump()["note"] == {"kept": 1}


@pytest.mark.parametrize("content", ["{", "[]", '{"run": 3}', json.dumps(FACTS | {"rank": -1})])
def test_a_broken_file_is_named_with_a_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run_facts_x_rank0.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read: .*so delete it"):
        read_provenance([path])


def test_the_latest_run_by_its_name(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    write(tmp_path, "20260301T120000.000000Z", tasks=task("1", 2))
    write(tmp_path, "20260301T130000.000000Z", tasks={})
    write(tmp_path, "no-time")
    assert set(begun_runs(tmp_path)) == {
        *("20260301T120000.000000Z", "20260301T130000.000000Z", "no-time")
    }
    assert moment("no-time") is None
    latest, asked = read_latest(tmp_path), read_latest(tmp_path, asked=True)
    assert latest is not None
    assert asked is not None
    assert latest.run == "20260301T130000.000000Z"
    assert asked.run == "20260301T120000.000000Z"


def test_arguments_are_known_by_the_text_they_were_given_in(tmp_path: Path) -> None:
    given = {"model_args": {"text": TEXT, "parsed": PARSED}}
    write(tmp_path / "b", "20260301T120000.000000Z", **given)
    (tmp_path / "b" / "run_facts_broken_rank0.json").write_text("{")
    folders = [tmp_path / "a", tmp_path / "b"]
    assert parsed_arguments(folders, TEXT) == PARSED
    assert parsed_arguments(folders, f"{TEXT},policy=mask") is None
    assert parsed_arguments(folders, PARSED) is None
    assert parsed_arguments(folders, None) is None


def test_a_run_s_arguments_are_read_without_lmms_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parser takes seconds to import; only runs of version 0.1 need it."""
    folder = write_run(tmp_path / "run", {"toy": [sample(0)]}, model_args=TEXT)
    write_facts(folder, "s", model_args={"text": TEXT, "parsed": PARSED})
    monkeypatch.setitem(sys.modules, "lmms_eval.utils", None)
    run = read_run(folder)
    assert run.arguments == PARSED
    assert record_folders(run) == [folder / "sdrpn_record"]
    write_facts(folder, "s")
    with pytest.raises(ImportError):
        _ = read_run(folder).arguments
