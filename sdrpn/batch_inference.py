"""Bulk answering: a file of questions to a file of answers, resumable at any moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sdrpn import __version__
from sdrpn.backbones.fingerprint import base_hash, weights_hash
from sdrpn.engine import Question, ZoomModel
from sdrpn.io.atomic import as_json, atomic_write, parse_json
from sdrpn.io.images import load_image, safe_join
from sdrpn.io.questions import ImageQuestion
from sdrpn.io.resumable import BatchRunner, append_lines, drop_incomplete_line, guard_settings

ON_ERROR = ("raise", "empty")

Line = dict[str, Any]
"""One answer, or the error in its place, as JSON holds it."""


class AnswerFile:
    """Answers as JSON lines, appended as they come; beside them, `NAME.settings.json`.

    Only a file that this class began is written to.

    Args:
        path: The file; its folder is made.
        command: The command that writes it, for errors.

    Raises:
        ValueError: If the file exists and was not begun by the command.
        OSError: If it cannot be written.
    """

    def __init__(self, path: Path, command: str = "sdrpn answer") -> None:
        self.path = path
        self.settings_path = path.with_name(f"{path.name}.settings.json")
        if path.exists() and path.stat().st_size and not self.settings_path.exists():
            raise ValueError(
                f"{path} is there and was not begun by `{command}` (there is no "
                f"{self.settings_path.name} beside it); use another --out"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):  # fails before the work rather than after it
            pass

    def guard(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of a new file; refuse a file with others, naming what differs."""
        if not self.path.stat().st_size:
            self.settings_path.unlink(missing_ok=True)
        guard_settings(self.settings_path, settings, self.path)

    def read(self) -> dict[str, Line]:
        """The lines by the id of their question, the latest of each; drops an incomplete one."""
        lines = {}
        for number, line in enumerate(drop_incomplete_line(self.path), start=1):
            try:
                values = parse_json(line)
                key, *_ = (values[name] for name in ("id", "image", "question"))
                lines[str(key)] = values
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number}, is no answer; correct it, or use another --out"
                ) from None
        return lines

    def append(self, lines: Iterable[Line]) -> None:
        """Write lines at the end."""
        append_lines(self.path, map(_as_text, lines))

    def sort(self, questions: Sequence[ImageQuestion]) -> dict[str, Line]:
        """Bring the lines into the order of the questions, one each; returns them."""
        lines = self.read()
        ordered = {key: lines[key] for asked in questions if (key := str(asked.id)) in lines}
        if list(ordered) != list(lines) or len(lines) != self.path.read_bytes().count(b"\n"):
            with atomic_write(self.path) as part:
                text = "".join(f"{_as_text(line)}\n" for line in ordered.values())
                part.write_bytes(text.encode())
        return ordered


def _as_text(line: Line) -> str:
    return as_json(line, ensure_ascii=False)


