"""Questions to label: LLaVA's conversation JSON, JSON lines, or a `datasets` dataset."""

from __future__ import annotations

import hashlib
import logging
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

from sdrpn.config import IMAGE_TOKEN
from sdrpn.io.images import BadImage, safe_join
from sdrpn.io.questions import (
    Entry,
    ImageQuestion,
    as_text,
    one_image,
    parse_entry,
    read_entries,
)

logger = logging.getLogger(__name__)

MAX_LINE = 16 << 20
"""Bytes of the longest line that is read of a file of JSON lines."""

HUB_FOLDERS = (Path(datasets_config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
"""Where the image files of a data set from the hub lie."""

EXPECTED = (
    'expected LLaVA\'s {"id", "image", "conversations": [{"from": "human", "value": ...}, ...]} or '
    '{"image", "question"}'
)


@dataclass(frozen=True)
class Unusable:
    """An entry that holds no question on one image. why: a sentence that names it."""

    why: str


def read_items(
    data: str,
    *,
    subset: Sequence[str] = (),
    samples: int | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = logger.warning,
) -> list[ImageQuestion]:
    """Read the questions of a file, folder or hub data set, in their order.

    Args:
        data: a `.json` or `.jsonl` file, a JSON list or JSON lines, of LLaVA's conversations (the
            first question of each item with an image) or of plain entries (`image`, `question` or
            `text`, optionally `id` or `question_id`); or `.parquet`, a folder saved by `datasets`,
            or a hub id, with columns `image` and `question`. An image may be in a list of one.
        subset: keep images below these folders.
        samples: how many to keep, drawn with `seed`; None for all.
        tell: called with a sentence about the entries that hold no such question and are skipped.

    Raises:
        ValueError: naming the file, and its first entry where none can be used.
    """
    found = list(_read(data))
    items = [one for one in found if isinstance(one, ImageQuestion)]
    unusable = [one for one in found if isinstance(one, Unusable)]
    if unusable and not items:
        raise ValueError(unusable[0].why)
    if unusable:
        be = "is" if len(unusable) == 1 else "are"
        first = "" if len(unusable) == 1 else ", the first"
        tell(
            f"{len(unusable)} of {len(found)} entries of {data} {be} skipped{first}: "
            f"{unusable[0].why}"
        )
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


def fingerprint(items: Sequence[ImageQuestion]) -> str:
    """A name for exactly these questions in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(f"{item.id}\0{item.image}\0{item.question}\0".encode())
    return digest.hexdigest()


def _read(data: str) -> Iterator[ImageQuestion | Unusable]:
    path = Path(data).expanduser()
    if path.suffix in (".json", ".jsonl"):
        return _entries(path)
    return _columns(data, path)


def _entries(path: Path) -> Iterator[ImageQuestion | Unusable]:
    """The questions of a JSON list or of JSON lines, of LLaVA's conversations or of plain ones."""
    for entry in read_entries(path, first=0, longest=MAX_LINE):
        try:
            if isinstance(entry.value, ValueError):
                raise entry.value
            item = _item(entry)
        except ValueError as error:
            told = f"{entry.where}: {EXPECTED}; {_without(entry.where, error)}"
            if entry.last and isinstance(entry.value, ValueError):
                # Not a line that somebody got wrong: the rest of the file is not there.
                raise ValueError(f"{told}: the file may be cut off; fetch it again") from None
            yield Unusable(told)
        else:
            if item is not None:
                yield item


def _without(where: str, error: ValueError) -> str:
    """What an error says, without the place it names."""
    return str(error).replace(f"{where} ", "it ", 1)


def _item(entry: Entry) -> ImageQuestion | None:
    """The question of an entry, None for a conversation without an image; ValueError says why."""
    parsed = parse_entry(entry.value)
    if parsed is None:
        return None  # text only, as much of LLaVA's data is
    image, words, rest = parsed
    name = as_text("id", str(rest.get("id", entry.number)))
    return ImageQuestion(name, image, _clean(words), entry.where)


def _columns(data: str, path: Path) -> Iterator[ImageQuestion | Unusable]:
    rows = _load(data, path)
    missing = [name for name in ("image", "question") if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{data} has no column {' and '.join(missing)}, only {', '.join(rows.column_names)}"
        )
    feature: Any = rows.features["image"]
    listed = isinstance(getattr(feature, "feature", None), ImageColumn)
    embedded = listed or isinstance(feature, ImageColumn)
    if embedded:
        bare: Any = ImageColumn(decode=False)
        rows = rows.cast_column("image", type(feature)(bare) if listed else bare)
    names = [n for n in ("id", "question_id") if n in rows.column_names]
    light = rows.select_columns(["question", *names[:1], *([] if embedded else ["image"])])
    roots = (path if path.is_dir() else path.parent,) if path.exists() else HUB_FOLDERS
    row: Any
    for number, row in enumerate(light):
        try:
            name = as_text("id", str(row[names[0]])) if names else str(number)
            if embedded:
                yield ImageQuestion(
                    name,
                    "",
                    _clean(row["question"]),
                    content=_Content(rows, number, roots),
                )
            else:
                image = as_text("image", one_image(row["image"]))
                yield ImageQuestion(name, image, _clean(row["question"]))
        except ValueError as error:
            yield Unusable(f"{data}, row {number}: {error}")


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
        try:
            image: Mapping[str, Any] = one_image(row["image"]) or {}
        except ValueError as error:
            raise BadImage("one of several", f"row {self.number}", str(error)) from None
        if image.get("bytes"):
            return image["bytes"]
        name = str(image.get("path") or "")
        for root in self.roots if name else ():
            with suppress(BadImage, OSError):
                return safe_join(root, name).read_bytes()
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


def _clean(words: Any) -> str:
    """The question without its image placeholder, which the prompt puts in front itself."""
    text = as_text("question", words).replace(IMAGE_TOKEN, "").strip()
    if not text:
        raise ValueError(f"the question must be text, got {words!r:.80}")
    return text
