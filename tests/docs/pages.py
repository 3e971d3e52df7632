"""The pages of the documentation, their commands, and which of them need real weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "jobs/README.md",
    "spaces/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)
MARK = "# real weights"
"""First line of a block that needs what is not on this machine."""
PAGE_MARK = "Every command on this page needs real weights and data."


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> Iterator[str]:
    """Blocks of code that run here."""
    text = text_of(page)
    if PAGE_MARK in text:
        return
    for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL):
        if not block.startswith(f"{MARK}\n"):
            yield block


def commands(page: str) -> Iterator[list[str]]:
    """The words of every command that runs here, in order."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
