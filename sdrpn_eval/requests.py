"""Converts lmms-eval's requests to questions, and orders them.

Questions on one image are placed together, so that the image is prefilled once; within an image and
between images the longest prompts go first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from datasets import Dataset
from datasets import Image as ImageColumn
from loguru import logger
from PIL import Image

from sdrpn.io.images import image_key
from sdrpn.io.plurals import counted

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Request:
    """A request of lmms-eval, with names for the positions of its `args` tuple.

    Attributes:
        extra: Generation arguments of `generate_until`; the continuation of `loglikelihood`, or a
            function from the document to it.
        padding_only: Whether it only gives all ranks the same number of requests.
    """

    index: int
    prompt: str
    extra: Any
    doc_to_visual: Callable[[Any], Any]
    doc_id: int
    task: str
    split: str
    padding_only: bool

    @property
    def task_object(self) -> Any:
        """lmms-eval's task, if `doc_to_visual` is its bound method; else None."""
        return getattr(self.doc_to_visual, "__self__", None)


def parse(requests: Sequence[Any]) -> list[Request]:
    """Converts lmms-eval's `Instance`s of either request type, keeping their order."""
    parsed = []
    for i, instance in enumerate(requests):
        prompt, extra, doc_to_visual, doc_id, task, split = instance.args
        padding = bool((instance.metadata or {}).get("__padding_only__"))
        parsed.append(Request(i, prompt, extra, doc_to_visual, doc_id, task, split, padding))
    return parsed


def batches(
    requests: Sequence[Request], batch_size: int, documents: Documents
) -> Iterator[list[Request]]:
    """Yields batches of equal generation arguments, ordered by image, then by length."""
    keys = {r.index: documents.image_key(r) for r in requests}
    longest: dict[str, int] = {}
    for r in requests:
        longest[keys[r.index]] = max(longest.get(keys[r.index], 0), len(r.prompt))

    def order(r: Request) -> tuple[Any, ...]:
        key = keys[r.index]
        return (_kwargs_key(r), -longest[key], key, -len(r.prompt), r.index)

    for _, same in groupby(sorted(requests, key=order), key=_kwargs_key):
        members = list(same)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _kwargs_key(request: Request) -> str:
    """A text that is equal for requests that may share a batch."""
    extra = request.extra
    return json.dumps(extra, sort_keys=True, default=str) if isinstance(extra, dict) else ""


class Documents:
    """The documents of requests, and a cheap key for the image of each.

    Args:
        task_dict: Rows by task and split, as the evaluator passes them to a model.
    """

    def __init__(self, task_dict: Mapping[str, Any]) -> None:
        self.task_dict = task_dict
        self._undecoded: dict[tuple[str, str], Any] = {}

    def row(self, request: Request) -> Any:
        return self.task_dict[request.task][request.split][request.doc_id]

    def visuals(self, request: Request, row: Any) -> tuple[Image.Image, ...]:
        """The document's images. Raises ValueError for anything else, such as video."""
        visuals = request.doc_to_visual(row) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise ValueError(
                    f"questions are on images; document {request.doc_id} of {request.task} gives a "
                    f"{type(visual).__name__}"
                )
        return tuple(visuals)

    def image_key(self, request: Request) -> str:
        """A key that is equal for documents with the same image file, or the same decoded image.

        It only orders questions; whether a prefix can be reused is decided by the engine, from
        pixels.
        """
        files = self._files(request)
        if files is not None:
            encoded = b"".join(f.get("bytes") or str(f.get("path")).encode() for f in files)
            return hashlib.blake2b(encoded, digest_size=16).hexdigest()
        try:
            return ",".join(image_key(image) for image in self.visuals(request, self.row(request)))
        except Exception:  # raised again when the document is asked
            return "unreadable"

    def name(self, request: Request) -> str:
        """Describes a document: its task, its id, and its image by file name or hash."""
        paths = [str(f["path"]) for f in self._files(request) or [] if f.get("path")]
        image = ", ".join(paths) or self.image_key(request)
        return f"document {request.doc_id} of {request.task}{f' (image {image})' if image else ''}"

    def _files(self, request: Request) -> list[Mapping[str, Any]] | None:
        """The image files of a document as stored, undecoded; None without image columns."""
        place = request.task, request.split
        if place not in self._undecoded:
            rows = self.task_dict[request.task][request.split]
            columns = _image_columns(rows)
            self._undecoded[place] = undecoded(rows.select_columns(columns)) if columns else None
        rows = self._undecoded[place]
        return None if rows is None else [file or {} for file in rows[request.doc_id].values()]


def undecoded(rows: Any) -> Any:
    """A dataset with its image files as bytes; returns anything else unchanged."""
    for name in _image_columns(rows):
        rows = rows.cast_column(name, ImageColumn(decode=False))
    return rows


def _image_columns(rows: Any) -> list[str]:
    """Names of the image columns of a `datasets.Dataset`; none of anything else."""
    features = rows.features if isinstance(rows, Dataset) else {}
    return [name for name, kind in features.items() if isinstance(kind, ImageColumn)]


def question_text(request: Request, images: int) -> str:
    """The prompt without image placeholders, except where several images have one each.

    As in llava_hf, images without placeholders stand in front, where the engine puts them, and
    several images stay at their placeholders. If the numbers of images and placeholders differ, a
    warning is logged and the placeholders are removed.
    """
    text = request.prompt
    count = text.count(IMAGE_PLACEHOLDER)
    if count == 0 or (count == images and images > 1):
        return text
    if count != images:
        logger.warning(
            f"document {request.doc_id} of {request.task} has {counted(images, 'image')}, its "
            f"prompt names {count}"
        )
    return text.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()
