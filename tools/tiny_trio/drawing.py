"""Drawing with labels: every stroke on a canvas also says, on coarse maps, what it shows.

The maps feed stage 0 of the training (which patch shows which word) and measurements; no model is
ever shown a box.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from sdrpn.boxes import PixelBox
from sdrpn.distill.probes import COLOURS, PATTERNS, texture

SHAPES = ("disc", "square", "triangle", "cross", "sign")
"""What stands on a ground; signs are drawn by `Canvas.plate`."""
GLYPHS = tuple("0123456789")
FIELDS = ("total", "date", "name", "tax", "room", "unit")
GROUPS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "pattern": PATTERNS,
    "glyph": GLYPHS,
    "field": FIELDS,
}
"""Groups of words that a patch can show; one map each, with 255 for none of them."""
NONE = 255
MAP_SCALE = 3
"""Pixels of the picture per cell of a map, along each side."""
FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
CAP_HEIGHT = 0.729
"""Height of a digit in DejaVu, as a share of the font size."""
DARK = 0.35


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that ships with matplotlib, under the Bitstream Vera licence."""
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def sign_ink(colour: str) -> tuple[int, int, int]:
    """Ink that can be read on a sign of this colour: dark on light ones, else light."""
    light = colour in ("yellow", "cyan", "pink", "orange", "green")
    return (10, 10, 10) if light else (250, 250, 250)


