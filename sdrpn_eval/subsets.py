"""Subsets for CI: fixed documents of a benchmark, the same for everyone, as ids in a file.

`python -m sdrpn_eval.subsets make` writes the shipped files anew, the same to the byte. What is
known of a data set without its rows is how many there are, so the strata are stretches of equal
length in the order of the split, and each gives one document, at a place a hash decides. What the
file's order groups (questions on one image, kinds of questions) is thereby met in proportion;
nothing else is claimed. With the data at hand, `make --by COLUMN` makes strata of a real column,
and `cut` writes a subset's rows as files of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter

from sdrpn.cli.shared import errors_as_sentences
from sdrpn.io.atomic import as_json, read_parsed
from sdrpn.io.extras import needs
from sdrpn.io.plurals import counted
from sdrpn_eval.schemas import EXACT

COUNT = 200
VARIABLE = "SDRPN_SUBSETS"
"""A folder of files `<task>.json` that go before the shipped ones."""


@dataclass(frozen=True)
class Source:
    """Where a subset's documents come from. task: lmms-eval's task on the whole split."""

    task: str
    rows: int


SOURCES = {
    "textvqa_ci": Source("textvqa_val", 5000),
    "docvqa_ci": Source("docvqa_val", 5349),
    "infovqa_ci": Source("infovqa_val", 2801),
    "chartqa_ci": Source("chartqa", 2500),
    "ocrbench_ci": Source("ocrbench", 1000),
    "vstar_ci": Source("vstar_harness", 191),
    "pope_ci": Source("pope", 9000),
    "hrbench4k_ci": Source("hrbench4k", 800),
    "hrbench8k_ci": Source("hrbench8k", 800),
}
"""Rows as the data sets' pages on the hub state them."""
ALL = ",".join(SOURCES)


@dataclass(frozen=True)
class Subset:
    """What a file holds. ids: rows of the whole split, in order. strata: in words."""

    __pydantic_config__ = EXACT
    task: str
    source: str
    rows: int
    seed: int
    strata: str
    ids: list[int]

    def save(self, folder: Path) -> Path:
        """Write `<task>.json`, ten ids a line."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {k: v for k, v in asdict(self).items() if k != "ids"}
        lines = [", ".join(map(str, self.ids[i : i + 10])) for i in range(0, len(self.ids), 10)]
        text = as_json(head, indent=2).removesuffix("\n}")
        path = folder / f"{self.task}.json"
        path.write_text(text + ',\n  "ids": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n")
        return path


READ = TypeAdapter(Subset)


# Choosing


def even_ids(rows: int, count: int, seed: int, name: str) -> list[int]:
    """One row of each of `count` stretches of equal length, at a place that a hash decides.

    A hash and not a random generator, whose numbers may change with Python's version.
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
    """Rows in proportion to how often each label occurs, evenly over the rows of each."""
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


def make_subset(task: str, rows: int | None = None, count: int = COUNT, seed: int = 0) -> Subset:
    """A subset in stretches of equal length. rows: of the split, default: the published number."""
    source = SOURCES[task]
    rows = rows or source.rows
    ids = even_ids(rows, count, seed, task)
    return Subset(task, source.task, rows, seed, f"{len(ids)} equal stretches of the split", ids)


# Using


def read_subset(task: str) -> Subset:
    """The subset of a task: from SDRPN_SUBSETS where it has one, else the shipped one."""
    # Imported here: the plugin loads lmms-eval, and choosing ids needs none of it.
    from sdrpn_eval.plugin import tasks_folder

    given = os.environ.get(VARIABLE)
    own = Path(given).expanduser() / f"{task}.json" if given else None
    path = own if own and own.exists() else tasks_folder() / "ci" / "ids" / f"{task}.json"
    try:
        found = read_parsed(READ, path)
    except FileNotFoundError:
        raise ValueError(f"there is no subset {task}, only {', '.join(SOURCES)}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no subset, make it anew ({error})") from None
    if found.task != task or sorted(set(found.ids)) != found.ids or not found.ids:
        raise ValueError(f"{path} is no subset of {task}: it needs ids of its own, in order")
    return found


