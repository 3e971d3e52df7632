"""Questions to label: LLaVA's conversation JSON, JSON lines, or a `datasets` dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets import Image as ImageColumn
from datasets import config as datasets_config
from huggingface_hub.constants import HF_HUB_CACHE

from sdrpn.files import parse_json
from sdrpn.images import BadImage, inside
from sdrpn.llava import IMAGE_TOKEN

MAX_LINE = 16 << 20
"""Bytes of the longest line that is read of a file of JSON lines."""

HUB_FOLDERS = (Path(datasets_config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
"""Where the image files of a data set from the hub lie."""


@dataclass(frozen=True)
class Item:
    """One question on one image. image: a path below the image folder. content: the image file's
    bytes where it came inside a dataset, else None."""

    id: str
    image: str
    question: str
    content: Callable[[], bytes] | None = None


def read_items(
    data: str, *, subset: Sequence[str] = (), samples: int | None = None, seed: int = 0
) -> list[Item]:
    """Read the questions of a file, folder or hub data set, in their order.

    data: `.json` (LLaVA's conversations: the first question of each item with an image), `.jsonl`
    (`image`, `question` or `text`, and optionally `id` or `question_id`), `.parquet`, a folder
    saved by `datasets`, or a hub id, each with columns `image` and `question`. subset: keep images
    below these folders. samples: so many of them, drawn with `seed`. Raises ValueError that names
    the file and the entry.
    """
    items = list(_read(data))
    if subset:
        folders = tuple(f"{name.strip('/')}/" for name in subset)
        kept = [item for item in items if item.image.startswith(folders)]
        if not kept:
            there = sorted({item.image.split("/")[0] for item in items if "/" in item.image})
            raise ValueError(
                f"{data} has no image below {', '.join(subset)}; "
                f"it has {', '.join(there[:10]) or 'no folders'}"
            )
        items = kept
    if not items:
        raise ValueError(f"{data} holds no question on an image")
    if samples is not None:
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, got {samples}")
        chosen = np.random.default_rng(seed).permutation(len(items))[:samples]
        items = [items[i] for i in sorted(chosen)]
    return items


def fingerprint(items: Sequence[Item]) -> str:
    """A name for exactly these questions in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(f"{item.id}\0{item.image}\0{item.question}\0".encode())
    return digest.hexdigest()


def _read(data: str) -> Iterator[Item]:
    path = Path(data).expanduser()
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"there is no file {data}")
        reader = _conversations if path.suffix == ".json" else _lines
        return reader(path)
    return _columns(data, path)


def _conversations(path: Path) -> Iterator[Item]:
    """LLaVA's instruction data: [{"id", "image", "conversations": [{"from", "value"}, ...]}]."""
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} must hold a list of conversations, not a {type(entries).__name__}"
        )
    for number, entry in enumerate(entries):
        image = entry.get("image") if isinstance(entry, dict) else None
        if isinstance(entry, dict) and not image:
            continue  # text only
        try:
            turns = entry["conversations"]
            words = next(turn["value"] for turn in turns if turn["from"] == "human")
            yield Item(_text(str(entry.get("id", number))), _text(image), _clean(words))
        except (KeyError, TypeError, StopIteration, AttributeError, ValueError):
            raise ValueError(
                f"{path}, entry {number}: expected LLaVA's "
                '{"id", "image", "conversations": [{"from": "human", "value": ...}, ...]}'
            ) from None


def _lines(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise ValueError(f"{path}, line {number}: it has more than {MAX_LINE:,} bytes")
            if not line.strip():
                continue
            try:
                entry = parse_json(line.decode("utf-8"))
                words = entry["question"] if "question" in entry else entry["text"]
                name = entry.get("id", entry.get("question_id", number))
                yield Item(_text(str(name)), _text(entry["image"]), _clean(words))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                told = f" ({error})" if isinstance(error, UnicodeError) else ""
                raise ValueError(
                    f'{path}, line {number}: expected {{"image": ..., "question": ...}}{told}'
                ) from None


def _columns(data: str, path: Path) -> Iterator[Item]:
    rows = _load(data, path)
    missing = [name for name in ("image", "question") if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{data} has no column {' and '.join(missing)}, only {', '.join(rows.column_names)}"
        )
    embedded = isinstance(rows.features["image"], ImageColumn)
    if embedded:
        rows = rows.cast_column("image", ImageColumn(decode=False))
    names = [n for n in ("id", "question_id") if n in rows.column_names]
    light = rows.select_columns(["question", *names[:1], *([] if embedded else ["image"])])
    roots = (path if path.is_dir() else path.parent,) if path.exists() else HUB_FOLDERS
    row: Any
    for number, row in enumerate(light):
        try:
            name = _text(str(row[names[0]])) if names else str(number)
            if embedded:
                yield Item(name, "", _clean(row["question"]), _Content(rows, number, roots))
            else:
                yield Item(name, _text(row["image"]), _clean(row["question"]))
        except ValueError as error:
            raise ValueError(f"{data}, row {number}: {error}") from None


@dataclass(frozen=True)
class _Content:
    """The bytes of one row's image file, read when they are needed.

    roots: folders one of which must hold the file, where the data set has only its path.
    """

    rows: Dataset
    number: int
    roots: tuple[Path, ...]

    def __call__(self) -> bytes:
        row: Any = self.rows[self.number]
        image: Mapping[str, Any] = row["image"] or {}
        if image.get("bytes"):
            return image["bytes"]
        name = str(image.get("path") or "")
        for root in self.roots if name else ():
            with suppress(BadImage, OSError):
                return inside(root, name).read_bytes()
        raise BadImage("missing", f"{name or 'an image without a path'}, row {self.number}")


def _load(data: str, path: Path) -> Dataset:
    rows: Any
    try:
        if path.suffix == ".parquet":
            rows = load_dataset("parquet", data_files=str(path), split="train")
        elif path.is_dir() and any(
            (path / n).exists() for n in ("state.json", "dataset_dict.json")
        ):
            rows = load_from_disk(str(path))
        else:
            rows = load_dataset(data, split="train")
    except Exception as error:  # datasets raises many kinds; all mean: not to be had
        raise ValueError(f"{data} cannot be read as a data set: {error}") from error
    if isinstance(rows, DatasetDict):
        splits = ", ".join(map(str, rows))
        raise ValueError(f"{data} has the splits {splits}; save the one to label by itself")
    return rows


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected text, got {value!r:.80}")
    value.encode()  # half of a surrogate pair, which JSON can spell, is no text
    return value


def _clean(words: Any) -> str:
    """The question without its image placeholder, which the prompt puts in front itself."""
    return _text(_text(words).replace(IMAGE_TOKEN, "").strip())
