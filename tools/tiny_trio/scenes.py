"""Scenes of three kinds, each with questions that a low-resolution look cannot all answer.

- `vstar`: patterned shapes among distractors that share the shape of the asked one, asked by both
  colour and shape. In `vstar_shared` colours recur as well; `vstar_relations` also asks by a
  neighbour ("the shape left of the red square"), which no model here has learned
  (docs/tiny_trio.md).
- `textvqa`: signs with a number, among shapes that share their colours.
- `docvqa`: a page of labelled fields with a number each, among small print.

A question is *coarse* (the model's 224 px view shows the answer) or *fine* (it does not, but a zoom
does). The size of a shape, sign or label says nothing about which of the two it is.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn.distill.probes import COLOURS, PATTERNS
from tools.tiny_trio.drawing import FIELDS, FONTS, GLYPHS, SHAPES, Canvas, sign_ink, smooth_ground

SIDE, VIEW, GRID = 672, 224, 16
CELL = SIDE // GRID
WHOLE = PixelBox(0, 0, SIDE, SIDE)
KINDS = ("vstar", "textvqa", "docvqa")
FIRST_KINDS = ("vstar_shared", "textvqa", "docvqa")
"""What training starts with."""
FINE_PERIOD, COARSE_PERIOD = (4.2, 5.0), (11.5, 14.0)
FINE_HEIGHT, COARSE_HEIGHT = (11.0, 13.5), (36.0, 48.0)
RADIUS = (36.0, 58.0)
ASK_SHAPE = "what pattern is on the {colour} {shape} ?"
ASK_NEIGHBOUR = "what pattern is on the shape {side} of the {colour} {shape} ?"
ASK_SIGN = "what number is on the {colour} sign ?"
ASK_FIELD = "what number is the {field} ?"
FILLER = ("lorem", "ipsum", "dolor", "sit", "amet", "elit", "magna", "aliqua", "minim", "quis")
Place = tuple[float, float, float]
"""Centre and radius."""


@dataclass(frozen=True)
class Item:
    """A question about a scene. `box` is where to look, `spot` the middle of what answers it."""

    kind: str
    fine: bool
    question: str
    name: str
    answer: str
    box: PixelBox
    spot: tuple[float, float]
    relation: bool = False

    @property
    def key(self) -> str:
        """The last word of the name, which alone tells what is asked about."""
        return self.name.split()[-1]

    @property
    def response(self) -> str:
        """What the model is taught to say in the end."""
        return f"{self.key} {self.answer}"

    @property
    def long_response(self) -> str:
        """What it is taught to say at first: the whole name."""
        return f"{self.name} {self.answer}"

    @property
    def category(self) -> str:
        """`fine` or `coarse`."""
        return "fine" if self.fine else "coarse"


@dataclass(frozen=True)
class Scene:
    """A canvas and the questions about it."""

    canvas: Canvas
    items: tuple[Item, ...]

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 (672, 672, 3)."""
        return self.canvas.image


def places(
    rng: np.random.Generator, count: int, radius: tuple[float, float], taken: list[Place], gap: int
) -> list[Place]:
    """Up to `count` places that keep `gap` px from one another and from those taken."""
    found: list[Place] = []
    for _ in range(60 * count):
        if len(found) == count:
            break
        r = rng.uniform(*radius)
        x, y = rng.uniform(r + 6, SIDE - r - 6, 2)
        if all(np.hypot(x - a, y - b) > r + c + gap for a, b, c in [*taken, *found]):
            found.append((float(x), float(y), float(r)))
    return found


