"""lmms-eval's entry points: register our models and tasks.

lmms-eval has an entry point for models and none for tasks. The functions below run before the task
index is built, so they wrap `TaskManager.initialize_tasks` once, to add our folder to the include
paths and to redirect tasks with data in SDRPN_DATA. This is the only monkeypatch of the project. If
lmms-eval has changed there, a warning names the option that still works.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from sdrpn_eval.args import LlavaArguments, QwenArguments
from sdrpn_eval.command_line import on_command_line
from sdrpn_eval.harness import refuse_folder_as_task
from sdrpn_eval.local_data import use_local_data

# `lmms_eval.models` loads this module while it is being imported itself. Modules that import it
# are imported where they are used, so that none sees it half initialised.


MODELS: Mapping[str, str] = {
    LlavaArguments.model_name: "sdrpn_eval.model.LlavaSdrpn",
    QwenArguments.model_name: "sdrpn_eval.model.Qwen2_5_VLSdrpn",
}
"""Classes by the model's name in `--model`."""


class TaskIndex:
    """The latest task index in this process, from which runs log early what they will score."""

    latest: dict[str, dict[str, Any]] | None = None


def register() -> Any:
    """Entry point `llava_sdrpn` of the group `lmms_eval.models`."""
    return _register(LlavaArguments.model_name)


def register_qwen2_5_vl() -> Any:
    """Entry point `qwen2_5_vl_sdrpn` of the same group."""
    return _register(QwenArguments.model_name)


def _register(name: str) -> Any:
    """Adds the tasks and returns the model's ModelManifest."""
    from lmms_eval.models.registry_v2 import ModelManifest

    try:
        add_tasks()
    except Exception as error:  # the model works without the tasks
        _warn(f"{type(error).__name__}: {error}")
    return ModelManifest(name, simple_class_path=MODELS[name])


def tasks_folder() -> Path:
    """The folder of our tasks: beside this file in a wheel, at the top of a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "tasks", here.parent / "tasks"):
        if (folder / "vstar").is_dir():
            return folder
    raise FileNotFoundError(f"the tasks of sdrpn are missing beside {here}; reinstall sdrpn")


def add_tasks() -> None:
    """Wraps `TaskManager.initialize_tasks`, once, so that every index holds our tasks."""
    from lmms_eval.tasks import TaskManager

    original = getattr(TaskManager, "initialize_tasks", None)
    if getattr(original, "adds_sdrpn_tasks", False):
        return
    if original is None or "include_path" not in inspect.signature(original).parameters:
        _warn("TaskManager.initialize_tasks(include_path=...) is gone")
        return
    TaskManager.initialize_tasks = _with_our_tasks(original)


def _with_our_tasks(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_tasks(self: Any, include_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        index = original(self, [*paths, str(tasks_folder())], *args, **kwargs)
        if on_command_line("--model", sys.argv) in MODELS:
            refuse_folder_as_task(on_command_line("--tasks", sys.argv), index)
        TaskIndex.latest = use_local_data(index)
        return TaskIndex.latest

    initialize_tasks.adds_sdrpn_tasks = True  # type: ignore[attr-defined]
    return initialize_tasks


def _warn(reason: str) -> None:
    logger.warning(
        f"sdrpn could not add its tasks to this version of lmms-eval ({reason}); "
        f"the model works, give --include_path {tasks_folder()} for the tasks"
    )
