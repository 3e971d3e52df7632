"""A folder belongs to the settings it was begun with: a second run goes on, another is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdrpn.io.atomic import read_object, write_json

ANEW = "; delete it and start anew"
"""What to do about a settings file of ours that is broken."""


def claim(path: Path, settings: Mapping[str, Any], begun: Path | None = None) -> None:
    """Note settings in a JSON file that is not there yet, or compare them with what it holds.

    begun: what the settings are of; by default the folder they stand in. Raises ValueError that
    names every setting which differs.
    """
    wanted = json.loads(json.dumps(dict(settings)))  # as it reads back: tuples are lists
    if not path.exists():
        write_json(path, wanted)
        return
    earlier = read_object(path, ANEW)
    other = [k for k in {**wanted, **earlier} if earlier.get(k) != wanted.get(k)]
    if other:
        told = "; ".join(f"{k}: {earlier.get(k)} there, {wanted.get(k)} now" for k in other)
        what = begun or path.parent
        raise ValueError(f"{what} was begun with other settings ({told}); use another --out")
