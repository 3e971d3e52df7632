"""Pictures: where a map lies on the image, and that a sheet can be drawn from any card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrpn.backbones.llava15 import square_grid
from sdrpn.boxes import PixelBox
from sdrpn.draw import Card, sheet


@pytest.mark.parametrize(
    ("size", "padding", "extent"),
    [
        ((448, 448), "pad", (0, 0, 448, 448)),
        ((400, 200), "pad", (0, -100, 400, 300)),
        ((200, 400), "pad", (-100, 0, 300, 400)),
        ((400, 200), "crop", (100, 0, 300, 200)),
    ],
)
def test_the_map_lies_where_the_model_saw_it(
    size: tuple[int, int], padding: str, extent: tuple[float, ...]
) -> None:
    assert square_grid(size, 8, 112, padding).extent == pytest.approx(extent)


def test_a_sheet_shows_box_and_crop(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 200), "white")
    image.paste((0, 0, 255), (100, 100, 150, 150))
    extent = (0, 0, 200, 200)
    box = PixelBox(100, 100, 150, 150)
    cards = [
        Card(image, "where?", {"stock": "no", "second look": "yes"}, [box], extent, np.eye(8)),
        Card(image, "nowhere? " * 20, {"stock": "no"}, [], extent, truth=box, note="no zoom"),
    ]
    pixels = np.asarray(Image.open(sheet(cards, tmp_path / "sheet.png")).convert("RGB"))
    blue = (pixels[..., 2] > 200) & (pixels[..., 0] < 60) & (pixels[..., 1] < 60)
    columns = np.flatnonzero(blue[: len(blue) // 2].any(axis=0))
    # The blue square is seen twice in the first row: small in the image, large as the crop.
    assert columns.max() > pixels.shape[1] * 0.4
    assert columns.min() < pixels.shape[1] * 0.3
