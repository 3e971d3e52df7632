"""jobs/: what runs here is run, and what cannot is held against what it calls."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from sdrpn_eval.record import read_records

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
SETTINGS = {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
SETTINGS |= {"OMP_NUM_THREADS": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
WORDS = ["--tasks", "tiny_vstar", "--model_args", "pretrained=tiny", "--proposers", "none,rpn"]
LIMIT = 24


def start(out: Path) -> subprocess.Popen[bytes]:
    """The Slurm script, as Slurm runs it: a copy elsewhere, in a process group of its own."""
    script = shutil.copy(JOBS / "row.slurm", out.parent / "slurm_script")
    words = ["bash", script, "--out", str(out), *WORDS, "--limit", str(LIMIT), "--batch-size", "2"]
    return subprocess.Popen(
        words, env=os.environ | SETTINGS, stdout=subprocess.DEVNULL, start_new_session=True
    )


@pytest.mark.slow
def test_a_preempted_row_resumes_and_leaves_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "row"
    record = out / "none" / "sdrpn_record"
    job = start(out)
    until = time.monotonic() + 120
    while not list(record.glob("record_*.jsonl")):
        assert job.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    done = {line.doc_id for line in read_records(record)}
    assert 0 < len(done) < LIMIT
    assert not list(out.rglob("*_results.json"))

    assert start(out).wait(300) == 0
    lines = read_records(record)
    assert {line.doc_id for line in lines if line.resumed} == done
    assert {line.doc_id for line in lines} == set(range(LIMIT))
    left = {path.name for path in out.iterdir()}
    assert {"comparison.html", "comparison.md", "comparison.json", "ladder.png"} < left
    for run in ("none", "rpn"):
        assert list((out / run).rglob("*_results.json"))
        assert list((out / run / "sdrpn_record").glob("run_facts_*"))
        assert (out / run / "log.txt").stat().st_size > 0
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [score["run"] for score in rows[0]["scores"]] == ["stock", "rpn"]


def test_the_row_is_the_paper_s() -> None:
    text = (JOBS / "row.py").read_text()
    words = [word for line in re.findall(r"ROW \+?= (\[.*\])", text) for word in json.loads(line)]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options == {
        "--tasks": "sdrpn_paper",
        "--proposers": "none,vicrop,rpn",
        "--model_args": "pretrained=llava-hf/llava-1.5-7b-hf",
        "--batch-size": "8",
        "--processes": "auto",
    }
    block = re.search(r"^# /// script\n(.*?)^# ///$", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    inline = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    assert inline == {"requires-python": ">=3.11", "dependencies": ["sdrpn[eval]"]}


def test_the_hours_are_those_of_the_guide() -> None:
    """The rows of docs/reproduce.md, three a size, with the hours in their last column."""
    guide = (ROOT / "docs" / "reproduce.md").read_text()
    rows = [line for line in guide.splitlines() if re.match(r"\| (LLaVA-1.5-|\+ )", line)]
    hours = [float(row.strip("| ").split(" | ")[-1]) for row in rows[:6]]
    page = (JOBS / "README.md").read_text()
    assert (
        f"rows of 7B add up to {sum(hours[:3]):.1f}, those of 13B to {sum(hours[3:]):.1f}" in page
    )


def test_every_job_calls_the_row() -> None:
    assert 'jobs/row.py "$@"' in (JOBS / "row.slurm").read_text()
    assert 'ENTRYPOINT ["python", "jobs/row.py"]' in (JOBS / "Dockerfile").read_text()
    sky = yaml.safe_load((JOBS / "row.sky.yaml").read_text())
    assert 'jobs/row.py --out "/out/$OUT" $ARGS' in sky["run"]
    assert sky["resources"]["use_spot"]
    assert set(sky["envs"]) == {"OUT", "ARGS"}
    assert "/out" in sky["file_mounts"]


def test_shell_is_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on the PATH")
    scripts = [JOBS / "row.slurm"]
    subprocess.run(["shellcheck", *map(str, scripts)], check=True)


def test_the_hub_reads_the_command_of_the_hosted_job() -> None:
    page = (JOBS / "README.md").read_text()
    (command,) = re.findall(r"^hf jobs .*?[^\\]$", page, flags=re.MULTILINE | re.DOTALL)
    hf, *words = shlex.split(command.replace("\\\n", " "))
    assert hf == "hf"
    words.insert(words.index("run") + 1, "--dry-run")
    words.insert(words.index("run") + 1, "--namespace=you")
    code = "from huggingface_hub.cli.hf import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env=os.environ | {"HF_TOKEN": "hf_none", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "No such option" in done.stderr:
        pytest.skip("this huggingface_hub has no `hf jobs uv run --dry-run`")
    assert done.returncode == 0, done.stderr
    for line in ("script jobs/row.py", "args --out /out/7b", "flavor l40sx4", "attempts 3"):
        assert line in " ".join(done.stdout.split())
    assert "(dry run) Job not submitted." in done.stdout
