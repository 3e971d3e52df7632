"""Writes the ids of the CI subsets: `python -m tools.ci_subsets --out tasks/ci/ids`.

The data was not at hand, so documents are chosen by the number of rows alone: the split is divided
into sections of equal length, and a hash selects one document of each. Whatever the order of the
split groups (questions on one image, kinds of questions) is thereby represented in proportion.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from sdrpn.io.atomic import as_json
from sdrpn_eval.subsets import Subset, names, read_subset

COUNT = 200


def even_ids(rows: int, count: int, seed: int, name: str) -> list[int]:
    """Chooses one row of each of `count` sections of equal length, at a place decided by a hash.

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


def make_subset(task: str, count: int = COUNT, seed: int = 0) -> Subset:
    """A subset of the split that the shipped one was chosen from."""
    shipped = read_subset(task)
    ids = even_ids(shipped.rows, count, seed, task)
    strata = f"{len(ids)} equal stretches of the split"
    return Subset(task, shipped.source, shipped.rows, seed, strata, ids)


def save(subset: Subset, folder: Path) -> Path:
    """Writes `<task>.json` with ten ids per line; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {k: v for k, v in asdict(subset).items() if k != "ids"}
    lines = [", ".join(map(str, subset.ids[i : i + 10])) for i in range(0, len(subset.ids), 10)]
    text = as_json(head, indent=2).removesuffix("\n}")
    path = folder / f"{subset.task}.json"
    path.write_text(text + ',\n  "ids": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and writes all subsets."""
    parser = argparse.ArgumentParser(prog="tools.ci_subsets", description="Ids of CI subsets.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files of ids")
    args = parser.parse_args(arguments)
    for task in names():
        print(save(make_subset(task), args.out))


if __name__ == "__main__":
    main()
