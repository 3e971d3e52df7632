"""Labels on disk: a folder of parquet shards, written whole or not at all, and their settings."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from PIL import Image
from pyarrow import ArrowException, Table, compute, parquet

from sdrpn.config import LabelConfig
from sdrpn.distill.pseudo_labels import BACKGROUND, FOREGROUND, IGNORED
from sdrpn.io.atomic import read_object, whole, write_json
from sdrpn.io.images import inside, load_image
from sdrpn.io.resume_guard import ANEW
from sdrpn.plurals import agree, counted

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
NEEDED = {"shards": int, "image_tokens": int, "labels": dict}
"""What every folder's settings say, and its kind."""

MAX_SHARDS = 99_999
"""As many as the names of shards have room for."""

SUMMARY_FILE = "summary.json"
IMAGES_FOLDER = "images"
"""Where images lie that came inside a data set."""


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    return folder / f"labels-{shard:05d}-of-{shards:05d}.parquet"


def write_shard(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a shard so that a file of this name is always whole, with checksums."""
    table: Any = Dataset.from_list(rows, features=FEATURES).with_format("arrow")[:]
    with whole(path) as part:
        parquet.write_table(table, part, compression="zstd", write_page_checksum=True)


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
    settings = read_object(path, ANEW)
    for name, kind in NEEDED.items():
        if type(settings.get(name)) is not kind:
            raise ValueError(
                f"{path}: {name} must be {kind.__name__}, got {settings.get(name)!r:.80}"
            )
    if not 1 <= settings["shards"] <= MAX_SHARDS or settings["image_tokens"] < 1:
        raise ValueError(
            f"{path}: shards must be 1 to {MAX_SHARDS} and image_tokens 1 or more, got "
            f"{settings['shards']!r:.80} and {settings['image_tokens']!r:.80}"
        )
    if not isinstance(settings.get("images"), str | None):
        raise ValueError(f"{path}: images must be a folder or null")
    return settings


def read_label_config(folder: Path) -> LabelConfig:
    """How a folder's labels were made. Raises ValueError that names its settings."""
    try:
        return LabelConfig.from_dict(read_settings(folder)["labels"])
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS_FILE}: labels: {error}") from None


def shards_of(folder: Path) -> list[Path]:
    """The shards of a finished folder, in order; ValueError says how many are missing."""
    shards = read_settings(folder)["shards"]
    paths = [shard_path(folder, k, shards) for k in range(shards)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not finished: {len(missing)} of {counted(len(paths), 'shard')} "
            f"{agree(len(missing), 'is', 'are')} "
            "missing "
            f"({missing[0]}, ...); run the same `sdrpn label` command again to go on"
        )
    return paths


def load_labels(folder: Path | str) -> Dataset:
    """All rows of a finished folder of labels, in the order of their data.

    Raises ValueError that names the folder or shard.
    """
    tokens = read_settings(Path(folder))["image_tokens"]
    return concatenate_datasets([read_shard(path, tokens) for path in shards_of(Path(folder))])


def read_shard(path: Path, tokens: int) -> Dataset:
    """The rows of one shard, checked: its checksums, its columns, maps and labels of `tokens`.

    Raises ValueError that names it where it is broken.
    """
    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        table = table.cast(FEATURES.arrow_schema)
        _check_rows(table, tokens)
    except (OSError, ValueError, ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and run `sdrpn label` again"
        ) from error
    return Dataset(table)


def _check_rows(table: Table, tokens: int) -> None:
    """Raise ValueError for what no labelling writes, and training would fail on half-way."""
    of: Any = compute
    for name in table.column_names:
        if name != "reason" and table[name].null_count:
            raise ValueError(f"{name} has rows without a value")
    for name in ("grounding", "sink", "labels"):
        lengths = set(of.unique(of.list_value_length(table[name])).to_pylist())
        if not lengths <= {0, tokens}:
            raise ValueError(
                f"{name} has rows of {max(lengths - {0, tokens})} values, not {tokens}"
            )
    bare = of.equal(of.list_value_length(table["labels"]), 0)
    if of.any(of.and_(of.is_null(table["reason"]), bare)).as_py():
        raise ValueError("a row has neither labels nor a reason why there are none")
    values = of.unique(of.list_flatten(table["labels"])).to_pylist()
    if not {FOREGROUND, BACKGROUND, IGNORED}.issuperset(values):
        raise ValueError(f"labels has other values than 1, 0 and -100: {values[:5]}")


def image_root(folder: Path | str, images: Path | str | None = None) -> Path:
    """Where a folder's images are: as given, else as they were when it was labelled."""
    folder = Path(folder)
    if images is not None:
        return Path(images).expanduser()
    named = read_settings(folder).get("images")
    return folder / IMAGES_FOLDER if named is None else Path(named)


class LabelledImages:
    """Rows for training: `image` (decoded), `question`, `labels`; only those with a label.

    Raises ValueError where images are not there any more: not in the middle of the training.
    """

    def __init__(self, rows: Dataset, root: Path) -> None:
        keep = [i for i, reason in enumerate(rows["reason"]) if reason is None]
        self.rows, self.root = rows.select(keep), root
        names = set(self.rows["image"])
        # Path.is_file raises for names longer than any file's.
        missing = sorted(name for name in names if not os.path.isfile(inside(root, name)))
        if missing:
            raise ValueError(
                f"{len(missing)} of {counted(len(names), 'image')} "
                f"{agree(len(missing), 'is', 'are')} not in {root} "
                f"({missing[0]}, ...): say "
                "with --images where they are now"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def drop(self, misfit: Callable[[str], bool]) -> list[str]:
        """Leave out the rows whose question is a misfit; returns their ids."""
        keep, dropped = [], []
        named = zip(self.rows["id"], self.rows["question"], strict=True)
        for i, (name, question) in enumerate(named):
            if misfit(question):
                dropped.append(name)
            else:
                keep.append(i)
        if dropped:
            self.rows = self.rows.select(keep)
        return dropped

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