def smooth_ground(rng: np.random.Generator, side: int) -> np.ndarray:
    """A smooth background of 7 x 7 muted colours, uint8 (side, side, 3)."""
    knots = rng.uniform(40, 215, (7, 7, 3))
    knots = 0.45 * knots + 0.55 * knots.mean(axis=2, keepdims=True)
    small = Image.fromarray(knots.astype(np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).copy()


def inside(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the edge of a shape, positive inside, in pixels."""
    if shape == "disc":
        return radius - np.hypot(dx, dy)
    if shape == "square":
        return 0.86 * radius - np.maximum(abs(dx), abs(dy))
    if shape == "triangle":
        slanted = (0.62 * radius - (0.87 * abs(dx) - 0.5 * dy)) / 1.0
        return np.minimum(slanted, 0.75 * radius - dy)
    if shape == "cross":
        bar, arm = 0.42 * radius, radius
        upright = np.minimum(bar - abs(dx), arm - abs(dy))
        level = np.minimum(arm - abs(dx), bar - abs(dy))
        return np.maximum(upright, level)
    raise ValueError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES[:-1])}")


class Canvas:
    """A square picture, uint8 (side, side, 3), with one map per group of words and some of sizes.

    `period`, `height`, `radius` and `label` hold, in pixels of the picture, what decides whether a
    view can show the pattern, the digit, the shape or the field there.
    """

    def __init__(self, ground: np.ndarray) -> None:
        self.image = ground
        self.side = len(ground)
        cells = self.side // MAP_SCALE
        self.maps = {name: np.full((cells, cells), NONE, np.uint8) for name in GROUPS}
        self.sizes = {
            name: np.zeros((cells, cells), np.float16)
            for name in ("period", "height", "radius", "label")
        }

    def _cells(self, box: PixelBox) -> tuple[slice, slice]:
        x0, y0, x1, y1 = (round(v / MAP_SCALE) for v in box)
        return slice(max(y0, 0), max(y1, y0 + 1)), slice(max(x0, 0), max(x1, x0 + 1))

    def mark(self, box: PixelBox, group: str, word: str) -> None:
        """Note that the box shows a word of a group."""
        self.maps[group][self._cells(box)] = GROUPS[group].index(word)

    def shape(
        self,
        rng: np.random.Generator,
        shape: str,
        colour: str,
        pattern: str,
        centre: tuple[float, float],
        radius: float,
        period: float,
    ) -> PixelBox:
        """Draw a shape filled with a pattern; returns its bounding box."""
        low, high = math.floor, math.ceil
        x0, y0 = (max(low(c - radius) - 1, 0) for c in centre)
        x1, y1 = (min(high(c + radius) + 1, self.side) for c in centre)
        ys, xs = np.mgrid[y0:y1, x0:x1].astype(np.float32)
        distance = inside(shape, xs - centre[0], ys - centre[1], radius)
        phase = tuple(rng.uniform(0, 2 * math.pi, 2))
        bright = texture(pattern, xs, ys, period, phase)
        paint = np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-10, 10, 3), 0, 255)
        cover = np.clip(distance + 0.5, 0, 1)[..., None]
        fill = (DARK + (1 - DARK) * bright)[..., None] * paint
        patch = self.image[y0:y1, x0:x1]
        self.image[y0:y1, x0:x1] = (cover * fill + (1 - cover) * patch + 0.5).astype(np.uint8)
        box = PixelBox(x0, y0, x1, y1)
        rows, columns = self._cells(box)
        cy = (np.arange(rows.start, min(rows.stop, len(self.maps["colour"]))) + 0.5) * MAP_SCALE
        cx = np.arange(columns.start, min(columns.stop, len(self.maps["colour"]))) + 0.5
        cx = cx * MAP_SCALE
        shown = inside(shape, cx[None] - centre[0], cy[:, None] - centre[1], radius) > 0
        for group, word in (("colour", colour), ("shape", shape), ("pattern", pattern)):
            self.maps[group][rows, columns][shown] = GROUPS[group].index(word)
        self.sizes["period"][rows, columns][shown] = period
        self.sizes["radius"][rows, columns][shown] = radius
        return box

    def plate(self, colour: str, box: PixelBox, rng: np.random.Generator) -> None:
        """Draw the board of a sign: a flat colour with a dark edge."""
        x0, y0, x1, y1 = box
        paint = np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-10, 10, 3), 0, 255)
        edge = max(2, round(0.03 * (x1 - x0)))
        self.image[y0:y1, x0:x1] = 25
        self.image[y0 + edge : y1 - edge, x0 + edge : x1 - edge] = paint.astype(np.uint8)
        self.mark(box, "colour", colour)
        self.mark(box, "shape", "sign")

    def text(
        self,
        text: str,
        centre: tuple[float, float],
        height: float,
        face: str,
        ink: tuple[int, ...],
    ) -> PixelBox:
        """Write a text around `centre`, digits `height` px high; returns its bounding box."""
        chosen = font(face, max(4, round(height / CAP_HEIGHT)))
        x, y = centre
        reach = round(height * (len(text) + 2))
        x0, y0 = max(round(x) - reach, 0), max(round(y) - reach, 0)
        x1, y1 = min(round(x) + reach, self.side), min(round(y) + reach, self.side)
        part = Image.fromarray(self.image[y0:y1, x0:x1])
        draw = ImageDraw.Draw(part)
        at = (x - x0, y - y0)
        draw.text(at, text, fill=ink, font=chosen, anchor="mm")
        self.image[y0:y1, x0:x1] = np.asarray(part)
        a, b, c, d = draw.textbbox(at, text, font=chosen, anchor="mm")
        return PixelBox(int(a) + x0, int(b) + y0, math.ceil(c) + x0, math.ceil(d) + y0)

    def glyph(
        self,
        glyph: str,
        centre: tuple[float, float],
        height: float,
        face: str,
        ink: tuple[int, ...],
    ) -> PixelBox:
        """Write one digit and note where it stands."""
        box = self.text(glyph, centre, height, face, ink)
        self.mark(box, "glyph", glyph)
        self.sizes["height"][self._cells(box)] = height
        return box

    def field(self, field: str, label: PixelBox, value: PixelBox, height: float) -> None:
        """Note that a label, in print `height` px high, and the value below it are of a field."""
        for part in (label, value):
            self.mark(part, "field", field)
            self.sizes["label"][self._cells(part)] = height
