"""Options that several commands of `sdrpn-eval` take."""

from __future__ import annotations

from typing import Annotated

import typer

SeedOption = Annotated[int, typer.Option(help="For intervals, tests and the choice of pictures.")]
IncludePathOption = Annotated[
    str | None,
    typer.Option(
        "--include_path",
        "--include-path",
        help="Folder with the YAML files of your own tasks; default: the run's.",
    ),
]


def at_least(least: int, **options: int | None) -> None:
    """Checks integer options against a minimum; None is not checked.

    Raises:
        ValueError: For an option below the minimum; names the option and its value.
    """
    for name, value in options.items():
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be {least} or more, got {value}")


def split_names(text: str) -> list[str]:
    """The names in a comma-separated option."""
    return [name for name in text.split(",") if name]
