"""From regions to crop tokens: encode the crops, shrink or mask their grids, fit the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sdrpn.backbones.llava15 import Llava
from sdrpn.config import ZoomConfig
from sdrpn.roi.postprocess import GridBox, Region, budget


@torch.no_grad()
def crop_tokens(
    llava: Llava,
    images: Sequence[Image.Image],
    regions: Sequence[Region],
    zooms: Sequence[ZoomConfig],
    rooms: Sequence[int],
) -> list[Tensor | None]:
    """Crop tokens of each region, [n, C], all crops of the batch encoded together; None: no zoom.

    rooms: how many crop tokens the model's context still holds, row by row. More are cut by
    shrinking the crops' grids, as a token budget would.
    """
    pairs = [(i, b) for i, region in enumerate(regions) for b in range(len(region.boxes))]
    if not pairs:
        return [None] * len(regions)
    pixels = llava.crop_pixels([(images[i], regions[i].boxes[b]) for i, b in pairs])
    features = llava.encode(pixels).unflatten(1, (llava.grid, llava.grid))
    encoded: list[list[Tensor]] = [[] for _ in regions]
    for (i, _), feature in zip(pairs, features, strict=True):
        encoded[i].append(feature)
    return [
        _tokens(own, region, zoom, room) if own else None
        for own, region, zoom, room in zip(encoded, regions, zooms, rooms, strict=True)
    ]


def _tokens(
    features: Sequence[Tensor], region: Region, zoom: ZoomConfig, room: int
) -> Tensor | None:
    """Tokens of one row's crops. features: [grid, grid, C] each; fewer where room is short."""
    grids = [budget(box, features[0].shape[0], zoom) for box in region.grid_boxes]
    while True:
        parts = []
        for feature, box, (rows, columns) in zip(features, region.grid_boxes, grids, strict=True):
            tokens = resize(feature, rows, columns).flatten(0, 1)
            if region.keep is not None:
                tokens = tokens[kept(region.keep, box, rows, columns).to(tokens.device)]
            parts.append(tokens)
        together = torch.cat(parts)
        if len(together) <= room:
            return together if len(together) else None
        if all(rows == columns == 1 for rows, columns in grids):
            return None
        shrink = min(math.sqrt(max(room, 0) / len(together)), 0.95)
        grids = [(max(int(r * shrink), 1), max(int(c * shrink), 1)) for r, c in grids]


def resize(feature: Tensor, rows: int, columns: int) -> Tensor:
    """Bilinearly resize a grid of tokens: [grid, grid, C] -> [rows, columns, C]."""
    if feature.shape[:2] == (rows, columns):
        return feature
    channels_first = feature.permute(2, 0, 1)[None]
    small = interpolate(channels_first, (rows, columns), mode="bilinear", align_corners=False)
    return small[0].permute(1, 2, 0)


def kept(keep: object, box: GridBox, rows: int, columns: int) -> Tensor:
    """Which crop tokens the mask policy keeps: bool [rows x columns] (METHOD section 3, step 4).

    The thresholded map, cut to the box and resized bilinearly to the token grid, exceeds 0.5.
    """
    cells = torch.as_tensor(keep, dtype=torch.float32)[box.y0 : box.y1, box.x0 : box.x1]
    grown = interpolate(cells[None, None], (rows, columns), mode="bilinear", align_corners=False)
    return (grown[0, 0] > 0.5).flatten()
