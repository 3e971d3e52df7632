"""Pictures of what the model saw: the image with map and boxes, the crops, the answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn.io.atomic import atomic_write

BOX_COLOUR = "#ff2fd0"
TRUE_COLOUR = "#2fe05a"


@dataclass(frozen=True)
class Card:
    """One question to draw: answers are lines of text by the name of who gave them.

    extent: where maps lie on the image, (x0, y0, x1, y1) in pixels, as `ImageGrid.extent` has it.
    roi_map: [rows, columns] in [0, 1] or None. truth: the true box where it is known. second_map:
    drawn over the image once more, where the crop would stand.
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
    """Write cards as one picture: the whole image with map and box, the crop, the answers."""
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


def _draw(card: Card, axes: Any) -> None:
    whole, cut, words = axes
    rgb = card.image.convert("RGB")
    _draw_image(whole, rgb, card.roi_map, card.extent)
    for box, colour in [*((b, BOX_COLOUR) for b in card.regions), (card.truth, TRUE_COLOUR)]:
        if box is not None:
            x0, y0, x1, y1 = box
            frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=2)
            whole.add_patch(frame)
    if card.second_map is not None:
        _draw_image(cut, rgb, card.second_map, card.extent)
    elif card.regions:
        x0, y0, x1, y1 = card.regions[0]
        cut.imshow(rgb.crop((x0, y0, x1, y1)))
    else:
        cut.text(0.5, 0.5, "no zoom", ha="center", va="center", transform=cut.transAxes)
    lines = [*textwrap.wrap(card.question, 34), ""]
    for name, answer in card.answers.items():
        lines += textwrap.wrap(f"{name}: {answer}", 34)
    lines += ["", *textwrap.wrap(card.note, 34)]
    words.text(0, 0.95, "\n".join(lines), va="top", fontsize=9, transform=words.transAxes)


def _draw_image(
    axis: Any, rgb: Image.Image, roi_map: np.ndarray | None, extent: tuple[float, ...]
) -> None:
    """The whole image, with a map over it where there is one."""
    axis.imshow(rgb)
    if roi_map is not None:
        x0, y0, x1, y1 = extent
        strength = np.clip(roi_map, 0, 1) * 0.6
        place = x0, x1, y1, y0  # matplotlib's order: left, right, bottom, top
        axis.imshow(roi_map, cmap="inferno", extent=place, alpha=strength, vmin=0, vmax=1)
    axis.set_xlim(0, rgb.width)
    axis.set_ylim(rgb.height, 0)