def vstar_scene(
    rng: np.random.Generator, fine_share: float, *, shared: bool = False, relations: bool = False
) -> Scene:
    """5 to 7 shapes of different colours; shapes recur. Two stand side by side.

    Where `shared`, colours recur too, but no two share both, so that it takes both to tell them.
    With `relations`, those two are also asked about by one another.
    """
    canvas = Canvas(smooth_ground(rng, SIDE))
    if shared:
        colours = rng.choice(list(COLOURS), 4, replace=False)
        pairs = [(str(c), s) for c in colours for s in SHAPES[:-1]]
    else:
        pairs = [(colour, str(rng.choice(SHAPES[:-1]))) for colour in COLOURS]
    r, q = rng.uniform(*RADIUS, 2)
    x, y = rng.uniform(r + 6, SIDE - 2 * r - 2 * q - 50), rng.uniform(70, SIDE - 70)
    beside = (x + r + q + rng.uniform(12, 36), y + rng.uniform(-16, 16), q)
    pair: list[Place] = [(float(x), float(y), float(r)), tuple(map(float, beside))]  # type: ignore[list-item]
    spots = [*pair, *places(rng, int(rng.integers(3, 6)), RADIUS, pair, 46)]
    chosen = rng.choice(len(pairs), len(spots), replace=False)
    items, names = [], []
    for number, (x, y, r) in enumerate(spots):
        (colour, shape), fine = pairs[chosen[number]], bool(rng.random() < fine_share)
        pattern = str(rng.choice(PATTERNS))
        period = float(rng.uniform(*(FINE_PERIOD if fine else COARSE_PERIOD)))
        box = canvas.shape(rng, shape, colour, pattern, (x, y), r, period)
        names.append((colour, shape))
        question = ASK_SHAPE.format(colour=colour, shape=shape)
        items.append(Item("vstar", fine, question, f"{shape} {colour}", pattern, box, (x, y)))
    for one, other, side in ((0, 1, "left"), (1, 0, "right")) if relations else ():
        colour, shape = names[other]
        question = ASK_NEIGHBOUR.format(side=side, colour=colour, shape=shape)
        a = items[one]
        items.append(
            Item("vstar", a.fine, question, a.name, a.answer, a.box, a.spot, relation=True)
        )
    return Scene(canvas, tuple(items))


def _height(rng: np.random.Generator, fine: bool) -> float:
    return float(rng.uniform(*(FINE_HEIGHT if fine else COARSE_HEIGHT)))


def textvqa_scene(rng: np.random.Generator, fine_share: float) -> Scene:
    """3 to 5 signs with a digit each, no two of one colour, among 3 patterned shapes."""
    canvas = Canvas(smooth_ground(rng, SIDE))
    colours = [str(c) for c in rng.permutation(list(COLOURS))]
    signs = places(rng, int(rng.integers(3, 6)), (58.0, 74.0), [], 8)
    for x, y, r in places(rng, 3, (26.0, 50.0), signs, 6):
        shape, colour = str(rng.choice(SHAPES[:-1])), str(rng.choice(colours[: len(signs)]))
        period = float(rng.uniform(*(FINE_PERIOD if rng.random() < 0.5 else COARSE_PERIOD)))
        canvas.shape(rng, shape, colour, str(rng.choice(PATTERNS)), (x, y), r, period)
    items = []
    for colour, (x, y, r) in zip(colours, signs, strict=False):
        wide, high = 0.72 * r * rng.uniform(0.85, 1.1, 2)
        box = PixelBox(round(x - wide), round(y - high), round(x + wide), round(y + high))
        canvas.plate(colour, box, rng)
        fine, glyph = bool(rng.random() < fine_share), str(rng.choice(GLYPHS))
        spot = (x + rng.uniform(-6, 6), y + rng.uniform(-6, 6))
        canvas.glyph(glyph, spot, _height(rng, fine), str(rng.choice(FONTS)), sign_ink(colour))
        question = ASK_SIGN.format(colour=colour)
        items.append(Item("textvqa", fine, question, f"sign {colour}", glyph, box, spot))
    return Scene(canvas, tuple(items))


def _paper(rng: np.random.Generator) -> np.ndarray:
    tint = rng.uniform(228, 252) + rng.uniform(-6, 4, 3)
    paper = np.broadcast_to(tint, (SIDE, SIDE, 3)) + rng.normal(0, 2, (SIDE, SIDE, 1))
    return np.clip(paper, 0, 255).astype(np.uint8)


def _field(
    canvas: Canvas, rng: np.random.Generator, field: str, corner: tuple[float, float], fine: bool
) -> Item:
    """A label in large print with its number below, left-aligned."""
    x, y = corner
    face = str(rng.choice(FONTS[:2]))
    tall = rng.uniform(32, 39)
    ink = (int(rng.integers(0, 70)),) * 3
    glyph, height = str(rng.choice(GLYPHS)), _height(rng, fine)
    label = canvas.text(field, (x + 2.1 * tall, y + tall / 2), tall, face, ink)
    spot = (label.x0 + 10 + height / 2 + rng.uniform(0, 20), label.y1 + 8 + height / 2)
    value = canvas.glyph(glyph, spot, height, str(rng.choice(FONTS)), ink)
    x0, x1 = min(label.x0, value.x0), max(label.x1, value.x1)
    box = PixelBox(x0, label.y0, x1, value.y1)
    canvas.field(field, label, value, tall)
    question = ASK_FIELD.format(field=field)
    return Item("docvqa", fine, question, field, glyph, box, spot)


