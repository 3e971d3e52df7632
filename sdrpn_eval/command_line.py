"""lmms-eval's command line: `--model_args` as text, and other options by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def parse_arguments(model_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`--model_args` by name, as lmms-eval reads them: the one reader of this project.

    Args:
        model_args: the text of the option, or what a results file holds of it.

    Returns:
        Values as lmms-eval types them (numbers and booleans are no text), without the quotes that
        it leaves around a text.

    Raises:
        ValueError: where the text is not NAME=VALUE,NAME=VALUE.
    """
    if isinstance(model_args, Mapping):
        return {str(name): unquoted(value) for name, value in model_args.items()}
    if not model_args:
        return {}
    # Imported here: it takes seconds, which commands that read no arguments do not have.
    from lmms_eval.utils import simple_parse_args_string

    try:
        parsed = simple_parse_args_string(model_args)
    except ValueError:
        raise ValueError(f"model_args must be NAME=VALUE,NAME=VALUE, got {model_args!r}") from None
    return {name.strip(): unquoted(value) for name, value in parsed.items()}


def unquoted(value: Any) -> Any:
    """A text without the quotes around all of it, which lmms-eval keeps; all else as it is."""
    if not isinstance(value, str):
        return value
    quoted = re.fullmatch(r"""(['"])((?:\\\1|(?!\1).)*)\1""", value, flags=re.DOTALL)
    return quoted[2].replace(f"\\{quoted[1]}", quoted[1]) if quoted else value


def on_command_line(option: str, argv: Sequence[str]) -> str | None:
    """What a command line says after an option, `--x y` or `--x=y`; None where it does not."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None
