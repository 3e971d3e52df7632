"""What is shipped is complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sdrpn", "sdrpn_eval", "tasks")


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


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel: Path) -> None:
    """Data files too: the embedded model, its benchmark, tasks, launch files, the page's assets."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {in_wheel(path) for path in shipped_files()}
    missing = sorted(expected - held)
    assert not missing, f"pyproject's packages or package-data leave out {missing}"
    strangers = {name for name in held - expected if ".dist-info/" not in name}
    assert not strangers
    assert wheel.stat().st_size < 15e6


@pytest.mark.slow
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


@pytest.mark.slow
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
