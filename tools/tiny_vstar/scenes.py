"""Scenes that a low-resolution look cannot fully read: patterned discs on a smooth ground.

A scene is a square picture of 448 px with 3 to 6 discs that do not touch, each in a colour of its
own and filled with one of six patterns. A pattern is *coarse* (its period survives the model's
112 px view) or *fine* (it does not, but a zoom on 3 x 3 of the 8 x 8 cells brings it back). The
size of a disc says nothing about its fineness. All patterns have the same mean brightness.
"""

from __future__ import annotations

import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from sdrpn.distill import probes
from sdrpn.distill.probes import COARSE_PERIOD, COLOURS, PATTERNS, PixelBox, disc_cover

SCENE_SIDE = probes.SIDE
VIEW_SIDE = 112
GRID = 8
CELL = SCENE_SIDE // GRID
WHOLE = PixelBox(0, 0, SCENE_SIDE, SCENE_SIDE)
FINE_PERIOD = (5.0, 6.2)
READABLE_PERIOD = 2.6
"""Shortest period, in pixels of a 112 px view, that training asks the vision tower to name."""
QUESTION = probes.QUESTION
RESPONSE = "{colour} {pattern}"


@dataclass(frozen=True)
class Disc(probes.Disc):
    """A disc of a scene: coarse or fine, with the answer that the tiny model is taught."""

    @property
    def fine(self) -> bool:
        """Whether the first look cannot show its pattern."""
        return self.period <= FINE_PERIOD[1]

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


def make_scene(rng: np.random.Generator, fine_share: float = 0.4) -> Scene:
    """Draw one scene; each disc is fine with probability `fine_share`."""

    def period(rng: np.random.Generator) -> float:
        return float(rng.uniform(*(FINE_PERIOD if rng.random() < fine_share else COARSE_PERIOD)))

    canvas, drawn = probes.draw(rng, period)
    return Scene(canvas, full_view(canvas), tuple(Disc(**vars(disc)) for disc in drawn))


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


def oracle_box(centre: tuple[float, float]) -> PixelBox:
    """3 x 3 cells around a disc's centre, moved so that they lie inside the scene."""
    side = 3 * CELL
    x0, y0 = (round(min(max(c - side / 2, 0), SCENE_SIDE - side)) for c in centre)
    return PixelBox(x0, y0, x0 + side, y0 + side)


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
            return PixelBox(x0, y0, x1, y1)


def patch_covers(discs: tuple[Disc, ...], box: PixelBox) -> np.ndarray:
    """The share of each patch of the view of `box` that each disc covers: (discs, 8, 8)."""
    return np.stack([disc_cover(disc, box, GRID, GRID) for disc in discs])


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
