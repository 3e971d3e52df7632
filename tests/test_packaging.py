"""What is shipped is complete, what is imported declared, what is promised as oldest tested."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sdrpn

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = ("sdrpn", "sdrpn_eval", "tasks")
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]


def shipped_files() -> Iterator[Path]:
    """Files below the packages' folders that are no leftovers of a run."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT)


def in_wheel(path: Path) -> str:
    """Where a file of the checkout lies in the wheel."""
    return str("sdrpn_eval" / path if path.parts[0] == "tasks" else path)


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel of a source tree, with the setuptools that is installed."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an unpacked sdist, as an installer does where there is no wheel."""
    work = tmp_path_factory.mktemp("dist")
    source = work / "source"
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    sdist = build("sdist", source, work)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    return build("wheel", unpacked, work)


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    """Data files too: the embedded model, its benchmark, tasks, launch files, the page's assets."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {in_wheel(path) for path in shipped_files()}
    missing = sorted(expected - held)
    assert not missing, f"pyproject's packages or package-data leave out {missing}"
    strangers = {name for name in held - expected if ".dist-info/" not in name}
    assert not strangers
    assert wheel.stat().st_size < 12e6


def test_the_wheel_announces_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        points = archive.read(name).decode()
    for line in (
        "llava_sdrpn = sdrpn_eval.plugin:register",
        "tiny = sdrpn_eval.demo:embedded_model",
        "sdrpn = sdrpn.cli:app",
        "sdrpn-eval = sdrpn_eval.cli:app",
    ):
        assert line in points


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    """Without one nobody may use it: an SPDX expression for tools, the text for people."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        (licence,) = (n for n in names if n.endswith(".dist-info/licenses/LICENSE"))
        assert "\nLicense-Expression: Apache-2.0\n" in archive.read(metadata).decode()
        text = archive.read(licence).decode()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sdrpn.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2509.16944"


def imported() -> dict[str, str]:
    """Top-level modules that the packages import -> a file that does."""
    found: dict[str, str] = {}
    for path in shipped_files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found |= {name.split(".")[0]: str(path) for name in names}
    return found


def test_every_import_is_a_declared_dependency() -> None:
    """What only comes along with another library may be gone with its next version."""
    extras = [Requirement(line) for n in ("peft", "4bit") for line in optional(n)]
    declared = {canonicalize_name(r.name) for r in (*REQUIRED, *extras)}
    own = {*sys.stdlib_module_names, "sdrpn", "sdrpn_eval"}
    providers = packages_distributions()
    undeclared = {
        f"{module} (in {path})"
        for module, path in imported().items()
        if module not in own
        and not declared & {canonicalize_name(d) for d in providers.get(module, [module])}
    }
    assert not undeclared


def optional(name: str) -> list[str]:
    return PROJECT["optional-dependencies"][name]


def test_what_is_promised_as_oldest_is_what_check_oldest_installs() -> None:
    """Every lower bound in pyproject.toml is pinned to just that in constraints-oldest.txt."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(p.name): re.sub("^==", "", str(p.specifier)) for p in pins}
    promised = {}
    for one in REQUIRED:
        (lower,) = (s.version for s in one.specifier if s.operator == ">=")
        promised[canonicalize_name(one.name)] = lower
    assert pinned == promised
