"""Questions in a file: JSON lines, a JSON list, LLaVA's question.jsonl or its conversations."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdrpn.config import IMAGE_TOKEN
from sdrpn.io.atomic import parse_json
from sdrpn.io.images import BadImage, safe_join

TURNS = "conversations"
NAMES = {
    "id": ("id", "question_id"),
    "image": ("image",),
    "question": ("question", "text", TURNS),
}
"""Names of each field, by preference; the later ones are LLaVA's."""

EXPECTED = 'expected {"id": ..., "image": ..., "question": ...}'


@dataclass(frozen=True)
class ImageQuestion:
    """One question on one image.

    Attributes:
        image: A path below the image folder.
        where: File and line, for errors.
        given: The other fields of its entry.
        content: Reads the image file's bytes, if it came inside a dataset.
    """

    id: str | int
    image: str
    question: str
    where: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)
    content: Callable[[], bytes] | None = None

    def __str__(self) -> str:
        return f"{self.where}, question {self.id!r}"


def read_questions(path: Path, images: Path) -> list[ImageQuestion]:
    """Read the questions of a file, in their order; every entry must be one.

    Args:
        path: JSON lines or a JSON list.
        images: Folder that image paths start from; whether the files exist is not checked.

    Raises:
        ValueError: Naming the line that is no JSON, lacks a field, has another's id, or whose path
            leaves the folder.
    """
    questions: dict[str, ImageQuestion] = {}
    for entry in read_entries(path):
        if isinstance(entry.value, ValueError):
            raise entry.value
        asked = _strictly(entry)
        earlier = questions.setdefault(str(asked.id), asked)
        if earlier is not asked:
            raise ValueError(
                f"{entry.where}: the id {asked.id!r} stands in {earlier.where} already"
            )
        try:
            safe_join(images, asked.image)
        except BadImage as error:
            raise ValueError(f"{entry.where}: image {error}") from None
    if not questions:
        raise ValueError(f"{path} holds no question")
    return list(questions.values())


@dataclass(frozen=True)
class Entry:
    """One entry of a file of questions.

    where: the file and the entry's place in it, for errors. number: of the entry in a list, counted
    from 0, or of the line, counted from 1. value: what JSON holds there; a ValueError that says why
    not where the line is not valid JSON. last: nothing stands behind it, not even a line end.
    """

    where: str
    number: int
    value: Any
    last: bool = False


def read_entries(path: Path, *, first: int = 1, longest: int | None = None) -> Iterator[Entry]:
    """Read the entries of a JSON list or of JSON lines; the content decides, not the suffix.

    Args:
        first: number of a list's first entry in `where`.
        longest: bytes of the longest line that is read, None for no limit.

    Raises:
        ValueError: naming the file, if it is missing, not in UTF-8, or neither of the two.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip()
    if path.suffix == ".json" or start.startswith(b"["):
        text = _decoded(path, path.read_bytes()).removeprefix("\ufeff")
        if start.startswith(b"[") or not _is_lines(text):
            for number, value in enumerate(_whole_file(path, text)):
                yield Entry(f"{path}, entry {number + first}", number, value)
            return
    yield from _lines(path, longest)


def _is_lines(text: str) -> bool:
    """Whether a text is no value at all, or several, one a line."""
    lines = [line for line in text.split("\n") if line.strip()]
    return not lines or (len(lines) > 1 and not isinstance(_value(lines[0], ""), ValueError))


def _whole_file(path: Path, text: str) -> list[Any]:
    value = _value(text, str(path))
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and "image" in value:
        return [value]
    held = value.items() if isinstance(value, dict) else ()
    lists = [name for name, one in held if isinstance(one, list)]
    hint = f"; save the list under its key {lists[0]!r:.80} as a file" if lists else ""
    raise ValueError(f"{path} must hold a list of questions, not a {type(value).__name__}{hint}")


def _lines(path: Path, longest: int | None) -> Iterator[Entry]:
    limit, offset = -1 if longest is None else longest + 1, 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(limit), b""), start=1):
            if longest is not None and len(line) > longest:
                raise ValueError(f"{path}, line {number}: it has more than {longest:,} bytes")
            text = _decoded(path, line, offset)
            offset += len(line)
            text = text.removeprefix("\ufeff") if number == 1 else text
            if text.strip():
                where = f"{path}, line {number}"
                value = _value(text.removesuffix("\n"), where)
                yield Entry(where, number, value, not line.endswith(b"\n"))


def _decoded(path: Path, content: bytes, offset: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8, from byte {offset + error.start} on; save it as UTF-8"
        ) from None


def _value(text: str, where: str) -> Any:
    """What JSON holds, or the ValueError, not raised, that says why it is not valid."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        column = f", column {error.colno}"
        place = column if error.lineno == 1 else f", line {error.lineno}{column}"
        return ValueError(f"{where} is not valid JSON: {error.msg}{place}")
    except ValueError as error:  # nested too deeply, or a number of thousands of digits
        return ValueError(f"{where} is not valid JSON: {error}")


