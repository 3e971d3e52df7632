"""The pictures of the page: which questions get one, and how they fit the budget."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn_eval.results.scores import Document

SIDE = 640
"""Longest side of a picture; crops of larger originals get pictures of their own."""
CROP_SIDE = 336
QUALITY = 70
TRIES = 50
"""Pictures too large for what is left of the budget, in a row, until the album is called full."""


@dataclass
class Album:
    """Pictures as data URIs, up to a number of characters; a picture asked for again costs nothing.

    Documents that share an image share its picture.
    """

    budget: int
    pictures: list[str] = field(default_factory=list)
    used: int = 0
    _places: dict[Hashable, int] = field(default_factory=dict)
    _refused: int = 0

    @property
    def full(self) -> bool:
        return self._refused >= TRIES

    def add(self, wanted: Sequence[tuple[Hashable, Callable[[], Image.Image]]]) -> list[int] | None:
        """Places of pictures that belong together: all of them, or None where they do not fit.

        wanted: (what the picture is, how to make it).
        """
        if self.full:
            return None
        new = {key: data_uri(make()) for key, make in wanted if key not in self._places}
        size = sum(len(uri) + 3 for uri in new.values())  # two quotes and a comma
        if self.used + size > self.budget:
            self._refused += 1
            return None
        self._refused = 0
        self.used += size
        for key, uri in new.items():
            self._places[key] = len(self.pictures)
            self.pictures.append(uri)
        return [self._places[key] for key, _ in wanted]


def data_uri(image: Image.Image) -> str:
    """An image as a WebP data URI."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """No larger than side x side, in the same proportions."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def needs_crop(size: Sequence[int]) -> bool:
    """Whether the page's picture is coarser than the original, so that crops need their own."""
    return max(size) > SIDE


def cut(image: Image.Image, box: PixelBox) -> Image.Image:
    """What the model saw the second time, small enough for a page."""
    return shrunk(image.crop((box.x0, box.y0, box.x1, box.y1)), CROP_SIDE)


def in_order(changed: Sequence[Document], others: Sequence[Document], seed: int) -> list[Document]:
    """Fixed and broken first, then the rest, each in an order drawn by the seed."""
    rng = random.Random(seed)
    return [*rng.sample(list(changed), len(changed)), *rng.sample(list(others), len(others))]
