"""Views with patch labels for stage 0: which word of each group a patch of a view shows."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

from sdrpn.boxes import PixelBox
from tools.tiny_trio.drawing import (
    COLOURS,
    FIELDS,
    FONTS,
    GLYPHS,
    GROUPS,
    MAP_SCALE,
    NONE,
    PATTERNS,
    SHAPES,
    Canvas,
    sign_ink,
    smooth_ground,
)
from tools.tiny_trio.scenes import GRID, KINDS, MAKERS, SIDE, VIEW, WHOLE, view_of, zoom_box

IGNORE = -100
VISION_POOL = 0
"""Second number of the seed of these views."""
READABLE = {
    "pattern": ("period", 3.4, 20.0),
    "glyph": ("height", 10.5, 30.0),
    "shape": ("radius", 8.0, 26.0),
    "field": ("label", 8.5, 26.0),
}
"""Smallest and largest size, in pixels of a view, at which training asks the tower to name it.

A patch in the middle of a large shape cannot tell which shape it is."""
SMALL_GLYPH = 7.0
"""Smallest digit in the last round."""
COVER, WHOLE_PATCH_GLYPH = 0.3, 14.0
"""Share of a patch that a word must cover to be asked for; in the last round less for a digit below
this height, which fills only part of a patch."""
SAMPLES = 5
"""Points along each side of a patch at which the maps are read."""


def patch_labels(canvas: Canvas, box: PixelBox, *, small: bool = False) -> np.ndarray:
    """Labels of the view of `box`: int16 (groups, 256).

    The index of a word, the number of words for none of them, or -100 where a patch is mixed or
    shows something too small for the view; where `small`, smaller digits are asked for.
    """
    points = GRID * SAMPLES

    def at(low: int, high: int) -> np.ndarray:
        along = low + (np.arange(points) + 0.5) / points * (high - low)
        return np.clip((along / MAP_SCALE).astype(int), 0, SIDE // MAP_SCALE - 1)

    rows, columns = at(box.y0, box.y1), at(box.x0, box.x1)
    scale = VIEW / max(box.x1 - box.x0, box.y1 - box.y0)

    def by_patch(values: np.ndarray) -> np.ndarray:
        seen = values[np.ix_(rows, columns)].reshape(GRID, SAMPLES, GRID, SAMPLES)
        return seen.transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)

    return np.stack([_group_labels(canvas, group, by_patch, scale, small) for group in GROUPS])


def _group_labels(canvas: Canvas, group: str, by_patch, scale: float, small: bool) -> np.ndarray:
    seen, count = by_patch(canvas.maps[group]), len(GROUPS[group])
    counts = np.stack([(seen == k).sum(1) for k in range(count)])
    best, cover = counts.argmax(0), counts.max(0) / SAMPLES**2
    anything = (seen != NONE).mean(1)
    size, smallest, largest = np.zeros(GRID**2), 0.0, 0.0
    if group in READABLE:
        name, smallest, largest = READABLE[group]
        size = by_patch(canvas.sizes[name]).max(1).astype(float) * scale
    needed = np.full(GRID**2, COVER)
    if small and group == "glyph":
        smallest = SMALL_GLYPH
        needed *= np.minimum(1, size / WHOLE_PATCH_GLYPH) ** 2
    shown = (cover >= needed) & (cover > 0)
    labels = np.where(shown, best, np.where(anything > 0, IGNORE, count))
    labels = np.where((size > 0) & ((size < smallest) | (size > largest)), IGNORE, labels)
    if group == "pattern":  # nothing is asked of patches without a pattern
        labels = np.where(labels == count, IGNORE, labels)
    return labels.astype(np.int16)


def dense_canvas(rng: np.random.Generator, signs: float) -> Canvas:
    """A canvas crowded with all that a view can show, at the size at which it shows it."""
    canvas = Canvas(smooth_ground(rng, SIDE))
    step = 56
    for row in range(SIDE // step):
        for column in range(SIDE // step):
            x = (column + 0.5) * step + rng.uniform(-8, 8)
            y = (row + 0.5) * step + rng.uniform(-8, 8)
            what = rng.random()
            colour = str(rng.choice(list(COLOURS)))
            if what < 0.9 - signs:
                shape, pattern = str(rng.choice(SHAPES[:-1])), str(rng.choice(PATTERNS))
                period = math.exp(rng.uniform(math.log(3.6), math.log(10)))
                canvas.shape(rng, shape, colour, pattern, (x, y), rng.uniform(11, 27), period)
            elif what < 0.9:
                wide, high = rng.uniform(14, 26, 2)
                canvas.plate(colour, _inside((x - wide, y - high, x + wide, y + high)), rng)
                height = rng.uniform(11, min(26, 2 * high - 6, 2.2 * wide - 6))
                face = rng.choice(FONTS)
                canvas.glyph(str(rng.choice(GLYPHS)), (x, y), height, str(face), sign_ink(colour))
    return canvas


def dense_page(rng: np.random.Generator) -> Canvas:
    """A page crowded with fields in print that a view can show."""
    canvas = Canvas(np.full((SIDE, SIDE, 3), rng.uniform(228, 252), np.uint8))
    for row in range(9):
        for column in range(6):
            x, y = 6 + 112 * column + rng.uniform(0, 30), 12 + 74 * row + rng.uniform(0, 14)
            ink, field = (int(rng.integers(0, 70)),) * 3, str(rng.choice(FIELDS))
            tall = rng.uniform(9, 20)
            label = canvas.text(field, (x + 2.1 * tall, y), tall, str(rng.choice(FONTS[:2])), ink)
            height = rng.uniform(11, 26)
            spot = (label.x0 + 6 + height / 2 + rng.uniform(0, 8), label.y1 + 5 + height / 2)
            value = canvas.glyph(str(rng.choice(GLYPHS)), spot, height, str(rng.choice(FONTS)), ink)
            canvas.field(field, label, value, tall)
    return canvas


def dense_digits(rng: np.random.Generator, paper: bool) -> Canvas:
    """A canvas full of digits, on paper or on coloured plates; few of them were not enough."""
    ground = np.full((SIDE, SIDE, 3), rng.uniform(228, 252), np.uint8)
    canvas = Canvas(ground if paper else smooth_ground(rng, SIDE))
    step = 34
    for row in range(SIDE // step):
        for column in range(SIDE // step):
            x = (column + 0.5) * step + rng.uniform(-4, 4)
            y = (row + 0.5) * step + rng.uniform(-4, 4)
            ink, height = (int(rng.integers(0, 70)),) * 3, rng.uniform(11, 26)
            if not paper:
                colour, (wide, high) = str(rng.choice(list(COLOURS))), rng.uniform(13, 17, 2)
                canvas.plate(colour, _inside((x - wide, y - high, x + wide, y + high)), rng)
                ink, height = sign_ink(colour), rng.uniform(11, 22)
            canvas.glyph(str(rng.choice(GLYPHS)), (x, y), height, str(rng.choice(FONTS)), ink)
    return canvas


def _inside(sides: tuple[float, ...]) -> PixelBox:
    return PixelBox(*(min(max(round(side), 0), SIDE) for side in sides))


def vision_views(
    seed: tuple[int, ...], count: int, kinds: Sequence[str] = KINDS, round_: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`count` views, uint8 (n, 224, 224, 3), and their labels, int16 (n, groups, 256).

    Most of them are cut from canvases that are crowded with what the kinds show; in the second
    round from smaller parts too and with sides that differ, as zooms are, in the third also from
    larger parts, so that digits are smaller.
    """
    rng = np.random.default_rng(seed)
    small = round_ >= 2
    smallest, largest = (170, 260) if round_ == 0 else (110, 400 if small else 260)
    views: list[np.ndarray] = []
    labels: list[np.ndarray] = []

    def add(canvas: Canvas, box: PixelBox) -> None:
        views.append(view_of(canvas.image, box))
        labels.append(patch_labels(canvas, box, small=small))

    def shapes() -> Canvas:
        return dense_canvas(rng, 0.0)

    crowded: dict[str, tuple[Callable[[], Canvas], ...]] = {
        "vstar": (shapes,),
        "vstar_shared": (shapes,),
        "vstar_relations": (shapes,),
        "textvqa": (lambda: dense_canvas(rng, 0.7), lambda: dense_digits(rng, False)),
        "docvqa": (lambda: dense_page(rng), lambda: dense_digits(rng, True)),
    }
    while len(views) < count:
        kind = str(rng.choice(list(kinds)))
        if rng.random() < 0.6:
            makers = crowded[kind]
            canvas = makers[int(rng.integers(len(makers)))]()
            for _ in range(8):
                sides = rng.uniform(smallest, largest, 2 if round_ else 1)
                wide, high = int(sides[0]), int(sides[-1])
                x, y = (int(rng.integers(0, SIDE - side)) for side in (wide, high))
                add(canvas, PixelBox(x, y, x + wide, y + high))
        else:
            scene = MAKERS[kind](rng, 0.3)
            add(scene.canvas, WHOLE)
            for index in rng.integers(0, len(scene.items), 2):
                add(scene.canvas, zoom_box(rng, scene.items[index], loose=small))
    return np.stack(views[:count]), np.stack(labels[:count])


def _chunk(
    job: tuple[tuple[int, ...], int, tuple[str, ...], int],
) -> tuple[np.ndarray, np.ndarray]:
    return vision_views(*job)


def vision_pool(
    seed: int, count: int, kinds: Sequence[str] = KINDS, round_: int = 0, workers: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """The views of one round of stage 0; the same seed always gives the same ones."""
    which = (round_,) if round_ else ()
    jobs = [
        ((seed, VISION_POOL, i, *which), min(100, count - i), tuple(kinds), round_)
        for i in range(0, count, 100)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        found = list(tqdm(executor.map(_chunk, jobs), "views", len(jobs)))
    return np.concatenate([v for v, _ in found]), np.concatenate([b for _, b in found])
