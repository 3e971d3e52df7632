"""The page's images, within a budget of characters."""

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
"""Longest side of an image in pixels; crops of larger images are stored separately."""
CROP_SIDE = 336
QUALITY = 70
TRIES = 50
"""Number of consecutive images exceeding the budget after which the album is full."""


@dataclass
class Album:
    """Images as data URIs, up to a number of characters; equal keys share an image.

    Attributes:
        budget: Maximum number of characters.
        pictures: The data URIs.
        used: Number of characters so far.
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
        """Adds images that belong together.

        Args:
            wanted: For each image a key and a function that makes it.

        Returns:
            Their indices in `pictures`; None if they do not all fit.
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
    image.convert("RGB").save(file, "WEBP", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image in RGB, no larger than side x side, in the same proportions."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def needs_crop(size: Sequence[int]) -> bool:
    """Whether an image is scaled down on the page, so that its crops are stored separately."""
    return max(size) > SIDE


def cut(image: Image.Image, box: PixelBox) -> Image.Image:
    """A region of an image, small enough for a page."""
    return shrunk(image.crop((box.x0, box.y0, box.x1, box.y1)), CROP_SIDE)


def in_order(changed: Sequence[Document], others: Sequence[Document], seed: int) -> list[Document]:
    """Changed questions first, then the others, each in a random order."""
    rng = random.Random(seed)
    return [*rng.sample(list(changed), len(changed)), *rng.sample(list(others), len(others))]