def docvqa_scene(rng: np.random.Generator, fine_share: float) -> Scene:
    """A page of 4 to 6 labelled fields on 3 x 4 places; small print fills some of the others."""
    canvas = Canvas(_paper(rng))
    slots = [(column, row) for column in range(3) for row in range(4)]
    order = [slots[i] for i in rng.permutation(len(slots))]
    fields = [str(f) for f in rng.permutation(FIELDS)][: int(rng.integers(4, 7))]
    items = []
    for number, (column, row) in enumerate(order):
        x = 24 + 212 * column + rng.uniform(0, 50)
        y = 26 + 160 * row + rng.uniform(0, 30)
        if number < len(fields):
            fine = bool(rng.random() < fine_share)
            items.append(_field(canvas, rng, fields[number], (x, y), fine))
        elif rng.random() < 0.6:
            for line in range(int(rng.integers(2, 6))):
                words = " ".join(rng.choice(FILLER, 3))
                grey = (int(rng.integers(60, 150)),) * 3
                canvas.text(words[:18], (x + 70, y + 18 * line), 9, "DejaVuSans", grey)
    return Scene(canvas, tuple(items))


MAKERS: dict[str, Callable[[np.random.Generator, float], Scene]] = {
    "vstar": vstar_scene,
    "textvqa": textvqa_scene,
    "docvqa": docvqa_scene,
    "vstar_shared": functools.partial(vstar_scene, shared=True),
    "vstar_relations": functools.partial(vstar_scene, shared=True, relations=True),
}


def view_of(image: np.ndarray, box: PixelBox) -> np.ndarray:
    """A box of the picture as the model sees it: uint8 (224, 224, 3).

    The whole picture is resized bicubically, as the first look is; a crop bilinearly.
    """
    how = Image.Resampling.BICUBIC if box == WHOLE else Image.Resampling.BILINEAR
    x0, y0, x1, y1 = box
    crop = Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1]))
    return np.asarray(crop.resize((VIEW, VIEW), how))


def webp_bytes(image: np.ndarray, quality: int) -> bytes:
    """The picture as a lossy WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


ZOOM_CELLS = {2: 0.1, 3: 0.3, 4: 0.3, 5: 0.2, 6: 0.1}
LOOSE_ZOOM_CELLS = {2: 0.1, 3: 0.15, 4: 0.2, 5: 0.2, 6: 0.15, 7: 0.1, 8: 0.1}
"""How often a zoom is so many cells wide or high, and how often in the last rounds."""


def _span(
    rng: np.random.Generator, low: float, high: float, spot: float, sizes: Mapping[int, float]
) -> tuple[int, int]:
    """One side of a zoom: round the thing, give or take a cell, or some cells at the spot."""
    if rng.random() < 0.5:
        start = int((low + rng.uniform(-0.3, 0.9) * CELL) // CELL)
        stop = int(np.ceil((high + rng.uniform(-0.9, 0.3) * CELL) / CELL))
    else:
        cells = int(rng.choice(list(sizes), p=list(sizes.values())))
        start = int(spot // CELL) - int(rng.integers(0, cells))
        stop = start + cells
    start = min(start, int((spot - 8) // CELL))
    stop = max(stop, int((spot + 8) // CELL) + 1, start + 2)
    shift = max(0, -start) - max(0, stop - GRID)
    return (start + shift) * CELL, (stop + shift) * CELL


def zoom_box(rng: np.random.Generator, item: Item, *, loose: bool = False) -> PixelBox:
    """A box of whole cells such as a proposer could give; it holds what answers the question."""
    sizes = LOOSE_ZOOM_CELLS if loose else ZOOM_CELLS
    while True:
        x0, x1 = _span(rng, item.box[0], item.box[2], item.spot[0], sizes)
        y0, y1 = _span(rng, item.box[1], item.box[3], item.spot[1], sizes)
        if 0.4 <= (x1 - x0) / (y1 - y0) <= 2.5 and min(x0, y0) >= 0 and max(x1, y1) <= SIDE:
            return PixelBox(x0, y0, x1, y1)


def oracle_box(item_box: tuple[int, int, int, int]) -> PixelBox:
    """The smallest box of whole cells round the thing, at least 3 cells wide and high."""

    def side(low: float, high: float) -> tuple[int, int]:
        start, stop = int(low // CELL), int(np.ceil(high / CELL))
        while stop - start < 3:
            start, stop = start - (stop - start) % 2, stop + 1 - (stop - start) % 2
        shift = max(0, -start) - max(0, stop - GRID)
        return (start + shift) * CELL, (stop + shift) * CELL

    (x0, x1), (y0, y1) = side(item_box[0], item_box[2]), side(item_box[1], item_box[3])
    return PixelBox(x0, y0, x1, y1)
