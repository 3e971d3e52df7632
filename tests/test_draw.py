"""Pictures: where a map lies on the image, and that a sheet can be drawn from any card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrpn.draw import Card, heat, sheet
from sdrpn.roi.postprocess import PixelBox, View


@pytest.mark.parametrize(
    ("size", "padding", "extent"),
    [
        ((448, 448), "pad", (0, 448, 448, 0)),
        ((400, 200), "pad", (0, 400, 300, -100)),
        ((200, 400), "pad", (-100, 300, 400, 0)),
        ((400, 200), "crop", (100, 300, 200, 0)),
    ],
)
def test_the_map_lies_where_the_model_saw_it(
    size: tuple[int, int], padding: str, extent: tuple[float, ...]
) -> None:
    assert heat(np.zeros((8, 8)), View(size, 8, 112, padding))[1] == pytest.approx(extent)


def test_a_sheet_shows_box_and_crop(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 200), "white")
    image.paste((0, 0, 255), (100, 100, 150, 150))
    view = View(image.size, 8, 112)
    box = PixelBox(100, 100, 150, 150)
    cards = [
        Card(image, "where?", {"stock": "no", "second look": "yes"}, [box], view, np.eye(8)),
        Card(image, "nowhere? " * 20, {"stock": "no"}, [], view, truth=box, note="no zoom"),
    ]
    pixels = np.asarray(Image.open(sheet(cards, tmp_path / "sheet.png")).convert("RGB"))
    blue = (pixels[..., 2] > 200) & (pixels[..., 0] < 60) & (pixels[..., 1] < 60)
    columns = np.flatnonzero(blue[: len(blue) // 2].any(axis=0))
    # The blue square is seen twice in the first row: small in the image, large as the crop.
    assert columns.max() > pixels.shape[1] * 0.4
    assert columns.min() < pixels.shape[1] * 0.3
