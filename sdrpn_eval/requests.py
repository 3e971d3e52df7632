"""lmms-eval requests -> questions, and the order in which they are answered.

Questions on one image stand next to each other, whatever order they came in, so that the image is
read once; within an image and between images the longest prompts go first.
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
from sdrpn_eval.provenance.fingerprints import undecoded

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Request:
    """One lmms-eval request, with names for what its `args` tuple holds by position.

    extra: the generation kwargs of `generate_until`, the continuation (or a function of the
    document that gives it) of `loglikelihood`.
    padding_only: lmms-eval's filler, which gives all ranks the same number of requests.
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
        """lmms-eval's task, where `doc_to_visual` is its bound method; else None."""
        return getattr(self.doc_to_visual, "__self__", None)


def parse(requests: Sequence[Any]) -> list[Request]:
    """lmms-eval `Instance`s of either request type -> Requests in the same order."""
    parsed = []
    for i, instance in enumerate(requests):
        prompt, extra, doc_to_visual, doc_id, task, split = instance.args
        padding = bool((instance.metadata or {}).get("__padding_only__"))
        parsed.append(Request(i, prompt, extra, doc_to_visual, doc_id, task, split, padding))
    return parsed


def batches(
    requests: Sequence[Request], batch_size: int, documents: Documents
) -> Iterator[list[Request]]:
    """Batches of one set of generation kwargs each, same images together, then by length."""
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
    """Equal for requests that may share a batch."""
    extra = request.extra
    return json.dumps(extra, sort_keys=True, default=str) if isinstance(extra, dict) else ""


class Documents:
    """The documents behind requests, and a cheap name for the image of each.

    task_dict: task -> split -> rows, as the evaluator hands it to a model.
    """

    def __init__(self, task_dict: Mapping[str, Any]) -> None:
        self.task_dict = task_dict
        self._undecoded: dict[tuple[str, str], Any] = {}

    def row(self, request: Request) -> Any:
        return self.task_dict[request.task][request.split][request.doc_id]

    def visuals(self, request: Request, row: Any) -> tuple[Image.Image, ...]:
        """The document's images. Raises ValueError where it holds anything else, such as video."""
        visuals = request.doc_to_visual(row) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise ValueError(
                    f"questions are on images; document {request.doc_id} of {request.task} gives a "
                    f"{type(visual).__name__}"
                )
        return tuple(visuals)

    def image_key(self, request: Request) -> str:
        """Equal for documents that hold the same image file, or else the same decoded image.

        Only puts questions side by side; whether a read image can be used again is decided by the
        engine, on the pixels.
        """
        files = self._files(request)
        if files is not None:
            encoded = b"".join(f.get("bytes") or str(f.get("path")).encode() for f in files)
            return hashlib.blake2b(encoded, digest_size=16).hexdigest()
        try:
            return ",".join(image_key(image) for image in self.visuals(request, self.row(request)))
        except Exception:  # raised again where it is asked
            return "unreadable"

    def name(self, request: Request) -> str:
        """A document in words: its task, its id, its image by file or else by content."""
        paths = [str(f["path"]) for f in self._files(request) or [] if f.get("path")]
        image = ", ".join(paths) or self.image_key(request)
        return f"document {request.doc_id} of {request.task}{f' (image {image})' if image else ''}"

    def _files(self, request: Request) -> list[Mapping[str, Any]] | None:
        """The image files of a document as stored, undecoded; None where it has no such columns."""
        place = request.task, request.split
        if place not in self._undecoded:
            self._undecoded[place] = _without_decoding(self.task_dict[request.task][request.split])
        rows = self._undecoded[place]
        return None if rows is None else [file or {} for file in rows[request.doc_id].values()]


def _without_decoding(rows: Any) -> Any:
    """A view of a `datasets.Dataset` on its image columns alone, as bytes; None without any."""
    if not isinstance(rows, Dataset):
        return None
    columns = [name for name, kind in rows.features.items() if isinstance(kind, ImageColumn)]
    return undecoded(rows.select_columns(columns)) if columns else None


def question_text(request: Request, images: int) -> str:
    """The prompt as the engine takes it: image placeholders gone, but for several images in place.

    As in llava_hf, a prompt without placeholders gets its images in front (the engine does that),
    and one that places several images keeps them where they are. A prompt that names another
    number of images than it has is logged and loses its placeholders.
    """
    text = request.prompt
    count = text.count(IMAGE_PLACEHOLDER)
    if count == 0 or (count == images and images > 1):
        return text
    if count != images:
        logger.warning(
            f"document {request.doc_id} of {request.task} has {counted(images, 'image')}, its "
            "prompt names "
            f"{count}"
        )
    return text.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()
