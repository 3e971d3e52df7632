"""Tables, in Markdown and for a terminal: as many columns as fit, without breaking words."""

from __future__ import annotations

import re
from collections.abc import Sequence

GAP = 2
"""Spaces between two columns."""
NAMES = 24
"""Maximum width of names for which columns on the right are dropped."""


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, escape: bool = True
) -> str:
    """A table in Markdown, without a line break at its end; `escape` takes cells as plain text."""
    lines = [header, ["---"] * len(header), *rows]
    if escape:
        lines = [[escaped(cell) for cell in cells] for cells in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def escaped(text: str) -> str:
    """A plain text in one line of Markdown."""
    return re.sub(r"([\\`*_|<>])", r"\\\1", " ".join(text.split()))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Formats a table at most `width` characters wide, unless a single name is longer.

    Args:
        header: One title per column; a title wraps at its spaces.
        rows: One cell per column. The first is a name, on a line of its own if it is too long for
            its column. The others are never wrapped.
        width: Of the terminal, in characters. Columns that do not fit are dropped from the right.

    Returns:
        The lines, without trailing spaces.
    """
    longest = max(len(row[0]) for row in rows)
    needed = min(longest, NAMES)
    cells = [max(len(row[i]) for row in rows) for i in range(1, len(header))]
    widths = [max(size, len(title)) for size, title in zip(cells, header[1:], strict=True)]
    if needed + sum(widths) + GAP * len(widths) > width:
        words = [max(map(len, _words(title))) for title in header[1:]]
        widths = [max(pair) for pair in zip(cells, words, strict=True)]
    while widths and needed + sum(widths) + GAP * len(widths) > width:
        widths.pop()
    name = min(longest, width - sum(widths) - GAP * len(widths))
    lines = []
    titles = [_folded(title, size) for title, size in zip(header[1:], widths, strict=False)]
    height = max([1, *map(len, titles)])
    titles = [[""] * (height - len(title)) + title for title in titles]
    for place, first in enumerate([""] * (height - 1) + [header[0]]):
        lines.append(_line(first, name, [title[place] for title in titles], widths))
    for row in rows:
        if len(row[0]) > name:
            lines.append(row[0])
            row = ["", *row[1:]]
        lines.append(_line(row[0], name, row[1:], widths))
    return lines


def _words(title: str) -> list[str]:
    """The words of a title; a slash stays with the word before it."""
    return re.split(r" (?!/)", title)


def _folded(title: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in _words(title):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _line(name: str, width: int, cells: Sequence[str], widths: Sequence[int]) -> str:
    shown = [cell.rjust(size) for cell, size in zip(cells, widths, strict=False)]
    return (" " * GAP).join([name.ljust(width), *shown]).rstrip()
