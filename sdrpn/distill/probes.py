"""Synthetic probe pictures for `sdrpn heads`: patterned discs with known boxes.

A probe is a square picture of 3 to 6 disjoint discs on a smooth background. Each has its own colour
and one of six patterns of equal mean brightness. A question asks for the pattern of one disc, so
the model must look at that disc. The scenes of the embedded tiny model use the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdrpn.boxes import PixelBox

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 170, 50),
    "blue": (50, 90, 240),
    "yellow": (240, 225, 45),
    "purple": (150, 50, 190),
    "orange": (245, 140, 25),
    "cyan": (40, 210, 220),
    "pink": (250, 140, 195),
}
PATTERNS = ("level", "upright", "rising", "falling", "checked", "dotted")
SIDE = 448
"""Default side of a picture, in pixels; the sizes below are for this side and scale with it."""
RADIUS = (22.0, 49.0)
COARSE_PERIOD = (15.0, 18.0)
DARK = 0.35
QUESTION = "what pattern is on the {colour} disc ?"
STREAM = 0x5D12
"""Third component of the seed, which separates probes from the scenes of the tiny model."""


@dataclass(frozen=True)
class Disc:
    """A disc; centre, radius and the period of its pattern are in pixels of the picture."""

    colour: str
    pattern: str
    centre: tuple[float, float]
    radius: float
    period: float

    @property
    def box(self) -> PixelBox:
        """The disc's bounding box, half-open (x0, y0, x1, y1) in pixels."""
        (x, y), r = self.centre, self.radius
        low, high = math.floor, math.ceil
        return PixelBox(low(x - r), low(y - r), high(x + r) + 1, high(y + r) + 1)

    @property
    def question(self) -> str:
        """The question that asks for this disc's pattern."""
        return QUESTION.format(colour=self.colour)


@dataclass(frozen=True)
class Probe:
    """A picture and the discs drawn on it."""

    image: Image.Image
    discs: tuple[Disc, ...]


def draw_probes(seed: int, count: int, side: int = SIDE) -> list[Probe]:
    """Draw probe pictures with coarse patterns.

    Args:
        seed: Seed of the pictures; a longer list extends a shorter one with the same seed.
        count: Number of pictures.
        side: Side of a picture, in pixels.

    Raises:
        ValueError: If the side is below 112 px, where patterns cannot be resolved.
    """
    if side < 112:
        raise ValueError(f"side of the probe pictures must be 112 px or more, got {side}")
    low, high = (p * side / SIDE for p in COARSE_PERIOD)
    rngs = [np.random.default_rng((seed, i, STREAM)) for i in range(count)]
    drawn = [draw(rng, lambda rng: float(rng.uniform(low, high)), side) for rng in rngs]
    return [Probe(Image.fromarray(canvas), discs) for canvas, discs in drawn]


def draw(
    rng: np.random.Generator, period: Callable[[np.random.Generator], float], side: int = SIDE
) -> tuple[np.ndarray, tuple[Disc, ...]]:
    """Draw one picture.

    Args:
        rng: Source of randomness.
        period: Draws the period of a disc's pattern, in pixels.
        side: Side of the picture, in pixels.

    Returns:
        (uint8 [side, side, 3], the discs on it).
    """
    places = _place(rng, int(rng.integers(3, 7)), side)
    colours = rng.permutation(list(COLOURS))
    canvas = _ground(rng, side).copy()
    discs = []
    for colour, (x, y, r) in zip(colours, places, strict=False):
        length = period(rng)
        disc = Disc(str(colour), str(rng.choice(PATTERNS)), (x, y), r, length)
        _paint(canvas, disc, rng)
        discs.append(disc)
    return canvas, tuple(discs)


Extent = tuple[float, float, float, float]
"""Position of a grid on a picture: (x0, y0, x1, y1) in its pixels."""


def disc_cover(disc: Disc, extent: Extent, rows: int, columns: int) -> np.ndarray:
    """Return the share of each grid cell that the disc covers: [rows, columns]."""
    x0, y0, x1, y1 = extent
    xs = x0 + (np.arange(4 * columns) + 0.5) / (4 * columns) * (x1 - x0)
    ys = y0 + (np.arange(4 * rows) + 0.5) / (4 * rows) * (y1 - y0)
    inside = np.hypot(xs[None] - disc.centre[0], ys[:, None] - disc.centre[1]) < disc.radius
    return inside.reshape(rows, 4, columns, 4).mean(axis=(1, 3))


