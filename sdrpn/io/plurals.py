"""Counts in sentences: "1 image", "2 images"."""

from __future__ import annotations


def counted(number: int, noun: str, *, commas: bool = False) -> str:
    """A count with its noun, to which an s makes the plural; commas: between thousands."""
    figure = f"{number:,}" if commas else str(number)
    return f"{figure} {noun}{'' if number == 1 else 's'}"


def agree(number: int, singular: str, plural: str) -> str:
    """The form of a verb that agrees with a count: is or are, has or have."""
    return singular if number == 1 else plural
