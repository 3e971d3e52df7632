"""From regions to crop tokens: encode crops, resize or mask their grids, fit the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sdrpn.backbones.base import Backbone, CropTokens
from sdrpn.boxes import GridBox
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
    pairs = [(i, b) for i, region in enumerate(regions) for b in range(len(region.boxes))]
    if not pairs:
        return [[] for _ in regions]
    inputs = [backbone.crop_input(images[i], regions[i].boxes[b]) for i, b in pairs]
    encoded: list[list[Tensor]] = [[] for _ in regions]
    for (i, _), crop, tokens in zip(pairs, inputs, backbone.encode(inputs), strict=True):
        encoded[i].append(tokens.unflatten(0, (crop.grid.rows, crop.grid.columns)))
    return [
        _fit(features, region, zoom, limit, backbone.crop_marks)
        for features, region, zoom, limit in zip(encoded, regions, zooms, max_tokens, strict=True)
    ]


def _fit(
    features: Sequence[Tensor], region: Region, zoom: ZoomConfig, max_tokens: int, marks: int
) -> list[CropTokens]:
    """Resize the crops of one row, [rows, columns, C] each, until they have at most `max_tokens`.

    Crops without tokens are dropped if the backbone has no delimiters around crops.
    """
    grids = [
        crop_grid_size(box, feature.shape[0], feature.shape[1], zoom)
        for feature, box in zip(features, region.grid_boxes, strict=True)
    ]
    while True:
        crops = [
            _crop(feature, region, box, *grid)
            for feature, box, grid in zip(features, region.grid_boxes, grids, strict=True)
        ]
        total = sum(len(crop.tokens) for crop in crops)
        if total <= max_tokens:
            return crops if total or marks else []
        if all(rows == columns == 1 for rows, columns in grids):
            return []
        shrink = min(math.sqrt(max(max_tokens, 0) / total), 0.95)
        grids = [(max(int(r * shrink), 1), max(int(c * shrink), 1)) for r, c in grids]


def _crop(feature: Tensor, region: Region, box: GridBox, rows: int, columns: int) -> CropTokens:
    tokens = resize(feature, rows, columns).flatten(0, 1)
    if region.keep is None:
        return CropTokens(tokens, rows, columns)
    keep = keep_mask(region.keep, box, rows, columns).to(tokens.device)
    return CropTokens(tokens[keep], rows, columns, keep)


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
    cells = torch.as_tensor(keep, dtype=torch.float32)[box.y0 : box.y1, box.x0 : box.x1]
    resized = interpolate(cells[None, None], (rows, columns), mode="bilinear", align_corners=False)
    return (resized[0, 0] > 0.5).flatten()
