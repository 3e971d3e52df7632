"""Options that several commands of `sdrpn-eval` take."""

from __future__ import annotations

from typing import Annotated

import typer

IncludePathOption = Annotated[
    str | None,
    typer.Option(
        "--include_path",
        "--include-path",
        help="Folder of your own tasks' YAML; default: as the run was given.",
    ),
]
