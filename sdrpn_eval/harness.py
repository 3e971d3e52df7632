"""Refuses unsupported settings of lmms-eval by name, before anything is loaded.

lmms-eval passes a model its arguments and no other settings. So these are read from the command
line, and from the call of `simple_evaluate`, whose parameters hold them however it was started
(command line, `--config`, Python).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from sdrpn_eval.command_line import from_evaluator, on_command_line, parse_arguments

REFUSED: Mapping[str, str] = {
    "system_instruction": "lmms-eval glues it to every question; give the sentence as "
    "system_prompt= in --model_args",
    "apply_chat_template": "the prompt is the model's own; leave it out, and give a "
    "system prompt as system_prompt= in --model_args",
    "fewshot_as_multiturn": "a question has one turn; leave it out",
    "num_fewshot": "examples would come without their images; leave it out, or give 0",
    "cache_requests": "lmms-eval stores requests without the images' function, so that none can be "
    "asked; leave it out: prompts are built in seconds",
    "use_cache": "that cache knows a model by the text of its arguments, so a retrained RPN in the "
    "same folder would get the old answers. Leave it out: a run started again with the same "
    "--output_path (or record=) asks nothing twice, by the hashes of its weights",
}
"""Settings that must be off, and what to do instead."""

SHORT: Mapping[str, tuple[str, ...]] = {"use_cache": ("-c",)}
SWITCHES = ("apply_chat_template", "fewshot_as_multiturn")
HARMLESS = ("", "0", "None", "delete")
"""Values of an option with which it has no effect on questions."""


def refuse_unsupported(settings: Mapping[str, Any]) -> None:
    """Raises ValueError that names every setting in REFUSED that is on, with its replacement."""
    told = [
        f"--{name}: {remedy}"
        for name, remedy in REFUSED.items()
        if settings.get(name) and str(settings[name]) not in HARMLESS
    ]
    if told:
        raise ValueError(f"sdrpn does not work with {'; '.join(told)}")


def refuse_number_as_path(output_path: Any) -> None:
    """Raises ValueError for an `--output_path` that lmms-eval parses as a number or a boolean.

    The evaluation would run to the end and save nothing.
    """
    if not isinstance(output_path, str) or not output_path.strip():
        return
    try:
        read = parse_arguments(f"output_path={output_path}").get("output_path")
    except ValueError:  # reported by lmms-eval
        return
    if not isinstance(read, str):
        raise ValueError(
            f"--output_path {output_path}: lmms-eval reads it as {read!r} ({type(read).__name__}) "
            f"and saves no results; write ./{output_path}"
        )


def warn_of_limit(limit: Any, tasks: Sequence[str]) -> None:
    """Warns of a fractional limit with several tasks."""
    if limit is not None and 0 < float(limit) < 1 and len(tasks) > 1:
        logger.warning(
            f"--limit {limit} with several tasks: lmms-eval 0.7.3 takes that share of the first "
            f"one, {tasks[0]}, and asks as many documents of {', '.join(tasks[1:])}; give a whole "
            "number, or run each task by itself"
        )


def refuse_folder_as_task(tasks: str | None, index: Mapping[str, Any]) -> None:
    """Raises ValueError if a local folder hides the task that `--tasks` names."""
    if tasks and tasks in index and os.path.isdir(tasks):
        raise ValueError(
            f"--tasks {tasks}: {Path(tasks).resolve()} is a folder, which lmms-eval takes for one "
            "of tasks' YAML files in place of the task; rename it, or start in another folder"
        )


def refuse_task_settings(tasks: Iterable[Any]) -> None:
    """Raises ValueError for tasks that were made with settings in REFUSED, or whose YAML asks for
    examples."""
    for task in tasks:
        args = getattr(task, "args", None)
        refuse_unsupported({name: getattr(args, name, None) for name in REFUSED})
        config = getattr(task, "config", None)
        count = getattr(config, "num_fewshot", None)
        if count:
            raise ValueError(
                f"{getattr(config, 'task', 'a task')} has num_fewshot: {count}, and sdrpn "
                "takes no examples, whose images would be missing; give --num_fewshot 0, or a task "
                "without"
            )


def from_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """The settings in REFUSED, `output_path` and `limit` on a command line."""
    found: dict[str, Any] = {name: True for name in SWITCHES if f"--{name}" in argv}
    for name in (*REFUSED, "output_path", "limit"):
        if name not in SWITCHES:
            for option in (f"--{name}", *SHORT.get(name, ())):
                value = on_command_line(option, argv)
                if value is not None:
                    found[name] = value
    return found


def check_harness(tasks: Sequence[str], *, main_process: bool) -> None:
    """Refuses settings that the model does not support, and warns of others on the main process.

    `tasks` are those that will be scored, as far as they are known.

    Raises:
        ValueError: For unsupported settings, with the remedy for each.
    """
    settings = from_command_line(sys.argv)
    settings |= {name: value for name, value in from_evaluator().items() if value is not None}
    refuse_unsupported(settings)
    refuse_number_as_path(settings.get("output_path"))
    if main_process:
        warn_of_limit(settings.get("limit"), tasks)
