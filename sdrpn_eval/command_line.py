"""Reads how lmms-eval was started: `--model_args`, other options, arguments of the evaluator."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any


def parse_arguments(model_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parses `--model_args`, as text or as in a results file, with lmms-eval's own parser.

    Returns:
        Values by name, with numbers and booleans converted, and text without the quotes that
        lmms-eval's parser leaves around it.

    Raises:
        ValueError: If the text is not NAME=VALUE,NAME=VALUE.
    """
    if isinstance(model_args, Mapping):
        return {str(name): unquoted(value) for name, value in model_args.items()}
    if not model_args:
        return {}
    # Imported here: takes seconds, which commands that parse no arguments do not need.
    from lmms_eval.utils import simple_parse_args_string

    try:
        parsed = simple_parse_args_string(model_args)
    except ValueError:
        raise ValueError(f"model_args must be NAME=VALUE,NAME=VALUE, got {model_args!r}") from None
    return {name.strip(): unquoted(value) for name, value in parsed.items()}


def unquoted(value: Any) -> Any:
    """Removes quotes around a whole text, which lmms-eval keeps; returns others unchanged."""
    if not isinstance(value, str):
        return value
    quoted = re.fullmatch(r"""(['"])((?:\\\1|(?!\1).)*)\1""", value, flags=re.DOTALL)
    return quoted[2].replace(f"\\{quoted[1]}", quoted[1]) if quoted else value


def on_command_line(option: str, argv: Sequence[str]) -> str | None:
    """The value of an option, `--x y` or `--x=y`, on a command line; None without it."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def from_evaluator() -> dict[str, Any]:
    """The arguments of the running `lmms_eval.evaluator.simple_evaluate`; {} if none is running.

    Includes `output_path` of its command line.
    """
    frame = inspect.currentframe()
    while frame is not None:
        names = frame.f_globals.get("__name__"), frame.f_code.co_name
        if names == ("lmms_eval.evaluator", "simple_evaluate"):
            found = dict(frame.f_locals)
            # From Python, a response cache of a model in memory is the caller's own decision.
            found.pop("use_cache", None)
            return found | {"output_path": getattr(found.get("cli_args"), "output_path", None)}
        frame = frame.f_back
    return {}
