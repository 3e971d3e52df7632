"""docs/architecture.md names every module, and nothing that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WORDS = re.findall(r"`([^`\n]+)`", PAGE)
FOLDERS = ("sdrpn", "sdrpn_eval", "tasks", "tests", "tools", "benchmarks")
PACKAGES = ("sdrpn", "sdrpn_eval", "tools")
PARAGRAPHS = (
    "sdrpn/distill",
    "sdrpn/convert",
    "sdrpn/cli",
    "sdrpn_eval/results",
    "sdrpn_eval/report",
    "sdrpn_eval/cli",
    "sdrpn_eval/demo",
    "tools/tiny_vstar",
    "tools/lint",
)


def modules() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                yield path.relative_to(ROOT)


def paragraph_of(folder: str) -> str:
    """The paragraph that begins with a folder's name: its modules go by their file names there."""
    for part in PAGE.split("\n\n"):
        if part.startswith(f"`{folder}/`"):
            return part
    return ""


@pytest.mark.parametrize("path", modules(), ids=str)
def test_every_module_is_named(path: Path) -> None:
    """By its path, or by its file name in its folder's own paragraph."""
    near = paragraph_of(str(path.parent))
    named = f"`{path}`" in PAGE or f"`{path.name}`" in near
    assert named, f"docs/architecture.md should say in a line what {path} is for"


def test_every_path_named_exists() -> None:
    paths = [word for word in WORDS if word.startswith(tuple(f"{f}/" for f in FOLDERS))]
    assert len(paths) > 40
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("package", PARAGRAPHS)
def test_file_names_of_a_paragraph_exist(package: str) -> None:
    names = re.findall(r"`(\w+\.py)`", paragraph_of(package))
    assert names
    assert [name for name in names if not (ROOT / package / name).is_file()] == []


def named_things() -> Iterator[tuple[str, str]]:
    """(module, attribute) of words such as `prefix.read`, which name a thing in a module."""
    stems: dict[str, list[str]] = {}
    for path in modules():
        dotted = ".".join(path.with_suffix("").parts)
        stems.setdefault(path.stem, []).append(dotted)
    for word in WORDS:
        found = re.fullmatch(r"(\w+)\.(\w+)", word)
        if found and found[1] in stems and found[2] not in ("py", "json"):
            yield word, found[2]


@pytest.mark.parametrize(("word", "attribute"), sorted(set(named_things())))
def test_functions_named_exist(word: str, attribute: str) -> None:
    stem = word.split(".")[0]
    candidates = [p for p in modules() if p.stem == stem]
    found = [
        path
        for path in candidates
        if hasattr(import_module(".".join(path.with_suffix("").parts)), attribute)
    ]
    assert found, f"no module {stem} has a {attribute}"
