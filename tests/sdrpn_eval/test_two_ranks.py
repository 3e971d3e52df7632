"""Several processes: one that dies or fails takes the others with it, and what was done counts."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdrpn_eval.on_error import ending_all
from sdrpn_eval.record import RecordLine, read_records
from tests.helpers.run_folders import evaluate

LIMIT = 60
SECONDS = 20
"""In which all must have ended; a barrier waits for hours."""


def start(words: list[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **more}
    with log.open("wb") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < until
        time.sleep(0.01)


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


@pytest.mark.slow
def test_one_of_two_ranks_is_killed_and_a_restart_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDRPN_DATA", raising=False)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += ["-m", "lmms_eval", "--model", "llava_sdrpn", "--model_args", "pretrained=tiny"]
    words += ["--tasks", "tiny_vstar", "--limit", str(LIMIT), "--output_path", f"{tmp_path}/out"]
    launcher = start(words, tmp_path / "log")
    record = tmp_path / "out" / "sdrpn_record"
    wait_for(record / "record_tiny_vstar_rank1.jsonl", launcher)
    workers = {rank_of(p): p for p in psutil.Process(launcher.pid).children(recursive=True)}
    time.sleep(random.random() / 4)  # at a moment nobody chose
    killed = time.monotonic()
    workers["1"].send_signal(signal.SIGKILL)
    assert launcher.wait(SECONDS) != 0
    assert time.monotonic() - killed < SECONDS
    assert not any(worker.is_running() for worker in workers.values())
    done = {line.doc_id for line in read_records(record)}
    assert 0 < len(done) < LIMIT
    assert not list((tmp_path / "out").glob("*/*_results.json"))

    # On a machine with one process, say, and as if nothing had been.
    tasks = ["tiny_vstar"]
    evaluate(tmp_path / "out", "tiny", tasks, limit=LIMIT, log_samples=True)
    lines = read_records(record)
    assert {line.doc_id for line in lines if line.resumed} == done
    evaluate(tmp_path / "whole", "tiny", tasks, limit=LIMIT, log_samples=True)
    whole = read_records(tmp_path / "whole" / "sdrpn_record")
    assert [*map(same, lines)] == [*map(same, whole)]
    assert samples_of(tmp_path / "out") == samples_of(tmp_path / "whole")


def same(line: RecordLine) -> dict[str, Any]:
    """What an answer says and saw, and the key it is found by."""
    names = {"doc_id", "prompt", "image_files", "answer", "regions", "reason", "tokens", "key"}
    return line.model_dump(include=names)


def samples_of(folder: Path) -> list[Any]:
    (path,) = folder.glob("*/*_samples_tiny_vstar.jsonl")
    samples = [json.loads(line) for line in path.open()]
    return [(s["doc_id"], s["filtered_resps"], s["token_counts"]) for s in samples]


NODE = """
import sys, torch, torch.distributed
sys.path.insert(0, sys.argv[1])
from tests.helpers.asking_by_hand import ask, model, rows
from tests.helpers.fake_engine import FakeEngine

class Failing(FakeEngine):
    def ask_batch(self, questions, generation=None):
        if any(q.text == "?" for q in questions):
            raise ValueError("no")
        return super().ask_batch(questions, generation)

lm = model(Failing(), rows(8), record=sys.argv[2])
print(f"rank {lm.rank} of {lm.world_size}", flush=True)
try:
    # The shortest prompt comes last: document 3's, on rank 1.
    asked = [ask("mytask", i, "?" if i == 3 else f"q{i}") for i in range(8)]
    lm.generate_until(asked[lm.rank :: lm.world_size])
    lm.accelerator.wait_for_everyone()
except Exception as error:  # as lmms-eval does
    print(f"lmms-eval goes on after {error}", flush=True)
"""


@pytest.mark.slow
def test_an_error_on_one_node_ends_it_with_an_error_and_ranks_are_global(tmp_path: Path) -> None:
    """Two nodes with one process each, so that both have the local rank 0."""
    (tmp_path / "node.py").write_text(NODE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "node.py", str(Path(__file__).parents[2]), str(tmp_path / "record")]
    cluster = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    nodes = [
        start(words, tmp_path / f"log{rank}", RANK=str(rank), MASTER_PORT=port, **cluster)
        for rank in (0, 1)
    ]
    assert nodes[1].wait(120) == 1
    log = (tmp_path / "log1").read_text()
    assert "rank 1 of 2" in log
    assert "document 3 of mytask" in log
    assert "Ending all 2 processes" in log
    assert "lmms-eval goes on" not in log
    # No launcher ended the other here: it fails where it waits for the first, at once.
    nodes[0].wait(SECONDS)
    assert "rank 0 of 2" in (tmp_path / "log0").read_text()
    assert "lmms-eval goes on after" in (tmp_path / "log0").read_text()
    lines = read_records(tmp_path / "record")
    assert {line.doc_id for line in lines} == {0, 1, 2, 4, 5, 6, 7}
    files = {path.name for path in (tmp_path / "record").glob("record_*")}
    assert files == {"record_mytask_rank0.jsonl", "record_mytask_rank1.jsonl"}


def test_a_process_alone_fails_as_ever() -> None:
    with pytest.raises(ValueError, match="as it is"), ending_all(1):
        raise ValueError("as it is")
    with pytest.raises(SystemExit) as ended, ending_all(2):
        raise ValueError("no")
    assert ended.value.code == 1
    with pytest.raises(KeyboardInterrupt), ending_all(2):
        raise KeyboardInterrupt
