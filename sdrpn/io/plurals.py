"""Counts in sentences: "1 image", "2 images"."""

from __future__ import annotations


def counted(number: int, noun: str, *, commas: bool = False) -> str:
    """Format a count with its noun, whose plural adds an s; `commas` separates thousands."""
    figure = f"{number:,}" if commas else str(number)
    return f"{figure} {noun}{'' if number == 1 else 's'}"


def agree(number: int, singular: str, plural: str) -> str:
    """Choose the verb form that agrees with a count: is or are, has or have."""
    return singular if number == 1 else plural
