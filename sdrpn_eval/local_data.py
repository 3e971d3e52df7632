"""SDRPN_DATA: tasks read local Parquet files instead of a dataset on the Hub.

The task `textvqa_val` reads `SDRPN_DATA/textvqa_val/*.parquet`, and every task of the group `vstar`
reads `SDRPN_DATA/vstar/*.parquet`. Tasks of the same family, dataset and split without a folder of
their own share it: `textvqa_val_public`, `textvqa_val_ocr` and `textvqa_ci` read `textvqa_val`'s.
Files named as on the Hub (`validation-00000-of-00001`) belong to the split that they name. The task
itself stays lmms-eval's: a generated YAML includes it and sets the location of the data.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from loguru import logger

from sdrpn_eval.tasks_info import family, parts, task_settings

VARIABLE = "SDRPN_DATA"

TaskIndex = dict[str, dict[str, Any]]
Files = tuple[str, list[str]]
"""(split, parquet files)."""

_NAMES_A_SPLIT = r"(train|validation|val|dev|test)(-.*)?|.+-\d+-of-\d+"


def use_local_data(index: TaskIndex) -> TaskIndex:
    """Redirects the tasks with a folder in SDRPN_DATA to it, in a copy of lmms-eval's task index.

    Raises:
        ValueError: If a folder is missing or holds nothing for its task; names the folder.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        return index
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"{VARIABLE}={root} is not a folder; make it, or unset {VARIABLE}")
    local = _local_files(index, folder)
    found = ", ".join(sorted(local)) or "no task"
    logger.info(f"{VARIABLE}={root}: local data for {found}; every other task from the hub")
    return index | {
        task: {**index[task], "yaml_path": _write_yaml(task, index[task], *files)}
        for task, files in local.items()
    }


def _local_files(index: TaskIndex, root: Path) -> dict[str, Files]:
    """Files by task: of its own folder, of its group's, or of another task's that it shares."""
    found: dict[str, Files] = {}
    lent: dict[str, Files] = {}
    folders = [p for p in root.iterdir() if p.is_dir()]
    # Folders of single tasks go before those of groups.
    for folder in sorted(folders, key=lambda p: (index.get(p.name, {}).get("type") != "task", p)):
        members = list(parts(folder.name, index))
        if not members:
            logger.info(
                f"{VARIABLE}: no task or group is named {folder.name}; {folder} is not used"
            )
        splits = {task: _split(index[task]) for task in members}
        for task, split in splits.items():
            own = task == folder.name
            files = _files_of_split(folder, split, alone=len({*splits.values()}) == 1)
            if files:
                found.setdefault(task, (split, files))
                # The folder of a task that selects documents may hold only these.
                if not own or "process_docs" not in task_settings(index[task]):
                    lent.setdefault(task, (split, files))
            elif own:
                held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
                raise ValueError(
                    f"{VARIABLE}: {folder} has no parquet file of the split {split!r}, only "
                    f"{held}; put {split}-00000-of-00001.parquet (or any one NAME.parquet) there, "
                    "or remove the folder"
                )
            elif task not in found:
                logger.info(f"{VARIABLE}: {folder} has no {split} files; {task} comes from the hub")
    return dict(_borrowed(index, lent)) | found


def _borrowed(index: TaskIndex, lent: dict[str, Files]) -> Iterator[tuple[str, Files]]:
    """Yields tasks with the dataset and split of a task of their family, and that task's files."""
    families = {family(task) for task in lent} - {None}
    sources = {_source(index[task]): files for task, files in lent.items()}
    for task, entry in index.items():
        if entry["type"] == "task" and family(task) in families:
            files = sources.get(_source(entry))
            if files:
                yield task, files


def _source(entry: dict[str, Any]) -> tuple[str, ...]:
    """Dataset, configuration, files and split: equal if two tasks read the same rows.

    For a dataset on the Hub the split determines the rows; `data_files` only limits the download.
    """
    config = task_settings(entry)
    path = str(config.get("dataset_path"))
    files = None if "/" in path else (config.get("dataset_kwargs") or {}).get("data_files")
    return tuple(map(str, (path, config.get("dataset_name"), files, _split(entry))))


def _files_of_split(folder: Path, split: str, *, alone: bool) -> list[str]:
    """Files named for the split, else files not named for any split if this split is `alone`."""
    every = sorted(folder.glob("*.parquet"))
    named = [p for p in every if re.fullmatch(rf"{re.escape(split)}(-.*)?", p.stem)]
    unnamed = [p for p in every if not re.fullmatch(_NAMES_A_SPLIT, p.stem)]
    files = named or (unnamed if alone else [])
    for path in files:
        _check_images(path)
    return [str(path) for path in files]


def _check_images(path: Path) -> None:
    """Refuses images without the Hugging Face schema, which would reach the task as dicts."""
    schema = pq.read_schema(path)
    image_like = [f.name for f in schema if str(f.type).startswith("struct<bytes: binary")]
    if image_like and b"huggingface" not in (schema.metadata or {}):
        raise ValueError(
            f"{path} holds image bytes ({', '.join(image_like)}) without the Hugging Face schema "
            "that says so; write it with datasets' Dataset.to_parquet"
        )


def _split(entry: dict[str, Any]) -> str:
    """The split that lmms-eval scores: test if the task has one, else validation."""
    config = task_settings(entry)
    return config.get("test_split") or config["validation_split"]


def _write_yaml(task: str, entry: dict[str, Any], split: str, files: list[str]) -> str:
    """Writes a YAML with the original task on other data; returns its path."""
    path = Path(_yaml_folder().name) / f"{task}.yaml"
    content = {
        "include": str(entry["yaml_path"]),
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: files}},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@functools.cache
def _yaml_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, deleted when it ends."""
    return tempfile.TemporaryDirectory(prefix="sdrpn_tasks_", ignore_cleanup_errors=True)
