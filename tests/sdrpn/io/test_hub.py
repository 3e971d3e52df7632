"""The Hugging Face Hub: what is fetched, what needs a login, what is said of a Hub that refuses.

A server on 127.0.0.1 stands in for the Hub (hub_server.py); each case runs in a process of its own,
since huggingface_hub reads its settings once.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdrpn.io import hub as sdrpn_hub
from sdrpn.model_registry import LLAVA_7B, PUBLISHED_RPN
from sdrpn_eval.demo import embedded_model
from tests.helpers.hub_server import GATED, PROXY_PAGE, TOKEN, Answer, Hub, commit, serving
from tests.helpers.local_benchmarks import docvqa_rows, infovqa_rows, textvqa_rows, vstar_true_rows

ROOT = Path(__file__).parents[3]
BASE, RPN = map(Path, embedded_model())
LMMS_EVAL = [sys.executable, "-m", "lmms_eval", "--model", "llava_sdrpn"]

# Loads each (kind, name, options) and prints what came of it. huggingface_hub tries a request six
# times, with up to 23 seconds of waiting between the tries, which are left out here.
LOAD = """
import json, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from sdrpn.backbones.llava15 import Llava15
from sdrpn.rpn.checkpoint import RPN
from sdrpn.engine import ZoomModel

def load(case):
    kind, name, options = case
    try:
        if kind == "rpn":
            RPN.from_pretrained(name, **options)
        elif kind == "base":
            Llava15.load(name, dtype="float32", device="cpu", **options)
        else:
            ZoomModel.from_pretrained(*name, dtype="float32", device="cpu", **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["loaded", ""]

print(json.dumps([load(case) for case in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as one:
        yield one


def load(hub: Hub, home: Path, *cases: Any, **environment: str) -> list[list[str]]:
    """[kind of error or "loaded", its message] of each case."""
    filled = [(*case, {})[:3] for case in cases]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(filled)],
        env=hub.environment(home, **environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def fault_by_name(method: str, path: str) -> Answer | None:
    """The fault that a repository, or a file of one, has in its name."""
    if "/gated" in path and "/resolve/" in path:
        return Answer(403, GATED)
    if "/revoked" in path:
        return Answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    if "/busy" in path:
        return Answer(429, {"Retry-After": "1"})
    if "/broken" in path:
        return Answer(503)
    if "/hotel" in path:
        return PROXY_PAGE
    if "/cut" in path and path.endswith(".safetensors"):
        return Answer(cut=1000)
    if "/late" in path and path.endswith("model.safetensors"):
        return Answer(403, GATED)
    return None


# What is said


@pytest.mark.slow
def test_each_refusal_has_its_cause_and_remedy(hub: Hub, tmp_path: Path) -> None:
    for name in ("gated", "busy", "broken", "hotel", "cut"):
        hub.add(f"org/{name}-rpn", RPN)
        hub.add(f"org/{name}-base", BASE)
    hub.add("org/late-base", BASE)
    hub.add("org/rpn", RPN)
    hub.fault = fault_by_name
    at = hub.address
    said = {
        "gated": f"the repository is gated; accept its licence at {at}/org/gated-KIND, then log in "
        "with `hf auth login` or set HF_TOKEN",
        "busy": f"too many requests (HTTP 429 from {at}); run again after 1 second, or log in with "
        "`hf auth login` or set HF_TOKEN for a higher limit",
        "broken": f"the Hub is out of order (HTTP 503 from {at}); run again in a few minutes, "
        "https://status.huggingface.co shows outages",
        "hotel": f"{at} answered, but not as the Hub does; a proxy or login page may be in "
        "between, so check HTTPS_PROXY and HF_ENDPOINT, and open the address in a browser",
    }
    cases = [(kind, f"org/{name}-{kind}") for name in said for kind in ("rpn", "base")]
    more = [("rpn", "org/cut-rpn"), ("base", "org/cut-base"), ("base", "org/late-base")]
    more += [("rpn", "org/nothing"), ("rpn", "org/rpn", {"revision": "v9"})]
    found = load(hub, tmp_path, *cases, *more)
    for (kind, name), (error, text) in zip(cases, found, strict=False):
        cause = said[name[4:].rpartition("-")[0]].replace("KIND", kind)
        told = f"cannot fetch config.json of {name}: {cause}"
        assert text == (told if kind == "rpn" else f"cannot load '{name}': {told}")
        assert error == ("HubError" if kind == "rpn" else "WeightsUnavailable")
    cut_rpn, cut_base, late, nothing, revision = (text for _, text in found[len(cases) :])
    assert cut_rpn == (
        "cannot fetch rpn.safetensors of org/cut-rpn: the download was cut off at 1,000 of "
        f"{(RPN / 'rpn.safetensors').stat().st_size:,} bytes; run again"
    )
    assert cut_base.startswith(
        "cannot load 'org/cut-base': cannot fetch model.safetensors of org/cut-base: the download "
        "was cut off at 1,000 of "
    )
    # transformers says of this one that it "does not appear to have a file".
    assert late.startswith("cannot load 'org/late-base': cannot fetch model.safetensors of org/lat")
    assert "the repository is gated" in late
    assert nothing == (
        "org/nothing is no folder, and config.json cannot be fetched: the Hub shows no model "
        "repository of this name; check the spelling, or if it is private, log in with an account "
        "that can read it (`hf auth login` or HF_TOKEN)"
    )
    assert revision == (
        "cannot fetch config.json of org/rpn: the repository has no revision 'v9'; see "
        f"{at}/org/rpn/tree/main for its branches"
    )


@pytest.mark.slow
def test_a_login_changes_what_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/gated-rpn", RPN)
    hub.add("org/revoked-rpn", RPN)
    hub.fault = fault_by_name
    gated, revoked, nothing = load(
        hub,
        tmp_path,
        *(("rpn", f"org/{name}") for name in ("gated-rpn", "revoked-rpn", "nothing")),
        HF_TOKEN=TOKEN,
    )
    assert gated[1] == (
        "cannot fetch config.json of org/gated-rpn: the repository is gated and your token has no "
        f"access; accept its licence at {hub.address}/org/gated-rpn with the token's account, and "
        "let the token read gated repositories"
    )
    assert revoked[1] == (
        "cannot fetch config.json of org/revoked-rpn: the Hub does not accept the token (HTTP 401 "
        f"from {hub.address}); log in again with `hf auth login`, or correct or unset HF_TOKEN"
    )
    assert "log in with another account" in nothing[1]


@pytest.mark.slow
def test_no_connection_and_no_hub(hub: Hub, tmp_path: Path) -> None:
    case = ("rpn", "org/rpn")
    ((kind, offline),) = load(hub, tmp_path, case, HF_HUB_OFFLINE="1")
    assert kind == "HubFileNotFound"
    assert offline == (
        f"org/rpn is no folder, and config.json cannot be fetched: it is not in the cache "
        f"({tmp_path}/hub) and HF_HUB_OFFLINE=1 is set; unset it, or run `hf download org/rpn` on "
        "a machine with access and copy the cache"
    )
    ((_, refused),) = load(hub, tmp_path, case, HF_ENDPOINT="http://127.0.0.1:9")
    assert re.fullmatch(
        r"cannot fetch config.json of org/rpn: cannot connect to http://127.0.0.1:9 "
        r"\(.*refused.*\); check the network connection, HTTPS_PROXY and HF_ENDPOINT",
        refused,
    )


@pytest.mark.slow
def test_a_damaged_file_of_the_cache_is_named_and_mended_as_told(hub: Hub, tmp_path: Path) -> None:
    damaged = (
        ("rpn", "rpn.safetensors", "cannot be read as safetensors"),
        ("base", "model.safetensors", "cannot be read as safetensors"),
        ("base", "tokenizer.json", "is not valid JSON"),
        ("rpn", "config.json", "is not valid JSON"),
    )
    cases, paths = [], []
    for i in range(len(damaged)):
        hub.add(f"org{i}/base", BASE)
        hub.add(f"org{i}/rpn", RPN)
        cases.append(("both", [f"org{i}/base", f"org{i}/rpn"]))
    loaded = [["loaded", ""]] * len(damaged)
    assert load(hub, tmp_path, *cases) == loaded
    for i, (repo, file, _) in enumerate(damaged):
        (path,) = (tmp_path / "hub" / f"models--org{i}--{repo}" / "snapshots").glob(f"*/{file}")
        blob = path.resolve()
        blob.write_bytes(blob.read_bytes()[:-200])
        paths.append(path)
    found = load(hub, tmp_path, *cases)
    for i, ((kind, text), path, (repo, _, told)) in enumerate(
        zip(found, paths, damaged, strict=True)
    ):
        assert kind == "ValueError"
        assert f"{path} {told}" in text
        assert text.endswith(
            f"the cached file of org{i}/{repo} is damaged; delete {path.resolve()} and run again "
            "to download it"
        )
        Path(re.findall(r"delete (\S+) and", text)[0]).unlink()
    assert load(hub, tmp_path, *cases) == loaded
    # And what is in the cache needs no Hub.
    assert load(hub, tmp_path, *cases, HF_HUB_OFFLINE="1") == loaded


def test_a_damaged_file_of_a_folder_is_not_the_cache_s(tmp_path: Path) -> None:
    assert sdrpn_hub.in_cache(tmp_path / "model.safetensors") is None
    assert sdrpn_hub.remedy(tmp_path / "model.safetensors") == (
        "the file is truncated or damaged; copy or download it again"
    )


def test_what_is_not_the_hub_s_is_left_alone() -> None:
    assert sdrpn_hub.explain(ValueError("other"), "org/x") is None
    assert sdrpn_hub.explain(OSError("other"), "org/x") is None


def test_a_full_disk_and_a_cache_of_another_are_told() -> None:
    full = OSError(28, "No space left on device")
    assert "no space left for the cache" in str(sdrpn_hub.explain(full, "org/x"))
    locked = PermissionError(13, "Permission denied", "/cache/blob")
    assert sdrpn_hub.explain(locked, "org/x", "a.bin") == (
        "cannot fetch a.bin of org/x: /cache/blob cannot be written (Permission denied); set "
        "HF_HOME to another one"
    )


# Revisions


@pytest.mark.slow
def test_rpn_revision_reaches_the_rpn(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/base", BASE)
    hub.add("org/rpn", {"config.json": b"{}"})
    hub.add("org/rpn", RPN, "v1")
    case = ("both", ["org/base", "org/rpn"])
    # Another process later sees by `main`'s files what it has loaded.
    pinned, main = load(hub, tmp_path, (*case, {"rpn_revision": "v1"}), case)
    assert pinned == ["loaded", ""]
    assert "is not an sdrpn RPN checkpoint" in main[1] or "holds no rpn.safetensors" in main[1]
    assert [p for p in hub.fetched("rpn.safetensors") if commit("org/rpn", "v1") in p or "v1" in p]


def test_the_weights_of_a_revision_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is hashed into the record's keys is what was loaded."""
    from sdrpn_eval.args import LlavaArguments
    from sdrpn_eval.loading import revisions, sources
    from sdrpn_eval.provenance import collect

    for name in ("main", "v1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rpn.safetensors").write_text(name)
    seen: dict[str, str | None] = {}

    def folder(source: str, revision: str | None) -> Path | None:
        seen[source] = revision
        return tmp_path / (revision or "main") if source == "org/rpn" else None

    monkeypatch.setattr(collect, "local_folder", folder)
    given = {"pretrained": "org/base", "rpn": "org/rpn", "revision": "r0"}
    hashes = []
    for more in ({}, {"rpn_revision": "v1"}):
        values = LlavaArguments.of(given | more)
        hashes.append(collect.hash_sources(sources(values), revisions(values)))
    assert seen == {"org/base": "r0", "org/rpn": "v1"}
    assert hashes[0].keys() == hashes[1].keys() == {"rpn/rpn.safetensors"}
    assert hashes[0] != hashes[1]


# Data


README = """---
dataset_info:
- config_name: DocVQA
  splits:
  - {name: test, num_bytes: 10, num_examples: 5188}
  - {name: validation, num_bytes: 100, num_examples: 5349}
configs:
- config_name: DocVQA
  data_files:
  - {split: test, path: DocVQA/test-*}
  - {split: validation, path: DocVQA/validation-*}
- config_name: InfographicVQA
  data_files:
  - {split: test, path: InfographicVQA/test-*}
  - {split: validation, path: InfographicVQA/validation-*}
---
"""
SHARD = "00000-of-00001.parquet"


def add_data(hub: Hub, tmp_path: Path) -> None:
    """Data sets as the hub has them, a few rows each; every other split cannot be read."""

    def parquet(rows: Any) -> bytes:
        rows.to_parquet(str(tmp_path / "rows.parquet"))
        return (tmp_path / "rows.parquet").read_bytes()

    docvqa = {"README.md": README.encode()}
    for name, rows in (("DocVQA", docvqa_rows(2)), ("InfographicVQA", infovqa_rows(2))):
        docvqa[f"{name}/validation-{SHARD}"] = parquet(rows)
        docvqa[f"{name}/test-{SHARD}"] = b"8 GB"
    hub.add("datasets/lmms-lab-encoder/DocVQA", docvqa)
    textvqa = {f"data/{split}-{SHARD}": b"8 GB" for split in ("train", "test")}
    textvqa[f"data/validation-{SHARD}"] = parquet(textvqa_rows(2))
    hub.add("datasets/lmms-lab-encoder/textvqa", textvqa)
    vstar = {f"data/test-{SHARD}": parquet(vstar_true_rows())}
    hub.add("datasets/lmms-lab-encoder/vstar-bench", vstar)


def lmms_eval(hub: Hub, home: Path, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [*LMMS_EVAL, *words],
        env=hub.environment(home, **environment),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def command_of_the_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (one for one in text.splitlines() if one.startswith("lmms-eval") and "docvqa" in one)
    return shlex.split(line)[1:]


@pytest.mark.slow
def test_the_readme_s_second_command_needs_no_login(hub: Hub, tmp_path: Path) -> None:
    add_data(hub, tmp_path)
    hub.add(LLAVA_7B, BASE)
    hub.add(PUBLISHED_RPN[LLAVA_7B], RPN)
    words = command_of_the_readme()
    words[words.index("--output_path") + 1] = str(tmp_path / "out")
    assert words[:2] == ["--model", "llava_sdrpn"]
    limits = ["--limit", "1", "--gen_kwargs", "max_new_tokens=2"]
    output = lmms_eval(hub, tmp_path / "home", *words[2:], *limits)
    (file,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    tasks = {"textvqa_val_public", "docvqa_val_public", "vstar_direct_attributes"}
    assert tasks <= set(results), output[-2000:]
    fetched = [path for path in hub.fetched(".parquet") if "/resolve/" in path]
    assert {path.partition("/resolve/")[2].partition("/")[2] for path in fetched} == {
        f"data/validation-{SHARD}",
        f"DocVQA/validation-{SHARD}",
        f"data/test-{SHARD}",  # V*'s only one
    }
    assert len(fetched) == 3
    assert not any(token for _, _, token in hub.seen)


@pytest.mark.slow
def test_a_missing_login_is_told_before_any_weights(hub: Hub, tmp_path: Path) -> None:
    add_data(hub, tmp_path)
    hub.add(LLAVA_7B, BASE)
    hub.add(PUBLISHED_RPN[LLAVA_7B], RPN)
    output = lmms_eval(
        hub, tmp_path / "home", "--tasks", "textvqa_val,docvqa_val,docvqa_test,pope", "--limit", "1"
    )
    assert (
        "ValueError: docvqa_val, docvqa_test, pope: lmms-eval asks for a Hugging Face login to "
        "read lmms-lab-encoder/DocVQA, lmms-lab-encoder/POPE, and there is none; log in with `hf "
        "auth login` or set HF_TOKEN, or run docvqa_val_public, pope_public: the same questions "
        "without a login"
    ) in output
    assert not hub.fetched(".safetensors")
    assert "RetryError" not in output


@pytest.mark.slow
def test_data_out_of_reach_is_told_before_any_weights(hub: Hub, tmp_path: Path) -> None:
    hub.add(LLAVA_7B, BASE)
    hub.add(PUBLISHED_RPN[LLAVA_7B], RPN)
    hub.fault = lambda method, path: Answer(503) if "/datasets/" in path else None
    words = ["--tasks", "textvqa_val_public", "--limit", "1"]
    output = lmms_eval(hub, tmp_path / "home", *words)
    assert (
        "ValueError: textvqa_val_public: cannot fetch lmms-lab-encoder/textvqa: the Hub is out of "
        f"order (HTTP 503 from {hub.address}); run again in a few minutes, "
        "https://status.huggingface.co shows outages; SDRPN_DATA=DIR reads "
        "DIR/textvqa_val_public/*.parquet instead"
    ) in output
    assert not hub.fetched(".safetensors")


# A run that died


@pytest.mark.slow
def test_a_run_that_died_before_its_model_does_not_pass_on_an_older_result(
    hub: Hub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["--tasks", "tiny_vstar", "--limit", "4", "--log_samples", "--output_path", str(out)]
    lmms_eval(hub, tmp_path, *words, "--model_args", "pretrained=tiny", "--batch_size", "4")
    gate = [sys.executable, "-m", "sdrpn_eval", "gate", str(out)]
    gate += ["--baseline", str(tmp_path / "base.json")]

    def judged(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*gate, *more], env=hub.environment(tmp_path), capture_output=True, text=True
        )

    updated = judged("--update")
    assert updated.returncode == 0, updated.stdout + updated.stderr
    assert judged().returncode == 0
    for arguments in ("pretrained=org/nothing,rpn=org/nothing", "pretrained=tiny,treshold=0.2"):
        before = set((out / "sdrpn_record").glob("run_facts_*"))
        output = lmms_eval(hub, tmp_path, *words, "--model_args", arguments)
        assert "Error during evaluation" in output
        (new,) = set((out / "sdrpn_record").glob("run_facts_*")) - before
        late = judged()
        assert late.returncode == 2, late.stdout
        assert "a run that began later" in late.stdout + late.stderr
        new.unlink()
        assert judged().returncode == 0
