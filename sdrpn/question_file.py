"""One's own questions in a file: JSON lines, a JSON list, or LLaVA's own question.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdrpn.files import parse_json
from sdrpn.images import BadImage, inside

NAMES = {"id": ("id", "question_id"), "image": ("image",), "question": ("question", "text")}
"""What each field may be called; the second names are LLaVA's."""


@dataclass(frozen=True)
class Asked:
    """A question of a file. image: a path below the image folder. given: the other fields.

    where: the file and line, for errors.
    """

    id: str | int
    image: str
    question: str
    where: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.where}, question {self.id!r}"


def read_questions(path: Path, images: Path) -> list[Asked]:
    """The questions of a file in their order.

    images: the folder their paths start from; whether the files are there is not looked at. Raises
    ValueError that names the line for one that is no JSON, lacks a field, has another's id, or
    whose path leaves the folder.
    """
    questions: dict[str, Asked] = {}
    for where, entry in _entries(path):
        asked = _asked(where, entry)
        earlier = questions.setdefault(str(asked.id), asked)
        if earlier is not asked:
            raise ValueError(f"{where}: the id {asked.id!r} stands in {earlier.where} already")
        try:
            inside(images, asked.image)
        except BadImage as error:
            raise ValueError(f"{where}: image {error}") from None
    if not questions:
        raise ValueError(f"{path} holds no question")
    return list(questions.values())


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, entry) of a file that holds a list, or an entry a line."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8, from byte {error.start} on") from None
    if text.lstrip().startswith("["):
        entries = _parsed(str(path), text)
        yield from ((f"{path}, entry {n}", one) for n, one in enumerate(entries, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(where, line)


def _parsed(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        column = f", column {error.colno}"
        place = column if error.lineno == 1 else f", line {error.lineno}{column}"
        raise ValueError(f"{where} is not valid JSON: {error.msg}{place}") from None
    except ValueError as error:  # nested too deeply, or a number of thousands of digits
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _asked(where: str, entry: Any) -> Asked:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got a {type(entry).__name__}")
    found = {
        one: next((name for name in names if name in entry), None) for one, names in NAMES.items()
    }
    for one, name in found.items():
        if name is None:
            raise ValueError(
                f"{where} has no {' or '.join(NAMES[one])}; expected "
                '{"id": ..., "image": ..., "question": ...}'
            )
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half of a character, {error.object[error.start]!a}; write it in UTF-8"
        ) from None
    values = {one: entry[name] for one, name in found.items() if name is not None}
    _check(where, values)
    given = {name: value for name, value in entry.items() if name not in found.values()}
    return Asked(**values, where=where, given=given)


def _check(where: str, values: Mapping[str, Any]) -> None:
    if type(values["id"]) not in (str, int) or values["id"] == "":
        raise ValueError(f"{where}: the id must be text or a whole number, got {values['id']!r}")
    for name in ("image", "question"):
        if not isinstance(values[name], str) or not values[name].strip():
            raise ValueError(f"{where}: the {name} must be text, got {values[name]!r}")
