"""Every import is a dependency of the core or of the extra that its file belongs to."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sdrpn

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL: dict[str, list[str]] = PROJECT["optional-dependencies"]
FOLDERS = ("sdrpn", "sdrpn_eval", "tasks")
EXTRAS = {
    "sdrpn/app.py": ("app",),
    "sdrpn/backbones/adapters.py": ("peft", "4bit"),
    "sdrpn/convert": ("convert",),
    "sdrpn/distill": ("train",),
    "sdrpn/draw.py": ("plot",),
    "sdrpn_eval/demo/__init__.py": ("app",),
    "sdrpn_eval/demo/__main__.py": (),
    "sdrpn_eval": ("eval",),
    "tasks": ("eval",),
}
"""Which extras a file may import from beside the core; the first that fits."""
PROVIDERS = packages_distributions()
TESTED_AS_OLDEST = ("eval", "train", "convert", "plot", "app")


def required(extra: str) -> dict[str, Requirement]:
    """What an extra brings by name, with the extras that it includes."""
    found: dict[str, Requirement] = {}
    for line in OPTIONAL[extra]:
        one = Requirement(line)
        if one.name == "sdrpn":
            found |= {name: r for inner in one.extras for name, r in required(inner).items()}
        else:
            found[canonicalize_name(one.name)] = one
    return found


CORE = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT)


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - {*sys.stdlib_module_names, "sdrpn", "sdrpn_eval"}


def allowed(path: Path) -> set[str]:
    """Distributions that a file may import from."""
    fits = (extras for start, extras in EXTRAS.items() if str(path).startswith(start))
    return set(CORE).union(*(required(extra) for extra in next(fits, ())))


@pytest.mark.parametrize("path", sources(), ids=str)
def test_every_import_is_a_declared_dependency(path: Path) -> None:
    """What only comes along with another library may be gone with its next version."""
    undeclared = {
        module
        for module in imported(path)
        if not allowed(path) & {canonicalize_name(d) for d in PROVIDERS.get(module, [module])}
    }
    assert not undeclared, f"declare in pyproject.toml what {path} imports"


@pytest.mark.parametrize("extra", ["eval", "train", "convert", "plot", "app", "peft"])
def test_all_brings_every_extra(extra: str) -> None:
    assert set(required(extra)) <= set(required("all"))


@pytest.mark.parametrize(
    "name", ["gradio", "lmms-eval", "matplotlib", "scikit-learn", "sentencepiece"]
)
def test_the_core_is_small(name: str) -> None:
    assert name not in CORE


def test_what_is_promised_as_oldest_is_what_check_oldest_installs() -> None:
    """Every lower bound in pyproject.toml is pinned to just that in constraints-oldest.txt."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(p.name): str(p.specifier).removeprefix("==") for p in pins}
    promised: dict[str, set[str]] = {}
    for group in (CORE, *(required(extra) for extra in TESTED_AS_OLDEST)):
        for name, one in group.items():
            bounds = {s.version for s in one.specifier if s.operator == ">="}
            promised[name] = promised.get(name, set()) | bounds
    assert {name: {version} for name, version in pinned.items()} == promised


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sdrpn.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2509.16944"