def box_cover(box: PixelBox, extent: Extent, rows: int, columns: int) -> np.ndarray:
    """Return the share of each grid cell that a box covers: [rows, columns]."""

    def shares(low: float, high: float, start: float, end: float, cells: int) -> np.ndarray:
        edges = start + np.arange(cells + 1) * (end - start) / cells
        inside = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
        return np.clip(inside, 0, None) * cells / (end - start)

    x0, y0, x1, y1 = extent
    return np.outer(shares(box[1], box[3], y0, y1, rows), shares(box[0], box[2], x0, x1, columns))


def _place(rng: np.random.Generator, count: int, side: int) -> list[tuple[float, float, float]]:
    """Place up to `count` disjoint discs: (x, y, radius)."""
    scale = side / SIDE
    placed: list[tuple[float, float, float]] = []
    for _ in range(60 * count):
        if len(placed) == count:
            break
        r = rng.uniform(RADIUS[0] * scale, RADIUS[1] * scale)
        x, y = rng.uniform(r + 3, side - r - 3, 2)
        if all(math.hypot(x - a, y - b) > r + c + 5 for a, b, c in placed):
            placed.append((float(x), float(y), float(r)))
    return placed


def _ground(rng: np.random.Generator, side: int) -> np.ndarray:
    """A smooth background of 7 x 7 muted colours, uint8 [side, side, 3]."""
    knots = rng.uniform(40, 215, (7, 7, 3))
    knots = 0.45 * knots + 0.55 * knots.mean(axis=2, keepdims=True)
    small = Image.fromarray(knots.astype(np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def _paint(canvas: np.ndarray, disc: Disc, rng: np.random.Generator) -> None:
    """Draw `disc` on `canvas`, uint8 [side, side, 3], in place."""
    x0, y0, x1, y1 = disc.box
    ys, xs = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    phase = tuple(rng.uniform(0, 2 * math.pi, 2))
    bright = texture(disc.pattern, xs, ys, disc.period, phase)
    colour = np.asarray(COLOURS[disc.colour]) + rng.uniform(-10, 10, 3)
    fill = (DARK + (1 - DARK) * bright)[..., None] * np.clip(colour, 0, 255)
    distance = np.hypot(xs - disc.centre[0], ys - disc.centre[1])
    cover = np.clip(disc.radius + 0.5 - distance, 0, 1)[..., None]
    patch = canvas[y0:y1, x0:x1]
    canvas[y0:y1, x0:x1] = (cover * fill + (1 - cover) * patch + 0.5).astype(np.uint8)


def texture(
    pattern: str, x: np.ndarray, y: np.ndarray, period: float, phase: tuple[float, float]
) -> np.ndarray:
    """Return the brightness of a pattern in [0, 1], with a mean of about 0.5.

    Args:
        pattern: One of `PATTERNS`.
        x: Horizontal pixel positions.
        y: Vertical pixel positions.
        period: Period of the pattern, in pixels.
        phase: Phase in x and y, in radians.

    Raises:
        ValueError: If the pattern is unknown.
    """
    along, across, half = (x + y) / math.sqrt(2), (x - y) / math.sqrt(2), math.sqrt(2)
    if pattern == "level":
        wave = _wave(y, period, phase[0])
    elif pattern == "upright":
        wave = _wave(x, period, phase[0])
    elif pattern == "rising":
        wave = _wave(along, period, phase[0])
    elif pattern == "falling":
        wave = _wave(across, period, phase[0])
    elif pattern == "checked":  # its diagonals have the period of the stripes
        wave = 1.6 * _wave(x, period * half, phase[0]) * _wave(y, period * half, phase[1])
    elif pattern == "dotted":  # round dots that cover half of the area
        shift = period / (2 * math.pi)
        from_dot = [
            (p + a * shift) % period - period / 2 for p, a in ((x, phase[0]), (y, phase[1]))
        ]
        return np.clip(0.4 * period - np.hypot(*from_dot) + 0.5, 0, 1)
    else:
        raise ValueError(f"unknown pattern {pattern!r}; use one of {', '.join(PATTERNS)}")
    return 0.5 + 0.5 * np.clip(2.0 * wave, -1, 1)


def _wave(position: np.ndarray, period: float, phase: float) -> np.ndarray:
    return np.sin(2 * math.pi * position / period + phase)
