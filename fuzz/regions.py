"""Fuzzes the region code: any map and image give boxes inside the image that hold pixels.

python -m fuzz.regions --minutes 10
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from fuzz.harness import JSON, holds, main, refused
from sdrpn.backbones.llava15 import crop_to_square, square_grid
from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import POLICIES, ZoomConfig
from sdrpn.roi.postprocess import Region, blur, components, crop_grid_size, propose, region_from_box

SIDES = st.one_of(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 10**7))
VALUES = st.one_of(
    st.sampled_from([0.0, 0.25, 0.75, 1.0]),
    st.floats(0, 1, width=32),
    st.sampled_from([1e-45, 0.15, np.float32(0.15).item(), 0.9999999]),
)


@st.composite
def views(draw: st.DrawFn) -> ImageGrid:
    grid = draw(st.integers(1, 30))
    patch = draw(st.sampled_from([1, 7, 14, 16]))
    size = draw(SIDES), draw(SIDES)
    return square_grid(size, grid, grid * patch, draw(st.sampled_from(["pad", "crop"])))


@st.composite
def zooms(draw: st.DrawFn) -> ZoomConfig:
    return ZoomConfig(
        threshold=draw(st.floats(1e-6, 1, exclude_max=True)),
        policy=draw(st.sampled_from(POLICIES)),
        token_budget=draw(st.none() | st.floats(0.01, 50)),
        min_cells=draw(st.integers(1, 6)),
        max_cells_fraction=draw(st.floats(0.01, 1)),
        skip_above=draw(st.none() | st.floats(0.01, 1)),
    )


def check(region: Region, view: ImageGrid, zoom: ZoomConfig) -> None:
    """A region holds pixels of the image, in boxes that are sound, or says why there is none."""
    assert bool(region.boxes) == (region.reason is None)
    assert len(region.boxes) == len(region.grid_boxes) <= 2
    for box, cells in zip(region.boxes, region.grid_boxes, strict=True):
        assert 0 <= box.x0 < box.x1 <= view.size[0], box
        assert 0 <= box.y0 < box.y1 <= view.size[1], box
        assert all(type(edge) is int for edge in (*box, *cells))
        assert 0 <= cells.x0 < cells.x1 <= view.rows, cells
        assert 0 <= cells.y0 < cells.y1 <= view.rows, cells
        rows, columns = crop_grid_size(cells, view.rows, view.columns, zoom)
        assert 1 <= rows <= view.rows
        assert 1 <= columns <= view.rows


@holds(data=st.data(), view=views(), zoom=zooms(), blurred=st.booleans())
def any_map(data: st.DataObject, view: ImageGrid, zoom: ZoomConfig, blurred: bool) -> None:
    shape = (view.rows, view.columns)
    values = data.draw(arrays(np.float32, shape, elements=VALUES, fill=st.sampled_from([0, 0.5])))
    shown = blur(values) if blurred and view.rows > 1 else values
    region = propose(shown, view, zoom)
    check(region, view, zoom)
    if region.keep is not None:
        assert region.keep.shape == shape
        assert region.keep.any()
    for box, mask in components(shown > zoom.threshold, zoom):
        inside = np.zeros(shape, bool)
        inside[box.y0 : box.y1, box.x0 : box.x1] = True
        assert inside[mask].all()


@holds(
    data=st.data(),
    grid=st.integers(1, 30),
    odd=st.sampled_from([0.0, float("nan"), float("inf"), float("-inf"), 3e38]),
)
def any_blur(data: st.DataObject, grid: int, odd: float) -> None:
    values = data.draw(arrays(np.float32, (grid, grid), elements=VALUES, fill=st.just(0)))
    smooth = blur(values)
    assert smooth.dtype == np.float32
    assert smooth.shape == values.shape
    assert values.min() - 1e-6 <= smooth.min() <= smooth.max() <= values.max() + 1e-6
    values[0, 0] = odd
    view = square_grid((100, 80), grid, 14 * grid)
    try:
        check(propose(blur(values), view, ZoomConfig(0.5)), view, ZoomConfig(0.5))
    except ValueError as error:
        refused(error, "not finite")
        if np.isfinite(odd):
            raise


EDGES = st.one_of(st.integers(-5, 3005), st.integers(), st.sampled_from([0, 1, -1, 10**30]))


@holds(view=views(), edges=st.tuples(EDGES, EDGES, EDGES, EDGES))
def any_given_box(view: ImageGrid, edges: tuple[int, int, int, int]) -> None:
    zoom = ZoomConfig()
    try:
        region = region_from_box(PixelBox(*edges), view)
    except ValueError as error:
        refused(error, "does not lie inside")
        return
    check(region, view, zoom)
    assert region.boxes == (edges,)


@holds(data=st.data(), view=views())
def there_and_back(data: st.DataObject, view: ImageGrid) -> None:
    """Cells of pixels, and pixels of cells, stay inside; cells come back around themselves."""
    edge = st.integers(0, view.rows - 1)
    x0, y0 = data.draw(edge), data.draw(edge)
    cells = GridBox(
        x0, y0, data.draw(st.integers(x0 + 1, view.rows)), data.draw(st.integers(y0 + 1, view.rows))
    )
    box = view.to_pixels(cells)
    assert 0 <= box.x0 <= box.x1 <= view.size[0]
    assert 0 <= box.y0 <= box.y1 <= view.size[1]
    if box.area > 0:
        again = view.to_cells(box)
        assert 0 <= again.x0 < again.x1 <= view.rows
        assert 0 <= again.y0 < again.y1 <= view.rows
        # Truncated to whole pixels, edges move towards the corner by less than one of them.
        slack = 1 + view.scale[0] / view.cell
        assert cells.x0 - slack <= again.x0, (cells, again)
        assert again.x1 <= cells.x1 + slack, (cells, again)


@holds(
    data=st.data(), size=st.tuples(st.integers(1, 60), st.integers(1, 60)), side=st.integers(1, 64)
)
def any_crop(data: st.DataObject, size: tuple[int, int], side: int) -> None:
    x0, y0 = (data.draw(st.integers(0, edge - 1)) for edge in size)
    x1, y1 = (
        data.draw(st.integers(low + 1, edge)) for low, edge in zip((x0, y0), size, strict=True)
    )
    image = Image.new("RGB", size, "red")
    cut = crop_to_square(image, PixelBox(x0, y0, x1, y1), side)
    assert cut.size == (side, side)
    assert cut.getextrema() == ((255, 255), (0, 0), (0, 0))


SETTINGS = [*ZoomConfig.__dataclass_fields__, "treshold"]


@holds(
    pairs=st.lists(
        st.tuples(
            st.sampled_from(SETTINGS),
            st.text(max_size=8)
            | st.sampled_from(["0.1", "none", "true", "nan", "inf", "-1", "1e400", "mask", "1_0"]),
        ),
        max_size=4,
    ),
    values=st.dictionaries(st.sampled_from(SETTINGS), JSON, max_size=4) | JSON,
)
def any_settings(pairs: list[tuple[str, str]], values: Any) -> None:
    """Settings from text or JSON are checked ones, or a sentence."""
    text = ",".join(f"{name}={value}" for name, value in pairs)
    for make in (lambda: ZoomConfig.from_text(text), lambda: ZoomConfig.from_dict(values)):
        try:
            zoom = make()
        except ValueError as error:
            refused(error)
            continue
        assert 0 < zoom.threshold < 1
        assert zoom.policy in POLICIES
        assert zoom.token_budget is None or zoom.token_budget > 0
        crop_grid_size(GridBox(0, 0, 1, 1), 24, 24, zoom)


PROPERTIES = (any_map, any_blur, any_given_box, there_and_back, any_crop, any_settings)

if __name__ == "__main__":
    main(PROPERTIES, __doc__ or "")
