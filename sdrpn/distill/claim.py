"""A folder belongs to the settings it was begun with: a second run goes on, another is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def claim(path: Path, settings: Mapping[str, Any]) -> None:
    """Note settings in a JSON file that is not there yet, or compare them with what it holds.

    Raises ValueError that names every setting which differs.
    """
    wanted = json.loads(json.dumps(dict(settings)))  # as it reads back: tuples are lists
    if not path.exists():
        write_json(path, wanted)
        return
    earlier = read_json(path)
    other = [k for k in {**wanted, **earlier} if earlier.get(k) != wanted.get(k)]
    if other:
        told = "; ".join(f"{k}: {earlier.get(k)} there, {wanted.get(k)} now" for k in other)
        raise ValueError(f"{path.parent} was begun with other settings ({told}); use another --out")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write under another name first, so that a file of this name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError that names it where it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and start anew") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object; delete it and start anew")
    return values
