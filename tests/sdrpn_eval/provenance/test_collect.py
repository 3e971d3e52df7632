"""What a run writes down of itself, and that it moves when, and only when, a score could."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrpn_eval.demo import embedded_model
from sdrpn_eval.provenance import fingerprints as fp
from sdrpn_eval.provenance.collect import (
    Collector,
    hash_in_background,
    hash_sources,
    local_folder,
    source_state,
    versions,
    weights_only,
)
from sdrpn_eval.requests import Request
from sdrpn_eval.results.comparability import established
from sdrpn_eval.results.compare import compare, gather
from sdrpn_eval.results.read import read_run
from tests.helpers import run_folders
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import manager, tiny_vstar_rows, write

CPU = torch.device("cpu")


def request(doc_id: int, prompt: str = "what?", extra: Any = None, **more: Any) -> Request:
    given = {"doc_to_visual": lambda doc: [], "padding_only": False} | more
    return Request(doc_id, prompt, extra or {}, doc_id=doc_id, task="toy", split="test", **given)


@pytest.fixture
def facts(tmp_path: Path) -> Collector:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    sources = {"pretrained": str(tmp_path / "model"), "rpn": None}
    (tmp_path / "model" / "config.json").write_text("{}")
    arguments = {"proposer": "rpn", "threshold": 0.1}
    hashes = hash_in_background(sources, None)
    return Collector(tmp_path / "record", "20260301T120000.000000Z", 0, 1, arguments, hashes, CPU)


def test_the_file_holds_what_the_run_is_made_of(facts: Collector) -> None:
    padding = request(3, padding_only=True)
    facts.hashes.result()
    facts.add([request(0), request(1), padding], {"toy": {"test": tiny_vstar_rows(4)}})
    content = json.loads(facts.path.read_text())
    assert facts.path.name == "run_facts_20260301T120000.000000Z_rank0.json"
    assert content["versions"]["torch"] == torch.__version__ == versions()["torch"]
    assert content["arguments"] == {"proposer": "rpn", "threshold": 0.1}
    assert list(content["weights"]) == ["pretrained/model.safetensors"]
    assert content["device"]["type"] == "cpu"
    assert content["tasks"]["toy"]["documents"] == 2
    assert content["tasks"]["toy"]["data"] == fp.data_fingerprint(tiny_vstar_rows(4), [0, 1])


def test_the_file_waits_for_no_hash(facts: Collector) -> None:
    hashed: Future[dict[str, str]] = Future()
    facts.hashes = hashed
    facts.add([request(0)], {"toy": {"test": tiny_vstar_rows(1)}})
    assert json.loads(facts.path.read_text())["weights"] == {}
    hashed.set_result({"rpn/rpn.safetensors": "a", "rpn/config.json": "b"})
    facts.write()
    assert json.loads(facts.path.read_text())["weights"] == {"rpn/rpn.safetensors": "a"}


def test_requests_in_two_parts_are_both_there(facts: Collector) -> None:
    rows = {"toy": {"test": tiny_vstar_rows(2)}, "more": {"test": tiny_vstar_rows(2)}}
    facts.add([request(0)], rows)
    other = request(1)
    facts.add([Request(**{**other.__dict__, "task": "more"})], rows)
    assert list(json.loads(facts.path.read_text())["tasks"]) == ["toy", "more"]


def test_a_task_object_gives_scorer_and_seeds(
    facts: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from argparse import Namespace

    from lmms_eval.tasks import get_task_dict

    write(tiny_vstar_rows(2), tmp_path / "data" / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(tmp_path / "data"))
    task = get_task_dict(["tiny_vstar"], manager())["tiny_vstar"]
    task.args = Namespace(seed=[0, 1, 2, 3])
    asked = [request(0, doc_to_visual=task.doc_to_visual)]
    facts.add(asked, {"toy": {"test": task.eval_docs}})
    content = json.loads(facts.path.read_text())
    assert content["seeds"] == [0, 1, 2, 3]
    assert content["tasks"]["toy"]["scorer"] == fp.scorer_fingerprint(task)


def test_hashes_of_weights_move_with_content(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    (tmp_path / "README.md").write_text("not read")
    one = hash_sources({"rpn": str(tmp_path)})
    file.write_bytes(b"two!")
    two = hash_sources({"rpn": str(tmp_path)})
    assert one.keys() == two.keys() == {"rpn/model.safetensors"}
    assert one != two
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    hashes = hash_sources({"peft": str(tmp_path)})
    assert "peft/config.json" in hashes
    assert set(weights_only(hashes)) == {"peft/model.safetensors", "peft/adapter_model.safetensors"}


@pytest.mark.parametrize("source", ["nobody/no-such-model", "no folder", "a/b/c"])
def test_what_is_not_here_has_no_hash(source: str) -> None:
    assert local_folder(source) is None
    assert hash_sources({"pretrained": source, "rpn": None}) == {}


def test_state_of_the_source() -> None:
    state = source_state()
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["changed"], bool))


# Through the plugin


def test_facts_of_a_run_are_found_again_and_ranks_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tiny_vstar_rows(6), tmp_path / "data" / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(tmp_path / "data"))
    rpn = {"rpn": str(embedded_model()[1])}
    monkeypatch.setattr("sdrpn_eval.run_record.sources", lambda arguments: rpn)
    folders = []
    for name in ("one", "two"):
        engine = FakeEngine(lambda q: "red level")
        folders.append(run_folders.evaluate(tmp_path / name, engine, ["tiny_vstar"]))
    comparison = compare([read_run(folder) for folder in folders])
    assert "Same scorer: by its source and settings." in established(
        comparison.evidence, ["tiny_vstar"]
    )
    facts = comparison.evidence[0].facts
    assert facts
    assert {name: task.data for name, task in facts.tasks.items()} == {
        "tiny_vstar": fp.data_fingerprint(tiny_vstar_rows(6), range(6))
    }
    assert facts.evaluations == [comparison.runs[0].date]
    assert "rpn/rpn.safetensors" in facts.weights
    assert facts.arguments["pretrained"] == "FakeEngine"
    # Two processes with three documents each leave the same.
    (path,) = (folders[1] / "sdrpn_record").glob("run_facts_*_rank0.json")
    content = json.loads(path.read_text())
    for rank in (0, 1):
        share = fp.data_fingerprint(tiny_vstar_rows(6), range(rank, 6, 2))
        content["rank"], content["tasks"]["tiny_vstar"]["data"] = rank, share
        path.with_name(path.name.replace("rank0", f"rank{rank}")).write_text(json.dumps(content))
    merged = gather(read_run(folders[1])).facts
    assert merged
    assert merged.tasks.keys() == facts.tasks.keys()
    assert merged.tasks["tiny_vstar"].data == facts.tasks["tiny_vstar"].data


def test_facts_of_a_later_run_are_not_this_run_s(tmp_path: Path) -> None:
    folder = run_folders.write_run(tmp_path / "run", {"toy": [run_folders.sample(0)]})
    for began in ("120001", "130000"):  # the results stand for noon
        name, hashes = f"20260301T{began}.000000Z", hash_in_background({}, None)
        facts = Collector(folder / "sdrpn_record", name, 0, 1, {}, hashes, CPU)
        facts.add([request(0)], {"toy": {"test": tiny_vstar_rows(1)}})
    found = gather(read_run(folder)).facts
    assert found
    assert found.run == "20260301T120001.000000Z"