class AnswerJob:
    """Asks questions and writes their answers; see `run`.

    Args:
        zoom: The model.
        questions: What to ask.
        images: Folder that the image paths start from.
        out: Where answers go.
        batch_size: Questions at a time; smaller where the memory does not suffice.
        max_new_tokens: Longest answer.
        on_error: `raise` ends the job at the first question that cannot be answered, by name;
            `empty` writes a line with the error, and goes on.

    Raises:
        ValueError: If an option is out of range, or `out` holds answers to other questions, or
            answers with other settings.
    """

    def __init__(
        self,
        zoom: ZoomModel,
        questions: Sequence[ImageQuestion],
        images: Path,
        out: AnswerFile,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 128,
        on_error: str = "raise",
    ) -> None:
        check_options(batch_size, max_new_tokens, on_error)
        self.zoom, self.questions, self.images, self.out = zoom, questions, images, out
        self.batch_size, self.on_error = batch_size, on_error
        self.generation = {"max_new_tokens": max_new_tokens}
        # Questions on one image stand together: it is decoded once for all of them.
        self._load = lru_cache(maxsize=1)(self._load_image)
        out.guard(self.settings())

    def settings(self) -> dict[str, Any]:
        """What decides the lines: the settings that a file belongs to."""
        zoom = self.zoom
        return {
            "model": zoom.backbone.name,
            "model_hash": base_hash(zoom.backbone, zoom.backbone.num_layers),
            "rpn_hash": weights_hash([zoom.rpn]) if zoom.rpn else None,
            "dtype": str(zoom.backbone.dtype).removeprefix("torch."),
            "proposer": zoom.proposer,
            "zoom": asdict(zoom.zoom),
            "images": str(self.images.resolve()),
            "sdrpn": __version__,
            **{k: v for k, v in zoom.backbone.preprocessing.items() if k != "side"},
            **self.generation,
        }

    def run(self) -> dict[str, Line]:
        """Ask what has no answer yet; returns the lines of all questions by id, in their order."""
        left = self._left()
        runner = BatchRunner(
            prepare=self._prepare,
            run=self._ask,
            recover=self._recover,
            describe=str,
            batch_size=self.batch_size,
            remedy="ask on a device with more memory, or with a smaller --dtype",
        )
        batches = (left[s : s + self.batch_size] for s in range(0, len(left), self.batch_size))
        total, done = len(self.questions), len(self.questions) - len(left)
        try:
            with closing(runner(batches, total=total, initial=done, unit="question")) as results:
                for answered in results:
                    self.out.append(line for _, line in answered)
        finally:
            self.zoom.forget_prepared()
        return self.out.sort(self.questions)

    def _left(self) -> list[ImageQuestion]:
        """Questions without an answer, those on one image together, else in their order."""
        answered = self.out.read()
        known = {str(asked.id) for asked in self.questions}
        strange = [key for key in answered if key not in known]
        if strange:
            raise ValueError(
                f"{self.out.path} answers a question {strange[0]!r}, which is not among these; use "
                "another --out"
            )
        by_image: dict[str, list[ImageQuestion]] = {}
        for asked in self.questions:
            line = answered.get(str(asked.id))
            if line is not None and (line["image"], line["question"]) != (
                asked.image,
                asked.question,
            ):
                raise ValueError(
                    f"{asked} is another one than {self.out.path} answers ({line['question']!r} "
                    f"on {line['image']}); use another --out"
                )
            if line is None or "error" in line:
                by_image.setdefault(asked.image, []).append(asked)
        return [asked for group in by_image.values() for asked in group]

    def _prepare(self, asked: ImageQuestion) -> Question:
        question = Question(asked.question, (self._load(asked.image),))
        self.zoom.prepare([question])
        return question

    def _load_image(self, name: str) -> Image.Image:
        return load_image(safe_join(self.images, name))

    def _ask(self, batch: Sequence[ImageQuestion], questions: Sequence[Question]) -> list[Line]:
        answers = self.zoom.ask_batch(questions, self.generation)
        return [as_line(a, **answer.to_dict()) for a, answer in zip(batch, answers, strict=True)]

    def _recover(self, asked: ImageQuestion, _: Question | None, error: Exception) -> Line:
        """The line of a question that failed, by `on_error`."""
        if not isinstance(error, ValueError):  # no fault of the question's
            raise error
        if self.on_error == "raise":
            raise ValueError(f"{asked}: {error}") from error
        return as_line(asked, answer="", error=str(error))


def as_line(asked: ImageQuestion, **said: Any) -> Line:
    """The line of a question, with its other fields last."""
    entry = {"id": asked.id, "image": asked.image, "question": asked.question}
    return entry | said | {"given": dict(asked.given)}


def check_options(batch_size: int, max_new_tokens: int, on_error: str) -> None:
    """Raises ValueError for options that are out of range."""
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size and max_new_tokens must be 1 or more, got {batch_size}, {max_new_tokens}"
        )
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
