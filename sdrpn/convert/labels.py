"""Convert the pseudo-labels that the paper's authors published, a pickle, to a labels folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from sdrpn.config import IMAGE_TOKEN, LABELS_7B, LabelConfig
from sdrpn.convert import safe_pickle
from sdrpn.distill.label import padding_of
from sdrpn.distill.label_dataset import (
    SUMMARY_FILE,
    label_row,
    load_labels,
    shard_path,
    summarise,
    write_settings,
    write_shard,
)
from sdrpn.distill.pseudo_labels import label_cells
from sdrpn.io.atomic import write_json

KEYS = ("question_id", "prompt", "text", "image", "sink_attn", "grounding_attn_o2i")
"""Required keys of a published record; other keys are ignored."""

SHARD_SIZE = 4096
PATCH = 14
"""Side of LLaVA-1.5's image tokens, in pixels."""


def convert_labels(
    file: Path,
    out: Path,
    *,
    images: Path | None = None,
    config: LabelConfig = LABELS_7B,
    preprocessing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a labels folder in the format of `sdrpn label`.

    Args:
        file: Pickle of a list of records with `KEYS`, read without executing code.
        out: New folder.
        images: Folder that image paths are relative to, saved for training. Required if padding
            makes labels, which follows from the sizes of the images.
        config: Rules that turn the maps into labels, and the heads that the maps come from.
        preprocessing: How the images were prepared, for models whose number of image tokens does
            not follow from the maps; None for LLaVA-1.5.

    Returns:
        The summary of the folder.

    Raises:
        ValueError: If the file or a record is malformed.
    """
    if config.padding_background and images is None:
        raise ValueError(
            f"{file} labels the padding around pictures, which follows from their sizes: give the "
            "folder they are in with --images"
        )
    records = safe_pickle.load(file)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file} must hold a list of records, got {_kind(records)}")
    # Renamed when complete, so a bad record does not leave a partial folder.
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        found = _write(file, records, part, images, config, preprocessing)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def _write(
    file: Path,
    records: list[Any],
    out: Path,
    images: Path | None,
    config: LabelConfig,
    preprocessing: Mapping[str, Any] | None,
) -> dict[str, Any]:
    first = f"{file}, record 0"
    shape = "vector" if preprocessing is None else "grid"
    tokens = _map(_checked(records[0], first), "sink_attn", first, shape).size
    shards = -(-len(records) // SHARD_SIZE)
    for k in tqdm(range(shards), desc="Converting", unit="shard", disable=None):
        numbers = range(len(records))[k * SHARD_SIZE : (k + 1) * SHARD_SIZE]
        rows = [
            _row(records[n], f"{file}, record {n}", shape, tokens, images, config) for n in numbers
        ]
        write_shard(rows, shard_path(out, k, shards))
    about: dict[str, Any] = {"image_tokens": None, **(preprocessing or {})}
    if preprocessing is None:
        about = {"image_tokens": tokens, "side": round(tokens**0.5) * PATCH, "padding": "pad"}
    write_settings(out, _settings(file, images, config, len(records), shards) | about)
    found = summarise(load_labels(out))
    write_json(out / SUMMARY_FILE, found)
    return found


def _settings(
    file: Path, images: Path | None, config: LabelConfig, records: int, shards: int
) -> dict[str, Any]:
    return {
        "images": None if images is None else str(images.resolve()),
        "questions": records,
        "shards": shards,
        "shard_size": SHARD_SIZE,
        "labels": asdict(config),
        "data": file.name,
    }


def _row(
    record: Any, where: str, shape: str, tokens: int, images: Path | None, config: LabelConfig
) -> dict[str, Any]:
    checked = _checked(record, where)
    sink, grounding = (
        _map(checked, key, where, shape) for key in ("sink_attn", "grounding_attn_o2i")
    )
    if not sink.size == grounding.size == tokens:
        raise ValueError(
            f"{where} has maps of {sink.size} and {grounding.size} image tokens, record 0 has "
            f"{tokens}"
        )
    grounding, sink = (_square(one, where) for one in (grounding, sink))
    image = _image(_text(checked["image"], "image", where), where, images)
    size = extent = ()
    if config.padding_background and images is not None:
        size = _size(images / image, where)
        extent = _square_around(size)
    padding = padding_of(size, extent, grounding.shape, config)
    try:
        labels, reason = label_cells(grounding, sink, config, padding)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return label_row(
        _text(str(checked["question_id"]), "question_id", where),
        image,
        _text(checked["prompt"], "prompt", where).replace(IMAGE_TOKEN, "").strip(),
        _text(checked["text"], "text", where).strip(),
        grounding=grounding,
        sink=sink,
        labels=labels,
        extent=extent,
        size=size,
        reason=reason,
    )


def _square(values: np.ndarray, where: str) -> np.ndarray:
    """A map as a grid; a flat one of a square."""
    if values.ndim == 2:
        return values
    side = round(values.size**0.5)
    if side * side != values.size:
        raise ValueError(f"{where}: {values.size} image tokens do not make a square grid")
    return values.reshape(side, side)


def _size(path: Path, where: str) -> tuple[int, int]:
    """(width, height) of an image as a viewer shows it; its pixels are not read."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: the size of {path} cannot be read: {error}") from None


def _square_around(size: tuple[int, int]) -> tuple[float, ...]:
    """Where a centred square lies on an image, in its pixels."""
    side = max(size)
    left, top = ((side - edge) // 2 for edge in size)
    return -left, -top, side - left, side - top


def _checked(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a dict with {', '.join(KEYS)}, got {_kind(record)}")
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}; it has {', '.join(map(str, record))}")
    return record


def _map(record: Mapping[str, Any], key: str, where: str, shape: str) -> np.ndarray:
    """Read a map, stored as an array or a list of numbers. shape: `vector` or `grid`."""
    axes = 1 if shape == "vector" else 2
    value = record[key]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        try:
            value = np.array(value, dtype=np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {key} must be a list of numbers") from None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise ValueError(f"{where}: {key} must be an array of numbers, got {_kind(value)}")
    if value.ndim != axes or not np.isfinite(value).all():
        raise ValueError(
            f"{where}: {key} must be one {shape} of finite numbers, got the shape {value.shape}"
            + ("" if value.ndim != axes else " with NaN or infinity")
        )
    return value


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key} has a lone surrogate: {value!r:.80}") from None
    return value


def _image(path: str, where: str, images: Path | None) -> str:
    """The path of an image, relative to the image folder."""
    if os.path.isabs(path) and images is not None:
        path = os.path.relpath(path, images.resolve())
    if not path or os.path.isabs(path) or ".." in PurePosixPath(path).parts:
        raise ValueError(
            f"{where}: image {path!r} is not below "
            + (f"{images}" if images else "an image folder; give the folder with --images")
        )
    return path


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"a {type(value).__name__}"