def one_image(value: Any) -> Any:
    """The image of an entry: a list of one stands for it. Raises ValueError for a longer list."""
    if not isinstance(value, list) or not value:
        return value
    if len(value) > 1:
        raise ValueError(
            f"the image must be text, got {value!r:.80}, {len(value)} of them; give one"
        )
    return value[0]


def first_question(turns: Any) -> str:
    """What LLaVA's conversation asks first: a turn that is only `<image>` asks nothing.

    turns: [{"from": "human" or "gpt", "value": text}, ...]. Raises ValueError that says what is
    wrong with them.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('conversations must be a list of {"from": ..., "value": ...}')
    for turn in turns:
        if turn.get("from") == "human":
            words = turn.get("value")
            if not isinstance(words, str):
                raise ValueError(f"a turn must be text, got {words!r:.80}")
            if words.replace(IMAGE_TOKEN, "").strip():
                return words
    raise ValueError('no turn "from" "human" asks anything')


def parse_entry(value: Any) -> tuple[str, str, dict[str, Any]] | None:
    """Image, question and other fields of an entry, the id as `id` if it has one.

    Returns:
        None for a conversation without an image.

    Raises:
        ValueError: Saying what is wrong with it, the entry being "it".
    """
    if not isinstance(value, dict):
        raise ValueError(f"it must be an object, got a {type(value).__name__}")
    if not value.get("image"):
        if TURNS in value:
            return None
        raise ValueError("it has no image")
    found = {one: next((n for n in names if n in value), None) for one, names in NAMES.items()}
    if found["question"] is None:
        raise ValueError("it has no question, no text and no conversations")
    words = value[found["question"]]
    words = first_question(words) if found["question"] == TURNS else words
    rest = {name: held for name, held in value.items() if name not in found.values()}
    named = {"id": value[found["id"]]} if found["id"] else {}
    return as_text("image", one_image(value["image"])), as_text("question", words), rest | named


def as_text(name: str, value: Any) -> str:
    """A text that is not blank and that UTF-8 can hold. Raises ValueError that names the field."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {name} must be text, got {value!r:.80}")
    if (half := half_character(value)) is not None:
        raise ValueError(f"the {name} holds half of a character, {half}; write it in UTF-8")
    return value


def half_character(text: str) -> str | None:
    """Half of a surrogate pair, which JSON can spell, written in ASCII; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return None


def _strictly(entry: Entry) -> ImageQuestion:
    """The question of an entry that must be one, with an id, and fields fit to be written back."""
    where = entry.where
    try:
        parsed = parse_entry(entry.value)
        if parsed is None:
            raise ValueError("it has no image")
        image, question, given = parsed
        if "id" not in given:
            raise ValueError("it has no id and no question_id")
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {EXPECTED}") from None
    name = given.pop("id")
    if type(name) not in (str, int) or name == "":
        raise ValueError(f"{where}: the id must be text or a whole number, got {name!r}")
    if (half := half_character(json.dumps([name, given], ensure_ascii=False))) is not None:
        raise ValueError(f"{where} holds half of a character, {half}; write it in UTF-8")
    return ImageQuestion(name, image, question, where, given)
