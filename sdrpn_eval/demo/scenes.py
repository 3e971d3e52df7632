"""Scenes that a low-resolution look cannot fully read: patterned discs on a smooth ground.

A scene is a square picture of 448 px with 3 to 6 discs that do not touch, each in a colour of its
own and filled with one of six patterns. A pattern is *coarse* (its period survives the model's
112 px view) or *fine* (it does not, but a zoom on 3 x 3 of the 8 x 8 cells brings it back). The
size of a disc says nothing about its fineness. All patterns have the same mean brightness.
"""

from __future__ import annotations

import io
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

SCENE_SIDE = 448
VIEW_SIDE = 112
GRID = 8
CELL = SCENE_SIDE // GRID
WHOLE = (0, 0, SCENE_SIDE, SCENE_SIDE)

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
RADIUS = (22.0, 49.0)
COARSE_PERIOD = (15.0, 18.0)
FINE_PERIOD = (5.0, 6.2)
DARK = 0.35
READABLE_PERIOD = 2.6
"""Shortest period, in pixels of a 112 px view, that training asks the vision tower to name."""

QUESTION = "what pattern is on the {colour} disc ?"
RESPONSE = "{colour} {pattern}"
PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class Disc:
    """One disc; centre and radius in scene pixels, period of its pattern in scene pixels."""

    colour: str
    pattern: str
    fine: bool
    centre: tuple[float, float]
    radius: float
    period: float

    @property
    def box(self) -> PixelBox:
        """The disc's bounding box, half-open (x0, y0, x1, y1) in scene pixels."""
        (x, y), r = self.centre, self.radius
        low, high = math.floor, math.ceil
        return low(x - r), low(y - r), high(x + r) + 1, high(y + r) + 1

    @property
    def question(self) -> str:
        """The question that asks for this disc's pattern."""
        return QUESTION.format(colour=self.colour)

    @property
    def response(self) -> str:
        """The whole right answer, colour first."""
        return RESPONSE.format(colour=self.colour, pattern=self.pattern)


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 (448, 448, 3), its full view, and the discs drawn on it."""

    image: np.ndarray
    view: np.ndarray
    discs: tuple[Disc, ...]


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A smooth ground of 7 x 7 subdued colours, float32 (448, 448, 3)."""
    knots = rng.uniform(40, 215, (7, 7, 3))
    knots = 0.45 * knots + 0.55 * knots.mean(axis=2, keepdims=True)
    small = Image.fromarray(knots.astype(np.uint8))
    return np.asarray(small.resize((SCENE_SIDE, SCENE_SIDE), Image.Resampling.BICUBIC))


def _wave(position: np.ndarray, period: float, phase: float) -> np.ndarray:
    return np.sin(2 * math.pi * position / period + phase)


def _texture(
    pattern: str, x: np.ndarray, y: np.ndarray, period: float, phase: tuple[float, float]
) -> np.ndarray:
    """Brightness in [0, 1], mean about a half, of `pattern` at the pixel positions x and y."""
    along, across, half = (x + y) / math.sqrt(2), (x - y) / math.sqrt(2), math.sqrt(2)
    if pattern == "level":
        wave = _wave(y, period, phase[0])
    elif pattern == "upright":
        wave = _wave(x, period, phase[0])
    elif pattern == "rising":
        wave = _wave(along, period, phase[0])
    elif pattern == "falling":
        wave = _wave(across, period, phase[0])
    elif pattern == "checked":  # its diagonal waves have the period that the stripes have
        wave = 1.6 * _wave(x, period * half, phase[0]) * _wave(y, period * half, phase[1])
    elif pattern == "dotted":  # round dots of half the area
        shift = period / (2 * math.pi)
        from_dot = [
            (p + a * shift) % period - period / 2 for p, a in ((x, phase[0]), (y, phase[1]))
        ]
        return np.clip(0.4 * period - np.hypot(*from_dot) + 0.5, 0, 1)
    else:
        raise ValueError(f"unknown pattern {pattern!r}; use one of {', '.join(PATTERNS)}")
    return 0.5 + 0.5 * np.clip(2.0 * wave, -1, 1)


