"""Answer a file of questions: in batches, image by image, stopped and gone on with at will."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from sdrpn import __version__
from sdrpn.backbones.fingerprint import base_hash, weights_hash
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.io.atomic import as_json, atomic_write, parse_json
from sdrpn.io.images import BadImage, load_image, safe_join
from sdrpn.io.prefetch import ahead
from sdrpn.io.questions import Asked
from sdrpn.io.resume_guard import claim

ON_ERROR = ("raise", "empty")


class AnswerFile:
    """Answers as JSON lines, appended as they come; beside them, `NAME.settings.json`.

    Only a file that this class began is written to. A last line that a killed process left half
    written is dropped, and asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_path = path.with_name(f"{path.name}.settings.json")
        if path.exists() and path.stat().st_size and not self.settings_path.exists():
            raise ValueError(
                f"{path} is there and was not begun by `sdrpn answer` (there is no "
                f"{self.settings_path.name} beside it); use another --out"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):  # before the work, so that it is not in vain
            pass

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Note the settings of a new file; refuse one begun with others, naming what differs."""
        if not self.path.stat().st_size:
            self.settings_path.unlink(missing_ok=True)
        claim(self.settings_path, settings, self.path)

    def read(self) -> dict[str, dict[str, Any]]:
        """The lines by the id of their question, the latest of each."""
        with self.path.open("rb+") as file:
            content = file.read()
            kept = content.rfind(b"\n") + 1
            file.truncate(kept)
        lines = {}
        for number, line in enumerate(content[:kept].splitlines(), start=1):
            try:
                values = parse_json(line)
                key, *_ = (values[name] for name in ("id", "image", "question"))
                lines[str(key)] = values
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number}, is no answer; mend it, or use another --out"
                ) from None
        return lines

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines at the end. Raises OSError that names the file, for a full disk too."""
        try:
            with self.path.open("ab") as file:
                file.write(_as_text(lines))
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error}") from error

    def sort(self, questions: Sequence[Asked]) -> dict[str, dict[str, Any]]:
        """Bring the lines into the order of the questions, one each; returns them."""
        lines = self.read()
        ordered = {key: lines[key] for asked in questions if (key := str(asked.id)) in lines}
        if list(ordered) != list(lines) or len(lines) != self.path.read_bytes().count(b"\n"):
            with atomic_write(self.path) as part:
                part.write_bytes(_as_text(ordered.values()))
        return ordered


def _as_text(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(as_json(line, ensure_ascii=False) + "\n" for line in lines).encode()


class AnswerJob:
    """Ask `questions` and write their answers; see `run`.

    images: the folder the image paths start from. on_error: `raise` ends with the first question
    that cannot be answered, named; `empty` gives it a line with the error, and goes on.
    Raises ValueError where `out` holds something else than answers to these questions, asked with
    these settings.
    """

    def __init__(
        self,
        zoom: ZoomModel,
        questions: Sequence[Asked],
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
        self._opened: dict[str, Image.Image | BadImage] = {}
        out.claim(
            {
                "model": zoom.backbone.name,
                "model_hash": base_hash(zoom.backbone, zoom.backbone.num_layers),
                "rpn_hash": weights_hash([zoom.rpn]) if zoom.rpn else None,
                "dtype": str(zoom.backbone.dtype).removeprefix("torch."),
                "proposer": zoom.proposer,
                "zoom": asdict(zoom.zoom),
                "images": str(images.resolve()),
                "sdrpn": __version__,
                **{k: v for k, v in zoom.backbone.preprocessing.items() if k != "side"},
                **self.generation,
            }
        )

    def run(self) -> dict[str, dict[str, Any]]:
        """Ask what has no answer yet; returns the lines of all questions by id, in their order."""
        left = self._left()
        batches = [left[s : s + self.batch_size] for s in range(0, len(left), self.batch_size)]
        done = len(self.questions) - len(left)
        try:
            with (
                closing(ahead(batches, self._open)) as coming,
                tqdm(total=len(self.questions), initial=done, unit="question") as progress,
            ):
                for batch, opened in coming:
                    lines, errors = self._lines(batch, opened)
                    self.out.append(lines)
                    if errors and self.on_error == "raise":
                        raise ValueError(errors[0])
                    progress.update(len(batch))
        finally:
            self.zoom.forget_prepared()
        return self.out.sort(self.questions)

    def _left(self) -> list[Asked]:
        """Questions without an answer, those on one image together, else in their order."""
        answered = self.out.read()
        known = {str(asked.id) for asked in self.questions}
        strange = [key for key in answered if key not in known]
        if strange:
            raise ValueError(
                f"{self.out.path} answers a question {strange[0]!r}, which is not among these; use "
                "another --out"
            )
        by_image: dict[str, list[Asked]] = {}
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

    def _open(self, batch: Sequence[Asked]) -> list[Question | BadImage]:
        """The batch's questions; an image is decoded once for all that stand together."""
        names = dict.fromkeys(asked.image for asked in batch)
        self._opened = {name: self._opened.get(name) or self._load(name) for name in names}
        opened: list[Question | BadImage] = []
        for asked in batch:
            image = self._opened[asked.image]
            bad = isinstance(image, BadImage)
            opened.append(image if bad else Question(asked.question, (image,)))
        self.zoom.prepare([one for one in opened if isinstance(one, Question)])
        return opened

    def _load(self, name: str) -> Image.Image | BadImage:
        try:
            return load_image(safe_join(self.images, name))
        except BadImage as error:
            return error

    def _lines(
        self, batch: Sequence[Asked], opened: Sequence[Question | BadImage]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The lines of a batch, and what kept questions from being answered, each with its name."""
        said = iter(self._ask([one for one in opened if isinstance(one, Question)]))
        outcomes = [next(said) if isinstance(one, Question) else one for one in opened]
        lines, errors = [], []
        for asked, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Answer):
                lines.append(_line(asked, **outcome.described()))
                continue
            errors.append(f"{asked}: {outcome}")
            if self.on_error == "empty":
                lines.append(_line(asked, answer="", error=str(outcome)))
        return lines, errors

    def _ask(self, questions: Sequence[Question]) -> list[Answer | ValueError]:
        """Answers; where a batch fails, each question by itself, to find the one that does it."""
        try:
            return [*self.zoom.ask_batch(questions, self.generation)]
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{error}; try a smaller --batch-size than {self.batch_size}"
            ) from None
        except ValueError as error:
            if len(questions) == 1:
                return [error]
        return [one for question in questions for one in self._ask([question])]


def _line(asked: Asked, **said: Any) -> dict[str, Any]:
    entry = {"id": asked.id, "image": asked.image, "question": asked.question}
    return entry | said | {"given": dict(asked.given)}


def check_options(batch_size: int, max_new_tokens: int, on_error: str) -> None:
    """Raise ValueError for options that make no sense."""
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size and max_new_tokens must be 1 or more, got {batch_size}, {max_new_tokens}"
        )
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
