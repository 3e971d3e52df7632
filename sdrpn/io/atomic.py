"""Files that are whole or not there, and JSON that others wrote, read with care."""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from sdrpn.io.plurals import counted

T = TypeVar("T")
MAX_SETTINGS = 64 << 20
"""Bytes of the largest settings file that is read; a checkpoint's index has about a tenth of one
MB for each thousand tensors."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` once it is whole, and goes where it fails.

    The file has the mode that the umask allows. A process that is killed leaves the part, for
    `remove_parts`. Raises OSError that names `path` where the disk is full, or whatever else keeps
    it from being written.
    """
    part = path.with_name(f"{path.name}.part{os.getpid()}-{threading.get_ident()}")
    try:
        # safetensors gives its files 0600; of one made here the system says what they should have.
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:
            part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # safetensors' own, for a full disk too
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def allow_as_umask(path: Path) -> None:
    """Give a file that a library wrote, as safetensors does with 0600, the mode of any new file."""
    probe = path.with_name(f"{path.name}.part{os.getpid()}-{threading.get_ident()}")
    try:
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left in a folder of files written by `whole`."""
    for part in folder.glob("*.part*"):
        part.unlink(missing_ok=True)


def as_json(value: Any, **options: Any) -> str:
    """JSON as the standard has it: a NaN or an infinity, which it lacks, is written as null.

    Args:
        value: What `json.dumps` takes.
        **options: Of `json.dumps`, such as `indent`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object so that a file of this name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(as_json(dict(values), indent=2) + "\n", encoding="utf-8")


def parsed(schema: TypeAdapter[T], text: str | bytes) -> T:
    """JSON of a schema, no value turned into another type.

    Raises ValueError with a sentence about the first place that is not as it should be.
    """
    try:
        return schema.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Invalid JSON: ")
        raise ValueError(f"{where}: {told}" if where else told) from None


def parse_json(text: str | bytes) -> Any:
    """json.loads, which raises ValueError for text that is nested too deeply, too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_bounded(path: Path, mend: str = "") -> bytes:
    """A settings file's content, without a byte order mark, which JSON does not allow.

    Raises ValueError where it is larger than any is.
    """
    size = path.stat().st_size
    if size > MAX_SETTINGS:
        raise ValueError(
            f"{path} has {counted(size, 'byte', commas=True)}, more than any settings file{mend}"
        )
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def read_parsed(schema: TypeAdapter[T], path: Path) -> T:
    """A file of a schema. Raises ValueError, naming the file and the first place that is wrong."""
    content = read_bounded(path)
    try:
        return parsed(schema, content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_object(path: Path, mend: str = "") -> dict[str, Any]:
    """A JSON object from a settings file, such as a config.json.

    mend: what to do about a file that is none. Raises ValueError that names the file.
    """
    content = read_bounded(path, mend)
    try:
        values = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}{mend}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}{mend}")
    return values
