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
SeedOption = Annotated[int, typer.Option(help="For intervals, tests and the choice of pictures.")]


def model_args_option(note: str) -> Any:
    """The option `--model_args`; `note` says what it may not hold."""
    return typer.Option("--model_args", "--model-args", help=f"As lmms-eval takes them{note}")


def _include_path(note: str) -> Any:
    words = f"Folder with the YAML files of your own tasks{note}"
    return typer.Option("--include_path", "--include-path", help=words)


TaskFolderOption = Annotated[str | None, _include_path(".")]
IncludePathOption = Annotated[str | None, _include_path("; default: the run's.")]


def check_run(tasks: str, model: str, limit: int | None, seed: int) -> None:
    """Checks the options of a command that runs lmms-eval.

    Raises:
        ValueError: For the first invalid option; names it and its value.
    """
    at_least(0, seed=seed)
    at_least(1, limit=limit)
    if model not in ARGUMENTS:
        raise ValueError(f"--model must be {' or '.join(ARGUMENTS)}, got {model!r}")
    if not tasks.strip(" ,"):
        raise ValueError(f"--tasks names no task, got {tasks!r}")


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