def _paint(canvas: np.ndarray, disc: Disc, rng: np.random.Generator) -> None:
    """Draw `disc` on `canvas`, uint8 (448, 448, 3), in place."""
    x0, y0, x1, y1 = disc.box
    ys, xs = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    phase = tuple(rng.uniform(0, 2 * math.pi, 2))
    bright = _texture(disc.pattern, xs, ys, disc.period, phase)
    colour = np.asarray(COLOURS[disc.colour]) + rng.uniform(-10, 10, 3)
    fill = (DARK + (1 - DARK) * bright)[..., None] * np.clip(colour, 0, 255)
    distance = np.hypot(xs - disc.centre[0], ys - disc.centre[1])
    cover = np.clip(disc.radius + 0.5 - distance, 0, 1)[..., None]
    patch = canvas[y0:y1, x0:x1]
    canvas[y0:y1, x0:x1] = (cover * fill + (1 - cover) * patch + 0.5).astype(np.uint8)


def _place(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and radii of `count` discs (or as many as found room) that do not touch."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(60 * count):
        if len(placed) == count:
            break
        r = rng.uniform(*RADIUS)
        x, y = rng.uniform(r + 3, SCENE_SIDE - r - 3, 2)
        if all(math.hypot(x - a, y - b) > r + c + 5 for a, b, c in placed):
            placed.append((float(x), float(y), float(r)))
    return placed


def make_scene(rng: np.random.Generator, fine_share: float = 0.4) -> Scene:
    """Draw one scene; each disc is fine with probability `fine_share`."""
    places = _place(rng, int(rng.integers(3, 7)))
    colours = rng.permutation(list(COLOURS))
    canvas = _ground(rng).copy()
    discs = []
    for colour, (x, y, r) in zip(colours, places, strict=False):
        fine = bool(rng.random() < fine_share)
        period = float(rng.uniform(*(FINE_PERIOD if fine else COARSE_PERIOD)))
        disc = Disc(str(colour), str(rng.choice(PATTERNS)), fine, (x, y), r, period)
        _paint(canvas, disc, rng)
        discs.append(disc)
    return Scene(canvas, full_view(canvas), tuple(discs))


def webp_bytes(image: np.ndarray, quality: int) -> bytes:
    """The picture as a lossy WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def through_webp(scene: Scene, quality: int) -> Scene:
    """The scene as it looks after being stored as lossy WebP."""
    stored = Image.open(io.BytesIO(webp_bytes(scene.image, quality)))
    image = np.asarray(stored.convert("RGB"))
    return Scene(image, full_view(image), scene.discs)


def _pool_chunk(job: tuple[tuple[int, ...], int, float, float, int]) -> list[Scene]:
    seed, count, fine_share, webp_share, quality = job
    rng = np.random.default_rng(seed)
    scenes = [make_scene(rng, fine_share) for _ in range(count)]
    return [through_webp(s, quality) if rng.random() < webp_share else s for s in scenes]


def make_pool(
    seed: tuple[int, ...],
    count: int,
    *,
    fine_share: float = 0.4,
    webp_share: float = 0.0,
    quality: int = 90,
    workers: int = 2,
) -> list[Scene]:
    """Draw `count` scenes in `workers` processes; the same seed gives the same scenes always.

    `webp_share` of them went through a lossy WebP file of `quality`, like the benchmark's.
    """
    sizes = [min(100, count - start) for start in range(0, count, 100)]
    jobs = [((*seed, i), n, fine_share, webp_share, quality) for i, n in enumerate(sizes)]
    context = multiprocessing.get_context("spawn")
    scenes: list[Scene] = []
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        for chunk in tqdm(executor.map(_pool_chunk, jobs), "scenes", len(jobs), leave=False):
            scenes.extend(chunk)
    return scenes


def full_view(image: np.ndarray) -> np.ndarray:
    """The picture as the model sees it first: uint8 (112, 112, 3), bicubic, antialiased."""
    small = Image.fromarray(image).resize((VIEW_SIDE, VIEW_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(small)


def zoomed_view(image: np.ndarray, box: PixelBox) -> np.ndarray:
    """The box of the picture, stretched to the view: uint8 (112, 112, 3), bilinear, antialiased."""
    x0, y0, x1, y1 = box
    crop = Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1]))
    return np.asarray(crop.resize((VIEW_SIDE, VIEW_SIDE), Image.Resampling.BILINEAR))


def oracle_box(disc: Disc, side: int = 168) -> PixelBox:
    """A square of `side` px centred on the disc, moved so that it lies inside the scene."""
    x0, y0 = (round(min(max(c - side / 2, 0), SCENE_SIDE - side)) for c in disc.centre)
    return x0, y0, x0 + side, y0 + side


def _span(rng: np.random.Generator, centre: float) -> tuple[int, int]:
    """One side of a zoom box round `centre`: whole cells half of the time, any pixels otherwise."""
    if rng.random() < 0.5:
        cells = int(rng.choice([2, 3, 4, 5], p=[0.25, 0.45, 0.22, 0.08]))
        start = int(centre // CELL) - int(rng.integers(0, cells))
        start = min(max(start, 0), GRID - cells)
        return start * CELL, (start + cells) * CELL
    side = rng.uniform(110, 260)
    start = centre - side / 2 + rng.uniform(-0.4, 0.4) * side
    start = round(min(max(start, 0), SCENE_SIDE - side))
    return start, start + round(side)


def random_zoom_box(rng: np.random.Generator, disc: Disc) -> PixelBox:
    """A box such as a proposer could give: it holds the disc's centre, and may cut the disc."""
    while True:
        (x0, x1), (y0, y1) = _span(rng, disc.centre[0]), _span(rng, disc.centre[1])
        if 0.5 <= (x1 - x0) / (y1 - y0) <= 2:
            return x0, y0, x1, y1


def patch_covers(discs: tuple[Disc, ...], box: PixelBox) -> np.ndarray:
    """The share of each patch of the view of `box` that each disc covers: (discs, 8, 8)."""
    x0, y0, x1, y1 = box
    steps = (np.arange(4 * GRID) + 0.5) / (4 * GRID)
    xs, ys = x0 + steps * (x1 - x0), y0 + steps * (y1 - y0)
    covers = np.zeros((len(discs), GRID, GRID))
    for i, disc in enumerate(discs):
        inside = np.hypot(xs[None] - disc.centre[0], ys[:, None] - disc.centre[1]) < disc.radius
        covers[i] = inside.reshape(GRID, 4, GRID, 4).mean(axis=(1, 3))
    return covers


def patch_labels(discs: tuple[Disc, ...], box: PixelBox) -> tuple[np.ndarray, np.ndarray]:
    """What each of the 8 x 8 patches of the view of `box` shows.

    Returns colours and patterns, int64 (64,): an index into COLOURS (8 is the ground) and into
    PATTERNS, -100 where the patch is mixed or, for patterns, where the view cannot show the period.
    """
    covers = patch_covers(discs, box)
    best, cover = covers.argmax(axis=0).ravel(), covers.max(axis=0).ravel()
    names = list(COLOURS)
    colour_of = np.array([names.index(d.colour) for d in discs])
    scale = VIEW_SIDE / max(box[2] - box[0], box[3] - box[1])
    pattern_of = np.array(
        [PATTERNS.index(d.pattern) if d.period * scale >= READABLE_PERIOD else -100 for d in discs]
    )
    colours = np.where(cover > 0.3, colour_of[best], np.where(cover < 0.05, len(names), -100))
    return colours, np.where(cover > 0.4, pattern_of[best], -100)
