"""How Qwen2.5-VL sees pictures: two resizes, a grid of cells that keeps the shape, patches.

A cell is one image token: merge x merge patches, 28 x 28 pixels of the resized picture.
"""

from __future__ import annotations

from dataclasses import dataclass
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
"""Limits of the first of two resizes, in cells: that of the vision utilities behind published
numbers, before the image processor resizes to the limits of a run."""

MAX_ASPECT = 200
GREY = (127, 127, 127)
"""What pictures are padded with in labelling and training."""


def check_pixels(min_pixels: int, max_pixels: int, token: int = CELL_PIXELS) -> None:
    """Raise ValueError unless token <= min_pixels <= max_pixels, in pixels."""
    if not token <= min_pixels <= max_pixels:
        raise ValueError(
            f"min_pixels and max_pixels must be {token} (one token) or more and in order, got "
            f"{min_pixels} and {max_pixels}"
        )


class StretchedGrid(ImageGrid):
    """A grid whose cells reach from edge to edge; boxes as the published code computes them."""

    def _to_source(self, edge: int, axis: int) -> int:
        # A float32 product, which at some sizes falls one pixel short of the last edge.
        pixels = np.float32(float(1 / Fraction(self.scale[axis])))
        source = (np.float32(edge * self.cell) - np.float32(self.offset[axis])) * pixels
        return int(np.clip(source, 0, self.size[axis]))


@dataclass(frozen=True)
class PictureRules:
    """From pictures to patches, within limits.

    Args:
        processor: The checkpoint's image processor (torchvision).
        min_pixels: Of a resized picture or crop.
        max_pixels: Of it.
        square: Whether whole pictures are first padded to a centred grey square.
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

    def whole(self, image: Image.Image) -> ImageInput:
        """A whole picture: resized by PIL, then by the image processor; a square only by that."""
        grid = self.grid(image.size)
        if self.square:
            return ImageInput(self._patches(padded(image)), grid)
        size = self._first_size(*image.size)
        return ImageInput(self._patches(image.resize(size, Image.Resampling.BICUBIC)), grid)

    def grid(self, size: tuple[int, int]) -> ImageGrid:
        """How the cells lie on a whole picture. size: (width, height).

        Raises ValueError for a picture that is thinner than 1 : 200.
        """
        side = max(size)
        shown = (side, side) if self.square else size
        columns, rows = self._cells(*(shown if self.square else self._first_size(*shown)))
        scale = self._scale(columns, shown[0]), self._scale(rows, shown[1])
        pads = [(whole - own) // 2 * float(s) for whole, own, s in zip(shown, size, scale)]  # noqa: B905
        return StretchedGrid(rows, columns, size, self.cell, scale, (pads[0], pads[1]))

    def crop_cells(self, box: PixelBox) -> tuple[int, int]:
        """(columns, rows) of a crop."""
        return self._cells(box.x1 - box.x0, box.y1 - box.y0)

    def crop(self, image: Image.Image, box: PixelBox) -> ImageInput:
        """A box of the original picture: resized once, by the image processor."""
        size = box.x1 - box.x0, box.y1 - box.y0
        columns, rows = self.crop_cells(box)
        scale = self._scale(columns, size[0]), self._scale(rows, size[1])
        grid = StretchedGrid(rows, columns, size, self.cell, scale)
        return ImageInput(self._patches(image.crop((box.x0, box.y0, box.x1, box.y1))), grid)

    def _scale(self, cells: int, pixels: int) -> Fraction:
        return Fraction(cells * self.cell, pixels)

    def _first_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the first resize, which lets pictures under one cell through."""
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(
                f"the picture is {width} x {height} pixels, thinner than 1 : {MAX_ASPECT}, which "
                "Qwen2.5-VL does not read; cut it"
            )
        least, most = (cells * self.cell**2 for cells in FIRST_CELLS)
        fitted = [max(round(edge / self.cell), 1) * self.cell for edge in (width, height)]
        if not least <= fitted[0] * fitted[1] <= most:
            fitted[1], fitted[0] = smart_resize(height, width, self.cell, least, most)
        return fitted[0], fitted[1]

    def _cells(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) that the image processor makes of a picture."""
        high, wide = smart_resize(height, width, self.cell, self.min_pixels, self.max_pixels)
        return wide // self.cell, high // self.cell

    def _patches(self, image: Image.Image) -> Float[Tensor, "patches values"]:
        limits = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        return self.processor(images=[image], size=limits, return_tensors="pt")["pixel_values"]


def image_processor(own: Any) -> Qwen2VLImageProcessor:
    """The torchvision image processor with a checkpoint's constants.

    Published numbers were made with it; PIL's bicubic resize rounds otherwise.
    """
    names = ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
    return Qwen2VLImageProcessor(**{name: getattr(own, name) for name in names})


def padded(image: Image.Image) -> Image.Image:
    """The picture in the middle of a grey square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
