"""The probe pictures: pinned, because a seed must draw the same ones always; covers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdrpn.boxes import PixelBox
from sdrpn.distill.probes import Disc, box_cover, disc_cover, draw_probes

FIRST = (
    Disc("red", "falling", (108.18260934, 202.65230920), 45.26098583, 16.84927517),
    Disc("pink", "level", (62.28664906, 56.20367083), 24.45805872, 17.45107961),
    Disc("purple", "level", (79.19865336, 337.11949844), 38.59498063, 15.92539539),
    Disc("blue", "level", (266.98158591, 379.54635720), 31.30193037, 17.23021660),
    Disc("orange", "dotted", (359.89703905, 297.87599283), 41.14519454, 16.98174890),
    Disc("green", "checked", (379.87866171, 36.07100076), 25.09123691, 15.17691358),
)
"""The discs of seed 0's first picture, on 448 px."""


def test_the_first_picture_is_always_the_same() -> None:
    """Other discs would choose other heads under the same seed."""
    (probe,) = draw_probes(0, 1)
    assert [(d.colour, d.pattern) for d in probe.discs] == [(d.colour, d.pattern) for d in FIRST]
    for found, expected in zip(probe.discs, FIRST, strict=True):
        assert found.centre == pytest.approx(expected.centre)
        assert (found.radius, found.period) == pytest.approx((expected.radius, expected.period))
    image = np.asarray(probe.image).astype(int)
    assert image.shape == (448, 448, 3)
    assert image.mean((0, 1)) == pytest.approx([124.638, 114.619, 117.421], abs=0.2)
    # The ground at a corner and in the middle, and a row across the first disc's centre.
    assert np.abs(image[0, 0] - [108, 92, 62]).max() <= 2
    assert np.abs(image[224, 224] - [163, 157, 138]).max() <= 2
    row = [207, 228, 228, 228, 228, 228, 228, 228, 228, 212, 175]
    assert np.abs(image[203, 103:114, 0] - row).max() <= 2
    assert np.abs(image[203, 108] - [228, 27, 34]).max() <= 2


def test_a_picture_of_half_the_side_is_half_of_all() -> None:
    """Discs at half the size; distances to the border and to each other are in pixels always."""
    (probe,) = draw_probes(0, 1, 224)
    assert probe.image.size == (224, 224)
    first = probe.discs[0]
    assert first.radius == pytest.approx(45.26098583 / 2)
    assert first.period == pytest.approx(16.84927517 / 2)
    assert first.centre == pytest.approx((55.07985059, 101.50836534))


def test_discs_keep_apart() -> None:
    """5 px between two discs, 3 px to the border."""
    gaps, borders = [], []
    for probe in draw_probes(1, 150):
        for i, one in enumerate(probe.discs):
            borders += [min(*one.centre, *(448 - c for c in one.centre)) - one.radius]
            for other in probe.discs[:i]:
                gaps.append(math.dist(one.centre, other.centre) - one.radius - other.radius)
    assert 5 < min(gaps) < 6
    assert 3 <= min(borders) < 3.5
    counts = {len(probe.discs) for probe in draw_probes(1, 30)}
    assert counts == {3, 4, 5, 6}


def test_sides_from_112_px_on() -> None:
    assert draw_probes(0, 1, 112)[0].image.size == (112, 112)
    with pytest.raises(ValueError, match="must be 112 px or more, got 111"):
        draw_probes(0, 1, 111)


@pytest.mark.parametrize(
    ("centre", "radius", "box"),
    [
        ((10.0, 6.0), 2.0, (8, 4, 13, 9)),  # pixel 12 holds the edge at 12.0
        ((10.2, 6.7), 2.5, (7, 4, 14, 11)),
    ],
)
def test_a_disc_s_box_holds_all_pixels_it_touches(
    centre: tuple[float, float], radius: float, box: tuple[int, ...]
) -> None:
    assert Disc("red", "level", centre, radius, 4.0).box == PixelBox(*box)


def test_covers_of_grids_that_are_not_square() -> None:
    """2 x 4 cells of 4 px, from (8, 4) to (24, 12)."""
    extent = (8.0, 4.0, 24.0, 12.0)
    found = box_cover(PixelBox(10, 5, 22, 11), extent, 2, 4)
    assert found.tolist() == [[0.375, 0.75, 0.75, 0.375]] * 2
    # Cells of 8 x 6 px.
    assert box_cover(PixelBox(0, 0, 4, 9), (0, 0, 16, 12), 2, 2).tolist() == [[0.5, 0], [0.25, 0]]
    # Sample points lie at 8.5, 9.5, ... and 4.5, 5.5, ...: four within 1 px of (10, 6).
    disc = Disc("red", "level", (10.0, 6.0), 1.0, 4.0)
    assert disc_cover(disc, extent, 2, 4).tolist() == [[0.25, 0, 0, 0], [0] * 4]
    # On a point: its neighbours are at a distance of exactly 1, which is not inside.
    disc = Disc("red", "level", (21.5, 9.5), 1.0, 4.0)
    assert disc_cover(disc, extent, 2, 4).tolist() == [[0] * 4, [0, 0, 0, 1 / 16]]
