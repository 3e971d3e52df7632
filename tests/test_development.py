"""What a contributor's machine and CI are set up by: lock, hooks, container, workflow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.lint.dependencies import CORE, required

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def pins() -> dict[str, str]:
    """Versions of the lock by name; what an environment leaves out has a marker."""
    lines = (ROOT / "constraints-lock.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in found
        if one.marker is None or one.marker.evaluate()
    }


def test_the_lock_pins_what_the_checks_need() -> None:
    wanted = CORE | required("test")
    locked = pins()
    assert len(locked) > 150
    outside = {
        name: (str(one.specifier), locked.get(name))
        for name, one in wanted.items()
        if not one.specifier.contains(locked.get(name, "0"))
    }
    assert outside == {}, "run `make lock`"


def test_ci_takes_the_lock_and_a_weekly_job_the_newest() -> None:
    text = (ROOT / ".github" / "workflows" / "check.yml").read_text()
    flow: dict[Any, Any] = yaml.safe_load(text)
    assert flow[True].keys() == {"push", "pull_request", "schedule", "workflow_dispatch"}
    runs = {name: job["steps"][-1]["run"] for name, job in flow["jobs"].items()}
    assert runs == {"check": "make check", "newest": "make check LOCK="}
    for lock, ending in ((None, "-c constraints-lock.txt"), ("", '".[test]" ')):
        words = ["make", "-n", "-B", "install", *([] if lock is None else [f"LOCK={lock}"])]
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (pip,) = (line for line in said.splitlines() if "pip install" in line)
        assert pip.endswith(ending)


def test_commits_run_the_tools_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "contracts"]
    for hook in hooks:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")
    command = [sys.executable, "-m", "pre_commit", "validate-config"]
    subprocess.run(command, cwd=ROOT, check=True)


def test_the_container_installs_as_the_guide_does() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["image"].startswith("mcr.microsoft.com/devcontainers/python:3.11")
    assert container["postCreateCommand"].endswith(" && make install")
    assert "install" in TARGETS
