"""From regions to crop tokens: encode the crops, shrink or mask their grids, fit the context."""

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
from sdrpn.roi.postprocess import Region, budget


@torch.no_grad()
def crop_tokens(
    backbone: Backbone,
    images: Sequence[Image.Image],
    regions: Sequence[Region],
    zooms: Sequence[ZoomConfig],
    room: Sequence[int],
) -> list[list[CropTokens]]:
    """Crop tokens of each region, a list per row; all crops of the batch are encoded together.

    Args:
        images: The original image of each row.
        regions: What to crop; rows without a box get an empty list.
        zooms: The settings of each row.
        room: How many crop tokens the model's context still holds, row by row. More are cut by
            shrinking the crops' grids, as a token budget would.
    """
    pairs = [(i, b) for i, region in enumerate(regions) for b in range(len(region.boxes))]
    if not pairs:
        return [[] for _ in regions]
    inputs = [backbone.crop_input(images[i], regions[i].boxes[b]) for i, b in pairs]
    encoded: list[list[Tensor]] = [[] for _ in regions]
    for (i, _), one, tokens in zip(pairs, inputs, backbone.encode(inputs), strict=True):
        encoded[i].append(tokens.unflatten(0, (one.grid.rows, one.grid.columns)))
    return [
        _fitting(own, region, zoom, most, backbone.crop_marks)
        for own, region, zoom, most in zip(encoded, regions, zooms, room, strict=True)
    ]


def _fitting(
    features: Sequence[Tensor], region: Region, zoom: ZoomConfig, room: int, marks: int
) -> list[CropTokens]:
    """Tokens of one row's crops. features: [rows, columns, C] each; fewer where room is short.

    Crops that keep no token are left out, unless marks stand around them.
    """
    grids = [
        budget(box, feature.shape[0], feature.shape[1], zoom)
        for feature, box in zip(features, region.grid_boxes, strict=True)
    ]
    while True:
        crops = [
            _crop(feature, region, box, *grid)
            for feature, box, grid in zip(features, region.grid_boxes, grids, strict=True)
        ]
        total = sum(len(crop.tokens) for crop in crops)
        if total <= room:
            return crops if total or marks else []
        if all(rows == columns == 1 for rows, columns in grids):
            return []
        shrink = min(math.sqrt(max(room, 0) / total), 0.95)
        grids = [(max(int(r * shrink), 1), max(int(c * shrink), 1)) for r, c in grids]


def _crop(feature: Tensor, region: Region, box: GridBox, rows: int, columns: int) -> CropTokens:
    tokens = resize(feature, rows, columns).flatten(0, 1)
    if region.keep is None:
        return CropTokens(tokens, rows, columns)
    keep = kept(region.keep, box, rows, columns).to(tokens.device)
    return CropTokens(tokens[keep], rows, columns, keep)


def resize(
    feature: Float[Tensor, "height length width"], rows: int, columns: int
) -> Float[Tensor, "{rows} {columns} width"]:
    """Bilinearly resize a grid of tokens: [any, any, C] -> [rows, columns, C]."""
    if feature.shape[:2] == (rows, columns):
        return feature
    channels_first = feature.permute(2, 0, 1)[None]
    small = interpolate(channels_first, (rows, columns), mode="bilinear", align_corners=False)
    return small[0].permute(1, 2, 0)


def kept(keep: object, box: GridBox, rows: int, columns: int) -> Bool[Tensor, " tokens"]:
    """Which crop tokens the mask policy keeps: bool [rows * columns] (SD-RPN, section 3.3).

    The thresholded map, cut to the box and resized bilinearly to the token grid, exceeds 0.5.
    """
    cells = torch.as_tensor(keep, dtype=torch.float32)[box.y0 : box.y1, box.x0 : box.x1]
    grown = interpolate(cells[None, None], (rows, columns), mode="bilinear", align_corners=False)
    return (grown[0, 0] > 0.5).flatten()
