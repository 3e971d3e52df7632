"""From regions to crop tokens: encode crops, resize or mask their grids, fit the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from sdrpn.backbones.base import Backbone, CropTokens, ImageInput
from sdrpn.boxes import GridBox, PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.roi.postprocess import Region, crop_grid_size


@torch.no_grad()
def crop_tokens(
    backbone: Backbone,
    images: Sequence[Image.Image],
    regions: Sequence[Region],
    zooms: Sequence[ZoomConfig],
    max_tokens: Sequence[int],
) -> list[list[CropTokens]]:
    """Encode the crops of a batch in one call.

    Args:
        backbone: The base model.
        images: Original image of each row.
        regions: Region of each row.
        zooms: Zoom settings of each row.
        max_tokens: Maximum number of crop tokens of each row; larger crops are resized.

    Returns:
        Crop tokens of each row; empty for rows without a box or without any token left.
    """
    encoded: list[list[Tensor]] = [[] for _ in regions]
    for row, features in _encode(backbone, images, regions, zooms):
        encoded[row].append(features)
    return [
        _fit(features, region, zoom, limit, backbone.crop_marks)
        for features, region, zoom, limit in zip(encoded, regions, zooms, max_tokens, strict=True)
    ]


def _encode(
    backbone: Backbone,
    images: Sequence[Image.Image],
    regions: Sequence[Region],
    zooms: Sequence[ZoomConfig],
) -> list[tuple[int, Float[Tensor, "height length width"]]]:
    """Encode all crops of a batch in one call: (row, [rows, columns, C]) of each crop."""

    def prepared(image: Image.Image, box: PixelBox, zoom: ZoomConfig) -> list[list[ImageInput]]:
        if zoom.tiles == 1 and zoom.crop_tokens is None:
            return [[backbone.crop_input(image, box)]]
        return backbone.crop_inputs(image, box, tiles=zoom.tiles, max_tokens=zoom.crop_tokens)

    parts = [
        (row, prepared(image, box, zoom))
        for row, (image, region, zoom) in enumerate(zip(images, regions, zooms, strict=True))
        for box in region.boxes
    ]
    if not parts:
        return []
    features = iter(backbone.encode([one for _, tiles in parts for line in tiles for one in line]))

    def stitched(tiles: list[list[ImageInput]]) -> Tensor:
        lines = [
            torch.cat([next(features).unflatten(0, (t.grid.rows, t.grid.columns)) for t in line], 1)
            for line in tiles
        ]
        return torch.cat(lines)

    return [(row, stitched(tiles)) for row, tiles in parts]


def _fit(
    features: Sequence[Tensor], region: Region, zoom: ZoomConfig, max_tokens: int, marks: int
) -> list[CropTokens]:
    """Drop tokens of one row's crops, [rows, columns, C] each, until at most `max_tokens` are left.

    With a crop budget, tokens of background cells are dropped first; then the crops shrink. Crops
    without tokens are dropped if the backbone has no delimiters around crops.
    """
    grids = [
        crop_grid_size(box, feature.shape[0], feature.shape[1], zoom)
        for feature, box in zip(features, region.grid_boxes, strict=True)
    ]
    can_be_sparse = region.keep is None and region.foreground is not None
    budget = zoom.crop_tokens is not None and max_tokens <= zoom.crop_tokens
    sparse = can_be_sparse and zoom.tiles > 1
    while True:
        crops = [
            _crop(feature, region, box, *grid, sparse=sparse)
            for feature, box, grid in zip(features, region.grid_boxes, grids, strict=True)
        ]
        total = sum(len(crop.tokens) for crop in crops)
        if total <= max_tokens:
            return crops if total or marks else []
        if budget and can_be_sparse and not sparse:
            sparse = True
            continue
        if all(rows == columns == 1 for rows, columns in grids):
            return []
        shrink = min(math.sqrt(max(max_tokens, 0) / total), 0.95)
        grids = [(max(int(r * shrink), 1), max(int(c * shrink), 1)) for r, c in grids]


def _crop(
    feature: Tensor, region: Region, box: GridBox, rows: int, columns: int, *, sparse: bool
) -> CropTokens:
    encoded = feature.shape[0] * feature.shape[1]
    tokens = resize(feature, rows, columns).flatten(0, 1)
    if sparse:
        keep = foreground_tokens(region.foreground, box, rows, columns)
    elif region.keep is not None:
        keep = keep_mask(region.keep, box, rows, columns)
    else:
        return CropTokens(tokens, rows, columns, encoded=encoded)
    keep = keep.to(tokens.device)
    return CropTokens(tokens[keep], rows, columns, keep, encoded)


def foreground_tokens(
    foreground: object, box: GridBox, rows: int, columns: int
) -> Bool[Tensor, " tokens"]:
    """Select the crop tokens of foreground cells and their neighbours (arXiv 2609.19745).

    Args:
        foreground: [map rows, map columns] bool, cells over the threshold.
        box: Crop, in grid cells of the map.
        rows: Rows of the crop's token grid.
        columns: Columns of the crop's token grid.

    Returns:
        [rows * columns] bool, row-major, with at least one token.
    """
    shares = _shares(foreground, box, rows, columns)
    return widen((shares > min(0.5, float(shares.max()) - 1e-6)).flatten(), rows, columns)


def widen(keep: Bool[Tensor, " tokens"], rows: int, columns: int) -> Bool[Tensor, " tokens"]:
    """Add the neighbours of kept tokens, diagonal ones too.

    Args:
        keep: [rows * columns] bool, row-major.
        rows: Rows of the token grid.
        columns: Columns of the token grid.
    """
    grid = keep.unflatten(0, (rows, columns))[None].float()
    return max_pool2d(grid, 3, stride=1, padding=1)[0].bool().flatten()


def resize(
    feature: Float[Tensor, "height length width"], rows: int, columns: int
) -> Float[Tensor, "{rows} {columns} width"]:
    """Resize a grid of tokens, bilinear: [any, any, C] -> [rows, columns, C]."""
    if feature.shape[:2] == (rows, columns):
        return feature
    channels_first = feature.permute(2, 0, 1)[None]
    resized = interpolate(channels_first, (rows, columns), mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0)


def keep_mask(keep: object, box: GridBox, rows: int, columns: int) -> Bool[Tensor, " tokens"]:
    """Select the crop tokens of the `mask` policy (SD-RPN, section 3.3).

    The thresholded map is cropped to the box and resized to the token grid, bilinear; tokens above
    0.5 are kept.

    Args:
        keep: [map rows, map columns] of {0, 1}, the thresholded map.
        box: Crop, in grid cells of the map.
        rows: Rows of the crop's token grid.
        columns: Columns of the crop's token grid.

    Returns:
        [rows * columns] bool, row-major.
    """
    return (_shares(keep, box, rows, columns) > 0.5).flatten()


def _shares(mask: object, box: GridBox, rows: int, columns: int) -> Float[Tensor, "_ _"]:
    """Crop a map to a box and resize it to a token grid, bilinear: [rows, columns]."""
    cells = torch.as_tensor(mask, dtype=torch.float32)[box.y0 : box.y1, box.x0 : box.x1]
    resized = interpolate(cells[None, None], (rows, columns), mode="bilinear", align_corners=False)
    return resized[0, 0]
