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
        help="Folder of your own tasks' YAML; default: as the run was given.",
    ),
]


def at_least(least: int, **options: int | None) -> None:
    """Raise ValueError, naming the option and its value, for one below the least; None is none."""
    for name, value in options.items():
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be {least} or more, got {value}")
