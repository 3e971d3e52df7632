"""Preprocessing of Qwen2.5-VL: two resizes that keep the aspect ratio, then patches.

A cell is one image token: merge x merge patches, 28 x 28 pixels of the resized image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from sdrpn.backbones.base import ImageInput
from sdrpn.backbones.qwen25_vl_published import CELL_PIXELS
from sdrpn.boxes import ImageGrid, PixelBox

FIRST_CELLS = (4, 16384)
"""Limits of the first resize, in cells: that of the vision utilities used by the published runs,
before the image processor resizes to the limits of a run."""

MAX_ASPECT = 200
GREY = (127, 127, 127)
"""Padding of images in labelling and training."""


def check_pixels(min_pixels: int, max_pixels: int, token: int = CELL_PIXELS) -> None:
    """Raise ValueError unless token <= min_pixels <= max_pixels, in pixels."""
    if not token <= min_pixels <= max_pixels:
        raise ValueError(
            f"min_pixels and max_pixels must be {token} (one token) or more and in order, got "
            f"{min_pixels} and {max_pixels}"
        )


class StretchedGrid(ImageGrid):
    """A grid that covers the image from edge to edge; boxes as in the published code."""

    def _to_source(self, edge: int, axis: int) -> int:
        # A float32 product, which for some sizes is one pixel short of the last edge.
        pixels = np.float32(float(1 / Fraction(self.scale[axis])))
        source = (np.float32(edge * self.cell) - np.float32(self.offset[axis])) * pixels
        return int(np.clip(source, 0, self.size[axis]))


@dataclass(frozen=True)
class ImageRules:
    """Converts images to patches, within limits.

    Args:
        processor: The checkpoint's image processor (torchvision).
        min_pixels: Minimum size of a resized image or crop, in pixels.
        max_pixels: Maximum size of a resized image or crop, in pixels.
        square: Whether whole images are first centred on a grey square.

    Raises:
        ValueError: If the limits are out of order or below one token.
    """

    processor: Qwen2VLImageProcessor
    min_pixels: int
    max_pixels: int
    square: bool = False

    def __post_init__(self) -> None:
        check_pixels(self.min_pixels, self.max_pixels, self.cell**2)

    @property
    def merge(self) -> int:
        """Patches per side of a cell."""
        return int(self.processor.merge_size)

    @property
    def cell(self) -> int:
        """Pixels per side of a cell."""
        return int(self.processor.patch_size) * self.merge

    def limited(self, cells: int | None) -> ImageRules:
        """Return the rules with at most `cells` tokens per image; None: the same rules."""
        if cells is None or cells * self.cell**2 >= self.max_pixels:
            return self
        most = cells * self.cell**2
        return replace(self, min_pixels=min(self.min_pixels, most), max_pixels=most)

    def whole(self, image: Image.Image) -> ImageInput:
        """Convert a whole image: resized by PIL, unless square, then by the image processor."""
        grid = self.grid(image.size)
        if self.square:
            return ImageInput(self._patches(padded(image)), grid)
        size = self._first_size(*image.size)
        return ImageInput(self._patches(image.resize(size, Image.Resampling.BICUBIC)), grid)

    def grid(self, size: tuple[int, int]) -> ImageGrid:
        """Compute the grid of a whole image.

        Args:
            size: (width, height) of the image, in pixels.

        Raises:
            ValueError: If the image is narrower than 1 : 200.
        """
        side = max(size)
        shown = (side, side) if self.square else size
        columns, rows = self._cells(*(shown if self.square else self._first_size(*shown)))
        scale = self._scale(columns, shown[0]), self._scale(rows, shown[1])
        pads = [(whole - own) // 2 * float(s) for whole, own, s in zip(shown, size, scale)]  # noqa: B905
        return StretchedGrid(rows, columns, size, self.cell, scale, (pads[0], pads[1]))

    def crop_cells(self, box: PixelBox) -> tuple[int, int]:
        """Return (columns, rows) of a crop."""
        return self._cells(box.x1 - box.x0, box.y1 - box.y0)

    def crop(self, image: Image.Image, box: PixelBox) -> ImageInput:
        """Convert a crop of the original image: resized once, by the image processor.

        Args:
            image: The source image.
            box: The crop, in source pixels.
        """
        size = box.x1 - box.x0, box.y1 - box.y0
        columns, rows = self.crop_cells(box)
        scale = self._scale(columns, size[0]), self._scale(rows, size[1])
        grid = StretchedGrid(rows, columns, size, self.cell, scale)
        return ImageInput(self._patches(image.crop(box)), grid)

    def _scale(self, cells: int, pixels: int) -> Fraction:
        return Fraction(cells * self.cell, pixels)

    def _first_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the first resize, which also accepts images below one cell."""
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(
                f"the image is {width} x {height} pixels, thinner than 1 : {MAX_ASPECT}, which "
                "Qwen2.5-VL does not read; cut it"
            )
        least, most = (cells * self.cell**2 for cells in FIRST_CELLS)
        fitted = [max(round(edge / self.cell), 1) * self.cell for edge in (width, height)]
        if not least <= fitted[0] * fitted[1] <= most:
            fitted[1], fitted[0] = smart_resize(height, width, self.cell, least, most)
        return fitted[0], fitted[1]

    def _cells(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of an image after the image processor's resize."""
        high, wide = smart_resize(height, width, self.cell, self.min_pixels, self.max_pixels)
        return wide // self.cell, high // self.cell

    def _patches(self, image: Image.Image) -> Float[Tensor, "patches values"]:
        limits = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        return self.processor(images=[image], size=limits, return_tensors="pt")["pixel_values"]


def image_processor(own: Any) -> Qwen2VLImageProcessor:
    """Return the torchvision image processor with a checkpoint's constants.

    The published runs used it; PIL's bicubic resize rounds differently.

    Args:
        own: The checkpoint's image processor.
    """
    names = ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
    return Qwen2VLImageProcessor(**{name: getattr(own, name) for name in names})


def padded(image: Image.Image) -> Image.Image:
    """Centre an image on a grey square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
