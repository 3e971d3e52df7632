"""Labels on disk: a folder of atomically written Parquet shards with their settings."""

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
from sdrpn.io.atomic import atomic_write, read_object, write_json
from sdrpn.io.images import load_image, safe_join
from sdrpn.io.plurals import agree, counted
from sdrpn.io.resumable import ANEW

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Value("string"),
        "question": Value("string"),
        "response": Value("string"),
        "grounding": Sequence(Value("float16")),
        "sink": Sequence(Value("float16")),
        "labels": Sequence(Value("int8")),
        "rows": Value("int32"),
        "columns": Value("int32"),
        "extent": Sequence(Value("float32")),
        "size": Sequence(Value("int32")),
        "foreground": Value("int32"),
        "background": Value("int32"),
        "reason": Value("string"),
    }
)
"""One question per row. image: path relative to the image folder. grounding, sink: row-major maps,
[rows * columns], stored for relabelling. labels: 1, 0 or -100 per cell. rows, columns: shape of the
grid, 0 without maps. extent: position of the grid on the image, (x0, y0, x1, y1) in source pixels.
size: (width, height) of the image. foreground, background: cells of each label. reason: why the
sample has no labels, or null."""

GRID_COLUMNS = ("rows", "columns", "extent")
"""Columns that shards of version 0.1 lack, beside `size`."""

SETTINGS_FILE = "settings.json"
REQUIRED_SETTINGS = {"shards": int, "labels": dict}
"""Required keys of settings.json and their types."""

MAX_SHARDS = 99_999
"""Maximum number of shards that five digits in the file names allow."""

SUMMARY_FILE = "summary.json"
IMAGES_FOLDER = "images"
"""Folder of images that were embedded in the dataset."""


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    """Return the path of a shard, counted from 0."""
    return folder / f"labels-{shard:05d}-of-{shards:05d}.parquet"


