"""Subsets for CI: fixed documents of a benchmark, the same for everyone, as ids in a file.

The files are data (`tasks/ci/ids/`, written by `tools/ci_subsets.py`), and each names the split
that it was chosen from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from sdrpn.io.atomic import read_parsed
from sdrpn.io.plurals import counted
from sdrpn_eval.schemas import EXACT


@dataclass(frozen=True, config=EXACT)
class Subset:
    """The content of a file of ids.

    Attributes:
        task, source: lmms-eval's tasks on the subset and on the whole split.
        rows: Number of rows of the whole split.
        strata: How the documents were chosen, in words.
        ids: Rows of the whole split, in ascending order.
    """

    task: str
    source: str
    rows: int
    seed: int
    strata: str
    ids: list[int]


READ = TypeAdapter(Subset)


def ids_folder() -> Path:
    """The folder of the shipped files, `<task>.json`."""
    # Imported here: the plugin loads lmms-eval, and reading ids needs none of it.
    from sdrpn_eval.plugin import tasks_folder

    return tasks_folder() / "ci" / "ids"


def names() -> list[str]:
    """Names of all subsets."""
    return sorted(path.stem for path in ids_folder().glob("*.json"))


def read_subset(task: str) -> Subset:
    """Reads the subset of a task."""
    return read_parsed(READ, ids_folder() / f"{task}.json")


def subset(task: str, dataset: Any) -> Any:
    """Selects the documents of a subset, in the order of the split: a task's `process_docs`.

    Local parquet files with at most as many rows as the subset are used entirely: they are the
    subset cut out of the split, or a sample.

    Raises:
        ValueError: If the dataset has another size than the one that the ids were chosen from.
    """
    chosen = read_subset(task)
    if len(dataset) == chosen.rows:
        return dataset.select(chosen.ids)
    # Local files are of the data set `parquet`; those of the Hub have a name of their own.
    if len(dataset) <= len(chosen.ids) and dataset.info.dataset_name == "parquet":
        if len(dataset) < len(chosen.ids):
            from loguru import logger  # part of an extra; reading ids works without it

            logger.warning(
                f"{task}: {counted(len(dataset), 'local row')} asked, all there are; the subset "
                f"has {len(chosen.ids)}, so these scores are not the subset's"
            )
        return dataset
    raise ValueError(
        f"{task} was chosen from the {counted(chosen.rows, 'row')} of {chosen.source}, and this "
        f"data set has {len(dataset)}: it is another version of it. Run {chosen.source} itself"
    )
