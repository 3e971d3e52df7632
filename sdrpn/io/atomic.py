"""Atomic writes, and strict reading of JSON from untrusted files."""

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
"""Maximum size of a settings file in bytes. A checkpoint index takes about 0.1 MB per thousand
tensors."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name: renamed on success, deleted on error.

    A killed process leaves the temporary file behind; `remove_partial_files` deletes it.

    Args:
        path: Final path. The file gets the mode that the umask allows.

    Yields:
        The temporary path, in the same folder.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
    """
    part = path.with_name(f"{path.name}.part{os.getpid()}-{threading.get_ident()}")
    try:
        # safetensors creates files with mode 0600; record the mode that the umask gives.
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:
            part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # SafetensorError also reports a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def apply_umask(path: Path) -> None:
    """Set the mode of a new file under the umask; safetensors writes its files with 0600."""
    probe = path.with_name(f"{path.name}.part{os.getpid()}-{threading.get_ident()}")
    try:
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder (see `atomic_write`)."""
    for part in folder.glob("*.part*"):
        part.unlink(missing_ok=True)


def as_json(value: Any, **options: Any) -> str:
    """Serialise to standard JSON: NaN and infinities, which it does not have, become null.

    Args:
        value: A value that `json.dumps` accepts.
        **options: Passed to `json.dumps`, such as `indent`.
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
    """Write a JSON object atomically, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(as_json(dict(values), indent=2) + "\n", encoding="utf-8")


def parsed(schema: TypeAdapter[T], text: str | bytes) -> T:
    """Parse JSON against a schema, in strict mode.

    Raises:
        ValueError: With the location and description of the first violation.
    """
    try:
        return schema.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Invalid JSON: ")
        raise ValueError(f"{where}: {problem}" if where else problem) from None


def parse_json(text: str | bytes) -> Any:
    """`json.loads` that also raises ValueError for text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_bounded(path: Path, hint: str = "") -> bytes:
    """Read a settings file, without the byte order mark, which JSON does not allow.

    Args:
        path: File to read.
        hint: Appended to the error message.

    Raises:
        ValueError: If the file is larger than `MAX_SETTINGS`.
    """
    size = path.stat().st_size
    if size > MAX_SETTINGS:
        raise ValueError(
            f"{path} has {counted(size, 'byte', commas=True)}, more than any settings file{hint}"
        )
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def read_parsed(schema: TypeAdapter[T], path: Path) -> T:
    """Read a JSON file against a schema.

    Raises:
        ValueError: With the file and its first violation of the schema.
    """
    content = read_bounded(path)
    try:
        return parsed(schema, content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_object(path: Path, hint: str = "") -> dict[str, Any]:
    """Read a JSON object from a settings file such as a config.json.

    Args:
        path: File to read.
        hint: Remedy for a malformed file, appended to the error message.

    Raises:
        ValueError: If the file is too large, is not JSON, or holds another type.
    """
    content = read_bounded(path, hint)
    try:
        values = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}{hint}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}{hint}")
    return values