def write_shard(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a shard atomically, with checksums."""
    table: Any = Dataset.from_list(rows, features=FEATURES).with_format("arrow")[:]
    with atomic_write(path) as part:
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
    extent: tuple[float, ...] = (),
    size: tuple[int, ...] = (),
    reason: str | None = None,
) -> dict[str, Any]:
    """Build a row of `FEATURES`; maps and labels are [rows, columns], or flat for a square grid."""
    rows, columns = (0, 0) if labels is None else _shape(labels)

    def cells(values: np.ndarray | None, kind: type) -> list[Any]:
        return [] if values is None else values.astype(kind).ravel().tolist()

    return {
        "id": id,
        "image": image,
        "question": question,
        "response": response,
        "grounding": cells(grounding, np.float16),
        "sink": cells(sink, np.float16),
        "labels": cells(labels, np.int8),
        "rows": rows,
        "columns": columns,
        "extent": [float(edge) for edge in extent],
        "size": list(size),
        "foreground": 0 if labels is None else int((labels == 1).sum()),
        "background": 0 if labels is None else int((labels == 0).sum()),
        "reason": reason,
    }


def _shape(labels: np.ndarray) -> tuple[int, int]:
    side = round(labels.size**0.5)
    return (labels.shape[0], labels.shape[1]) if labels.ndim == 2 else (side, side)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Save the settings of a labels folder."""
    write_json(folder / SETTINGS_FILE, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a labels folder.

    Raises:
        ValueError: If the folder has no valid settings.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {SETTINGS_FILE}: it is not a folder of labels")
    settings = read_object(path, ANEW)
    for name, kind in REQUIRED_SETTINGS.items():
        if type(settings.get(name)) is not kind:
            raise ValueError(
                f"{path}: {name} must be {kind.__name__}, got {settings.get(name)!r:.80}"
            )
    tokens = settings.setdefault("image_tokens", None)
    if tokens is not None and type(tokens) is not int:
        raise ValueError(f"{path}: image_tokens must be int or null, got {tokens!r:.80}")
    if not 1 <= settings["shards"] <= MAX_SHARDS or (tokens is not None and tokens < 1):
        raise ValueError(
            f"{path}: shards must be 1 to {MAX_SHARDS} and image_tokens 1 or more, got "
            f"{settings['shards']!r:.80} and {tokens!r:.80}"
        )
    if not isinstance(settings.get("images"), str | None):
        raise ValueError(f"{path}: images must be a folder or null")
    return settings


def read_label_config(folder: Path) -> LabelConfig:
    """Read the label configuration of a labels folder.

    Raises:
        ValueError: If its settings are invalid.
    """
    try:
        return LabelConfig.from_dict(read_settings(folder)["labels"])
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS_FILE}: labels: {error}") from None


def shard_paths(folder: Path) -> list[Path]:
    """List the shards of a complete labels folder, in order.

    Raises:
        ValueError: If shards are missing.
    """
    shards = read_settings(folder)["shards"]
    paths = [shard_path(folder, k, shards) for k in range(shards)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not finished: {len(missing)} of {counted(len(paths), 'shard')} "
            f"{agree(len(missing), 'is', 'are')} missing ({missing[0]}, ...); run the same "
            "`sdrpn label` command again to resume"
        )
    return paths


def load_labels(folder: Path | str) -> Dataset:
    """Load all rows of a complete labels folder, in the order of the questions.

    Raises:
        ValueError: If the folder is incomplete or a shard is damaged.
    """
    tokens = read_settings(Path(folder))["image_tokens"]
    return concatenate_datasets([read_shard(path, tokens) for path in shard_paths(Path(folder))])


def read_shard(path: Path, tokens: int | None) -> Dataset:
    """Load one shard and check its checksums, columns and the sizes of maps and labels.

    Args:
        path: File of the shard.
        tokens: Cells of every grid, or None if grids differ.

    Raises:
        ValueError: If the shard is damaged.
    """
    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        table = _with_grids(table).cast(FEATURES.arrow_schema)
        _check_rows(table, tokens)
    except (OSError, ValueError, ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and run `sdrpn label` again"
        ) from error
    return Dataset(table)


def _with_grids(table: Table) -> Table:
    """Add the columns that shards of version 0.1, which had only square grids, lack."""
    missing = {name for name in FEATURES if name not in table.column_names}
    empty: list[list[int]] = [[] for _ in range(len(table))]
    if missing >= set(GRID_COLUMNS):
        lengths: Any = compute.list_value_length(table["labels"])  # type: ignore[attr-defined]
        sides = [round(n**0.5) for n in lengths.to_pylist()]
        for name, values in zip(GRID_COLUMNS, (sides, sides, empty), strict=True):
            table = table.append_column(name, [values])
    if "size" in missing:
        table = table.append_column("size", [empty])
    complete = set(FEATURES) == set(table.column_names)
    return table.select(list(FEATURES)) if complete else table


def _check_rows(table: Table, tokens: int | None) -> None:
    """Raise ValueError for values on which training would fail."""
    of: Any = compute
    for name in table.column_names:
        if name != "reason" and table[name].null_count:
            raise ValueError(f"{name} has rows without a value")
    cells = of.multiply(table["rows"], table["columns"])
    for name in ("grounding", "sink", "labels"):
        lengths = of.list_value_length(table[name])
        other = set(of.unique(lengths).to_pylist()) - {0, tokens}
        if tokens is not None and other:
            raise ValueError(f"{name} has rows of {max(other)} values, not {tokens}")
        wrong = of.and_(of.not_equal(lengths, cells), of.not_equal(lengths, 0))
        if of.any(wrong).as_py():
            at = wrong.to_pylist().index(True)
            raise ValueError(
                f"{name} has a row of {lengths[at].as_py()} values, its grid of "
                f"{table['rows'][at].as_py()} x {table['columns'][at].as_py()} cells has "
                f"{cells[at].as_py()}"
            )
    unlabelled = of.equal(of.list_value_length(table["labels"]), 0)
    if of.any(of.and_(of.is_null(table["reason"]), unlabelled)).as_py():
        raise ValueError("a row has neither labels nor a reason why there are none")
    values = of.unique(of.list_flatten(table["labels"])).to_pylist()
    if not {FOREGROUND, BACKGROUND, IGNORED}.issuperset(values):
        raise ValueError(f"labels has other values than 1, 0 and -100: {values[:5]}")


def image_root(folder: Path | str, images: Path | str | None = None) -> Path:
    """Return the image folder of a labels folder.

    Args:
        folder: Labels folder.
        images: Overrides the folder that the images were labelled from.
    """
    folder = Path(folder)
    if images is not None:
        return Path(images).expanduser()
    named = read_settings(folder).get("images")
    return folder / IMAGES_FOLDER if named is None else Path(named)


class LabelledImages:
    """Labelled rows for training: `image` (decoded), `question`, `labels` [rows, columns].

    Args:
        rows: Rows of a labels folder; those without labels are left out.
        root: Image folder.

    Raises:
        ValueError: If images are missing, so that training does not fail on one later.
    """

    def __init__(self, rows: Dataset, root: Path) -> None:
        keep = [i for i, reason in enumerate(rows["reason"]) if reason is None]
        self.rows, self.root = rows.select(keep), root
        names = set(self.rows["image"])
        # Path.is_file raises for overlong names.
        missing = sorted(name for name in names if not os.path.isfile(safe_join(root, name)))
        if missing:
            raise ValueError(
                f"{len(missing)} of {counted(len(names), 'image')} "
                f"{agree(len(missing), 'is', 'are')} not in {root} ({missing[0]}, ...): set "
                "--images to their folder"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def drop(self, misfit: Callable[[str, int], bool]) -> list[str]:
        """Remove rows.

        Args:
            misfit: Whether to remove a row, given its question and number of image tokens.

        Returns:
            The ids of the removed rows.
        """
        keep, dropped = [], []
        columns = (self.rows[name] for name in ("id", "question", "rows", "columns"))
        for i, (name, question, height, width) in enumerate(zip(*columns, strict=True)):
            if misfit(question, height * width):
                dropped.append(name)
            else:
                keep.append(i)
        if dropped:
            self.rows = self.rows.select(keep)
        return dropped

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[index]
        image: Image.Image = load_image(safe_join(self.root, row["image"]))
        labels = np.array(row["labels"]).reshape(row["rows"], row["columns"])
        return {"image": image, "question": row["question"], "labels": labels}


def summarise(rows: Dataset) -> dict[str, Any]:
    """Count rows with labels and ignored rows by reason, and average the foreground share."""
    reasons = Counter(rows["reason"])
    kept, share = reasons.pop(None, 0), 0.0
    if kept:
        labelled = np.array([reason is None for reason in rows["reason"]])
        count, height, width = (np.array(rows[n]) for n in ("foreground", "rows", "columns"))
        share = float((count[labelled] / (height * width)[labelled]).mean())
    return {
        "questions": len(rows),
        "kept": kept,
        "ignored": dict(reasons.most_common()),
        "mean_foreground_share": round(share, 4),
    }
