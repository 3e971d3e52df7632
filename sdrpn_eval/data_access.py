"""Checks access to the data of the tasks before weights are downloaded.

lmms-eval loads the data after the model, and retries a refused dataset five times before it ends
with a RetryError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import config as datasets_config
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi, constants, get_token
from loguru import logger

from sdrpn.io import hub
from sdrpn_eval.schemas import HUB_ID
from sdrpn_eval.tasks_info import task_settings

TIMEOUT = 10
"""Seconds to wait for the Hub."""

PUBLIC = "_public"
"""Suffix of our tasks with the same questions that need no login."""


def check_data(tasks: Iterable[str], index: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError if a task needs a login that is missing, or its data is unreachable.

    Tasks on local files are skipped, and so are cached datasets if the Hub is unreachable.
    """
    of_hub: dict[str, tuple[str, bool | str | None]] = {}
    for task in tasks:
        entry = index.get(task, {})
        config = task_settings(entry) if isinstance(entry.get("yaml_path"), str) else {}
        path, kwargs = str(config.get("dataset_path")), config.get("dataset_kwargs") or {}
        local = kwargs.get("load_from_disk") or os.path.isdir(path)
        if HUB_ID.fullmatch(path) and not local:
            of_hub[task] = path, kwargs.get("token")
    _check_login({task: repo for task, (repo, token) in of_hub.items() if token is True}, index)
    checked = set()
    for task, (repo, token) in of_hub.items():
        if repo not in checked:
            _check_reachable(repo, task, token)
            checked.add(repo)


def _check_login(tasks: Mapping[str, str], index: Mapping[str, Any]) -> None:
    if not tasks or get_token() is not None or constants.is_offline_mode():
        return
    repos = ", ".join(dict.fromkeys(tasks.values()))
    public = [f"{task}{PUBLIC}" for task in tasks if f"{task}{PUBLIC}" in index]
    instead = f", or run {', '.join(public)}: the same questions without a login" if public else ""
    raise ValueError(
        f"{', '.join(tasks)}: lmms-eval asks for a Hugging Face login to read {repos}, and there "
        f"is none; {hub.LOG_IN}{instead}"
    )


def _check_reachable(repo: str, task: str, token: bool | str | None) -> None:
    try:
        HfApi().dataset_info(repo, timeout=TIMEOUT, token=token)
        return
    except ValueError:  # the response is not JSON
        told = f"cannot fetch {repo}: {hub.not_the_hub()}"
    except Exception as error:  # of the Hub or of its client
        told = hub.explain(error, repo, repo_type="dataset")
        if told is None:
            raise
    if any(folder.is_dir() for folder in _cached(repo)):
        logger.warning(f"{task}: {told}. The data set is read from the local cache")
        return
    raise ValueError(f"{task}: {told}; SDRPN_DATA=DIR reads DIR/{task}/*.parquet instead")


def _cached(repo: str) -> list[Path]:
    """Folders in which `datasets` caches a dataset, by its current and its older naming."""
    named = os.environ.get("LMMS_EVAL_DATASETS_CACHE") or datasets_config.HF_DATASETS_CACHE
    owner, name = repo.split("/")
    root = Path(named).expanduser()
    return [root / f"{owner}___{one}" for one in (camelcase_to_snakecase(name), name)]