def subset(task: str, dataset: Any) -> Any:
    """The documents of a subset, in the order of the split; a task's `process_docs`.

    A data set of another size than the ids were made for is refused. Local parquet files of at most
    as many rows as the subset has are taken whole: they are the subset cut out, or a sample.
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
        f"these rows (python -m sdrpn_eval.subsets make --tasks {task} --out FOLDER) and set "
        f"{VARIABLE}=FOLDER"
    )


def _is_local(dataset: Any) -> bool:
    """Whether the rows come from files that were named, not from a data set of the hub."""
    return dataset.info.dataset_name == "parquet"


# The command

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

TasksOption = Annotated[str, typer.Option(help="Which, with commas; default: all.")]


@app.command()
def make(
    out: Annotated[Path, typer.Option(help="Folder for the files of ids.")],
    tasks: TasksOption = ALL,
    count: Annotated[int, typer.Option(help="Documents of each.", min=1)] = COUNT,
    seed: Annotated[int, typer.Option(help="Another one, another subset.")] = 0,
    by: Annotated[
        str, typer.Option(help="A column to stratify by; loads the data (SDRPN_DATA works).")
    ] = "",
) -> None:
    """Choose documents and write their ids.

    python -m sdrpn_eval.subsets make --out tasks/ci/ids

    python -m sdrpn_eval.subsets make --out mine --tasks chartqa_ci --by type
    """
    with errors_as_sentences():
        for task in _known(tasks):
            if by:
                chosen = _by_column(task, by, count, seed)
            else:
                chosen = make_subset(task, count=count, seed=seed)
            typer.echo(f"{chosen.save(out)}: {len(chosen.ids)} of {chosen.rows}, {chosen.strata}")


@app.command()
def cut(
    out: Annotated[Path, typer.Option(help="Folder for `<task>/<split>-00000-of-00001.parquet`.")],
    tasks: TasksOption = ALL,
) -> None:
    """Write the rows of subsets as files, for a machine that shall not fetch whole data sets.

      python -m sdrpn_eval.subsets cut --out ci-data

    Then, there: SDRPN_DATA=ci-data lmms-eval ... --tasks sdrpn_ci
    """
    with errors_as_sentences():
        for task in _known(tasks):
            loaded = load_task(task)
            path = out / task / f"{loaded.config.test_split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            loaded.eval_docs.to_parquet(str(path))
            typer.echo(f"{path}: {counted(len(loaded.eval_docs), 'row')}")


def _known(tasks: str) -> list[str]:
    names = [name for name in tasks.split(",") if name]
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ValueError(f"there is no subset {unknown[0]}, only {', '.join(SOURCES)}")
    return names


def _by_column(task: str, column: str, count: int, seed: int) -> Subset:
    rows = load_task(SOURCES[task].task).eval_docs_no_media
    if column not in rows.column_names:
        raise ValueError(f"{task} has no column {column}, only {', '.join(rows.column_names)}")
    labels = [json.dumps(value, sort_keys=True) for value in rows[column]]
    ids = stratified_ids(labels, count, seed, task)
    words = f"{counted(len(set(labels)), 'value')} of {column}, in proportion"
    return Subset(task, SOURCES[task].task, len(labels), seed, words, ids)


def load_task(name: str) -> Any:
    """lmms-eval's task, with its data. Raises ValueError that says what kept it from loading."""
    needs("lmms_eval", extra="eval", what=f"the data of {name}")
    from sdrpn_eval.report.documents import load_data

    found, notes = load_data([name])
    if name not in found:
        raise ValueError("; ".join(notes))
    return found[name].task


if __name__ == "__main__":
    app()
