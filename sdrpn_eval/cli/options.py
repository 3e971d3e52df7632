"""Options that several commands of `sdrpn-eval` take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sdrpn_eval.args import ARGUMENTS

TasksOption = Annotated[
    str,
    typer.Option(
        help="Tasks of lmms-eval, comma-separated, such as the CI subsets textvqa_ci,docvqa_ci."
    ),
]
ModelInLmmsEvalOption = Annotated[
    str, typer.Option("--model", help=f"Model in lmms-eval: {' or '.join(ARGUMENTS)}.")
]
LimitOption = Annotated[int | None, typer.Option(help="Only the first documents of a task.")]
BatchSizeOption = Annotated[str, typer.Option(help="Questions at a time, or auto.")]
TaskFolderOption = Annotated[
    str | None,
    typer.Option(
        "--include_path", "--include-path", help="Folder with the YAML files of your own tasks."
    ),
]
SeedOption = Annotated[int, typer.Option(help="For intervals, tests and the choice of pictures.")]
IncludePathOption = Annotated[
    str | None,
    typer.Option(
        "--include_path",
        "--include-path",
        help="Folder with the YAML files of your own tasks; default: the run's.",
    ),
]


def model_args_option(note: str) -> Any:
    """The option `--model_args`; `note` says what it may not hold."""
    return typer.Option("--model_args", "--model-args", help=f"As lmms-eval takes them{note}")


def check_model(model: str) -> None:
    """Raises ValueError unless it is one of our models in lmms-eval."""
    if model not in ARGUMENTS:
        raise ValueError(f"--model must be {' or '.join(ARGUMENTS)}, got {model!r}")


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
