"""Draw questions with the RoI map, boxes, crops and answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn.io.atomic import atomic_write
from sdrpn.io.extras import needs

BOX_COLOUR = "#ff2fd0"
TRUE_COLOUR = "#2fe05a"


@dataclass(frozen=True)
class Card:
    """One question to draw.

    Args:
        image: The image.
        question: Text of the question.
        answers: Answers by the name of the model or setting.
        regions: Boxes in source pixels; the first one is also drawn as a crop.
        extent: Position of the maps on the image, (x0, y0, x1, y1) in source pixels, see
            `ImageGrid.extent`.
        roi_map: [rows, columns] in [0, 1], or None.
        truth: Ground-truth box in source pixels, or None.
        note: Text below the answers.
        second_map: Another map, drawn on a copy of the image instead of the crop.
    """

    image: Image.Image
    question: str
    answers: Mapping[str, str]
    regions: Sequence[PixelBox]
    extent: tuple[float, ...]
    roi_map: np.ndarray | None = None
    truth: PixelBox | None = None
    note: str = ""
    second_map: np.ndarray | None = None


def sheet(cards: Sequence[Card], out: Path | str, columns: int = 1) -> Path:
    """Draw cards as one picture: image with map and boxes, crop, and answers.

    Args:
        cards: Questions to draw.
        out: File to write; its suffix sets the format.
        columns: Cards side by side.

    Returns:
        The path of the file.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """
    needs("matplotlib", extra="plot", what=f"drawing {out}")
    from matplotlib.figure import Figure

    rows = -(-len(cards) // columns)
    figure = Figure(figsize=(7.2 * columns, 3.0 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, 3 * columns, squeeze=False, width_ratios=[1, 1, 1.1] * columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, card in enumerate(cards):
        row, column = divmod(index, columns)
        _draw(card, axes[row, 3 * column : 3 * column + 3])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as part:
        figure.savefig(part, format=out.suffix.removeprefix(".") or "png")
    return out


def overview(card: Card, pixels: int = 800) -> Image.Image:
    """Draw the image of a card with its map and boxes, without a margin.

    Args:
        card: The question.
        pixels: Longer side of the picture.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """
    needs("matplotlib", extra="plot", what="drawing a map")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = pixels / max(card.image.size) / 100
    # A wide image still has a row of pixels.
    width, height = (max(side * scale, 0.01) for side in card.image.size)
    figure = Figure(figsize=(width, height), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    _draw_overview(card, axis)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_overview(card: Card, axis: Any) -> None:
    from matplotlib.patches import Rectangle

    _draw_image(axis, card.image.convert("RGB"), card.roi_map, card.extent)
    for box, colour in [*((b, BOX_COLOUR) for b in card.regions), (card.truth, TRUE_COLOUR)]:
        if box is not None:
            x0, y0, x1, y1 = box
            frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=2)
            axis.add_patch(frame)


def _draw(card: Card, axes: Any) -> None:
    whole, detail, words = axes
    rgb = card.image.convert("RGB")
    _draw_overview(card, whole)
    if card.second_map is not None:
        _draw_image(detail, rgb, card.second_map, card.extent)
    elif card.regions:
        x0, y0, x1, y1 = card.regions[0]
        detail.imshow(rgb.crop((x0, y0, x1, y1)))
    else:
        detail.text(0.5, 0.5, "no zoom", ha="center", va="center", transform=detail.transAxes)
    # A spaced question mark stays on the line of its word.
    question = card.question.replace(" ?", "\N{NO-BREAK SPACE}?")
    lines = [*textwrap.wrap(question, 34), ""]
    for name, answer in card.answers.items():
        lines += textwrap.wrap(f"{name}: {answer}", 34)
    lines += ["", *textwrap.wrap(card.note, 34)]
    words.text(0, 0.95, "\n".join(lines), va="top", fontsize=9, transform=words.transAxes)


def _draw_image(
    axis: Any, rgb: Image.Image, roi_map: np.ndarray | None, extent: tuple[float, ...]
) -> None:
    """Draw the image and, if there is one, a map over it."""
    axis.imshow(rgb)
    if roi_map is not None:
        x0, y0, x1, y1 = extent
        strength = np.clip(roi_map, 0, 1) * 0.6
        place = x0, x1, y1, y0  # matplotlib's order: left, right, bottom, top
        axis.imshow(roi_map, cmap="inferno", extent=place, alpha=strength, vmin=0, vmax=1)
    axis.set_xlim(0, rgb.width)
    axis.set_ylim(rgb.height, 0)
