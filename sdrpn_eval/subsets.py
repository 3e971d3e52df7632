"""Subsets for CI: fixed documents of a benchmark, the same for everyone, as ids in a file.

The files are data (`tasks/ci/ids/`), and each says what it was chosen from. What is known of a data
set without its rows is how many there are, so the strata are stretches of equal length in the
order of the split, and each gives one document, at a place a hash decides. What the file's order
groups (questions on one image, kinds of questions) is thereby met in proportion; nothing else is
claimed. With the data at hand, strata can be those of a column.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sdrpn.io.atomic import as_json, read_parsed
from sdrpn.io.plurals import counted
from sdrpn_eval.schemas import EXACT

COUNT = 200
VARIABLE = "SDRPN_SUBSETS"
"""A folder of files `<task>.json` that go before the shipped ones."""


@dataclass(frozen=True)
class Subset:
    """The content of a file of ids.

    Attributes:
        task, source: lmms-eval's tasks on the subset and on the whole split.
        rows: Of the whole split.
        strata: How the documents were chosen, in words.
        ids: Rows of the whole split, in ascending order.
    """

    __pydantic_config__ = EXACT
    task: str
    source: str
    rows: int
    seed: int
    strata: str
    ids: list[int]

    def save(self, folder: Path) -> Path:
        """Writes `<task>.json` with ten ids per line; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {k: v for k, v in asdict(self).items() if k != "ids"}
        lines = [", ".join(map(str, self.ids[i : i + 10])) for i in range(0, len(self.ids), 10)]
        text = as_json(head, indent=2).removesuffix("\n}")
        path = folder / f"{self.task}.json"
        path.write_text(text + ',\n  "ids": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n")
        return path


READ = TypeAdapter(Subset)


def even_ids(rows: int, count: int, seed: int, name: str) -> list[int]:
    """Chooses one row of each of `count` stretches of equal length, at a place decided by a hash.

    A random generator's numbers may change with Python's version.
    """
    count = min(count, rows)
    borders = [rows * i // count for i in range(count + 1)]
    return [
        start + _hash(f"{name} {seed} {i}") * (end - start) // 2**64
        for i, (start, end) in enumerate(pairwise(borders))
    ]


def _hash(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def stratified_ids(labels: Sequence[Hashable], count: int, seed: int, name: str) -> list[int]:
    """Chooses rows in proportion to the frequency of each label, evenly over the rows of each."""
    strata: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        strata.setdefault(label, []).append(row)
    count = min(count, len(labels))
    shares = {label: count * len(rows) / len(labels) for label, rows in strata.items()}
    given = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: given[label] - shares[label])
    for label in by_remainder[: count - sum(given.values())]:
        given[label] += 1
    chosen = [
        rows[i]
        for label, rows in strata.items()
        if given[label]
        for i in even_ids(len(rows), given[label], seed, f"{name} {label}")
    ]
    return sorted(chosen)


def make_subset(task: str, count: int = COUNT, seed: int = 0) -> Subset:
    """A subset in stretches of equal length, of the split that the shipped one is of."""
    shipped = read_file(_shipped() / f"{task}.json", task)
    ids = even_ids(shipped.rows, count, seed, task)
    strata = f"{len(ids)} equal stretches of the split"
    return Subset(task, shipped.source, shipped.rows, seed, strata, ids)


def _shipped() -> Path:
    # Imported here: the plugin loads lmms-eval, and choosing ids needs none of it.
    from sdrpn_eval.plugin import tasks_folder

    return tasks_folder() / "ci" / "ids"


def names() -> list[str]:
    """The subsets that there are."""
    return sorted(path.stem for path in _shipped().glob("*.json"))


def read_subset(task: str) -> Subset:
    """Reads the subset of a task: from SDRPN_SUBSETS if it is there, else the shipped one."""
    given = os.environ.get(VARIABLE)
    own = Path(given).expanduser() / f"{task}.json" if given else None
    return read_file(own if own and own.exists() else _shipped() / f"{task}.json", task)


def read_file(path: Path, task: str) -> Subset:
    """Reads a file of ids.

    Raises:
        ValueError: If it is missing or not a subset of the task; names the file.
    """
    try:
        found = read_parsed(READ, path)
    except FileNotFoundError:
        raise ValueError(f"there is no subset {task}, only {', '.join(names())}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no subset, make it anew ({error})") from None
    if found.task != task or sorted(set(found.ids)) != found.ids or not found.ids:
        raise ValueError(f"{path} is no subset of {task}: it needs ids of its own, in order")
    return found


def subset(task: str, dataset: Any) -> Any:
    """Selects the documents of a subset, in the order of the split: a task's `process_docs`.

    Local parquet files with at most as many rows as the subset are used entirely: they are the
    subset cut out of the split, or a sample.

    Raises:
        ValueError: If the data set has another size than the one that the ids were chosen from.
    """
    chosen = read_subset(task)
    if len(dataset) == chosen.rows:
        return dataset.select(chosen.ids)
    if len(dataset) <= len(chosen.ids) and _is_local(dataset):
        if len(dataset) < len(chosen.ids):
            from loguru import logger  # comes with an extra; the commands here work without

            logger.warning(
                f"{task}: {counted(len(dataset), 'local row')} asked, all there are; the subset "
                "has "
                f"{len(chosen.ids)}, so these scores are not the subset's"
            )
        return dataset
    raise ValueError(
        f"{task} was chosen from the {counted(chosen.rows, 'row')} of {chosen.source}, and this "
        "data set has "
        f"{len(dataset)}: it is another version of it. Run {chosen.source} itself, or make ids for "
        f"these rows (sdrpn-eval subsets make --tasks {task} --out FOLDER) and set "
        f"{VARIABLE}=FOLDER"
    )


def _is_local(dataset: Any) -> bool:
    """Whether the rows come from local files and not from a data set of the Hub."""
    return dataset.info.dataset_name == "parquet"
