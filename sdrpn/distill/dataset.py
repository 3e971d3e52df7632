"""Labels on disk: a folder of parquet shards, written whole or not at all, and their settings."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from PIL import Image
from pyarrow import parquet

from sdrpn.distill.claim import read_json, write_json
from sdrpn.images import inside, load_image

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Value("string"),
        "question": Value("string"),
        "response": Value("string"),
        "grounding": Sequence(Value("float16")),
        "sink": Sequence(Value("float16")),
        "labels": Sequence(Value("int8")),
        "foreground": Value("int32"),
        "background": Value("int32"),
        "reason": Value("string"),
    }
)
"""One question a row (METHOD section 4). image: path below the image folder. grounding, sink: the
maps [T], kept so that labels can be made anew. labels: [T] of 1, 0, -100. foreground, background:
how many of each. reason: why a sample gave no label, null where it gave one."""

SETTINGS_FILE = "settings.json"
SUMMARY_FILE = "summary.json"
IMAGES_FOLDER = "images"
"""Where images lie that came inside a data set."""


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    return folder / f"labels-{shard:05d}-of-{shards:05d}.parquet"


def write_shard(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a shard under another name first, so that a file of this name is always whole."""
    part = path.with_suffix(f".part{os.getpid()}")
    table: Any = Dataset.from_list(rows, features=FEATURES).with_format("arrow")[:]
    parquet.write_table(table, part, compression="zstd")
    os.replace(part, path)


def label_row(
    id: str,
    image: str,
    question: str,
    response: str = "",
    *,
    grounding: np.ndarray | None = None,
    sink: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """A row of FEATURES; its counts are those of `labels`."""

    def cells(values: np.ndarray | None, kind: type) -> list[Any]:
        return [] if values is None else values.astype(kind).tolist()

    return {
        "id": id,
        "image": image,
        "question": question,
        "response": response,
        "grounding": cells(grounding, np.float16),
        "sink": cells(sink, np.float16),
        "labels": cells(labels, np.int8),
        "foreground": 0 if labels is None else int((labels == 1).sum()),
        "background": 0 if labels is None else int((labels == 0).sum()),
        "reason": reason,
    }


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what a folder of labels was made with."""
    write_json(folder / SETTINGS_FILE, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder of labels was made with. Raises ValueError where it is no such folder."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {SETTINGS_FILE}: it is not a folder of labels")
    return read_json(path)


def shards_of(folder: Path) -> list[Path]:
    """The shards of a finished folder, in order; ValueError says how many are missing."""
    settings = read_settings(folder)
    paths = [shard_path(folder, k, settings["shards"]) for k in range(settings["shards"])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not finished: {len(missing)} of {len(paths)} shards are missing "
            f"({missing[0]}, ...); run the same `sdrpn label` command again to go on"
        )
    return paths


def load_labels(folder: Path | str) -> Dataset:
    """All rows of a finished folder of labels, in the order of their data.

    Raises ValueError that names the folder or shard.
    """
    return concatenate_datasets([read_shard(path) for path in shards_of(Path(folder))])


def read_shard(path: Path) -> Dataset:
    """The rows of one shard. Raises ValueError that names it where it is broken."""
    try:
        table = parquet.read_table(path).cast(FEATURES.arrow_schema)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and run `sdrpn label` again"
        ) from error
    return Dataset(table)


def image_root(folder: Path | str, images: Path | str | None = None) -> Path:
    """Where a folder's images are: as given, else as they were when it was labelled."""
    folder = Path(folder)
    if images is not None:
        return Path(images).expanduser()
    named = read_settings(folder).get("images")
    return folder / IMAGES_FOLDER if named is None else Path(named)


class LabelledImages:
    """Rows for training: `image` (decoded), `question`, `labels`; only those with a label."""

    def __init__(self, rows: Dataset, root: Path) -> None:
        keep = [i for i, reason in enumerate(rows["reason"]) if reason is None]
        self.rows, self.root = rows.select(keep), root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[index]
        image: Image.Image = load_image(inside(self.root, row["image"]))
        return {"image": image, "question": row["question"], "labels": np.array(row["labels"])}


def summarise(rows: Dataset) -> dict[str, Any]:
    """Counts over all rows: kept, ignored by reason, mean share of foreground cells of the kept."""
    reasons = Counter(rows["reason"])
    kept, share = reasons.pop(None, 0), 0.0
    if kept:
        one: Any = rows[list(rows["reason"]).index(None)]
        share = sum(rows["foreground"]) / (kept * len(one["labels"]))
    return {
        "questions": len(rows),
        "kept": kept,
        "ignored": dict(reasons.most_common()),
        "mean_foreground_share": round(share, 4),
    }
