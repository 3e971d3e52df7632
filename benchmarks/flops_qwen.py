"""Closed formulas of Qwen2.5-VL's operations; the decoder's are those of `benchmarks.flops`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from benchmarks.flops import Sizes
from sdrpn.backbones.qwen25_vl import Qwen25VL

Grid = tuple[int, int]
"""Rows and columns of cells."""


@dataclass(frozen=True, kw_only=True)
class QwenSizes(Sizes):
    """Dimensions of a Qwen2.5-VL and its RPN, with the grids of an image and its crop.

    window: cells per side of a window. merge: patches per side of a cell. full_layers: layers of
    the vision tower in which every patch attends to every other; in the rest it is its window's.
    """

    grid: Grid
    crop_grid: Grid
    window: int
    merge: int
    full_layers: int

    @classmethod
    def of_config(
        cls,
        config: Any,
        *,
        head_tokens: int,
        branch_layer: int,
        depth: int,
        grid: Grid,
        crop_grid: Grid,
    ) -> Self:
        """Read the sizes from a Qwen2_5_VLConfig."""
        text, vision = config.text_config, config.vision_config
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            kv_width=text.hidden_size // text.num_attention_heads * text.num_key_value_heads,
            vocabulary=text.vocab_size,
            head_tokens=head_tokens,
            image_tokens=grid[0] * grid[1],
            branch_layer=branch_layer,
            depth=depth,
            vision_layers=vision.depth,
            vision_hidden=vision.hidden_size,
            vision_intermediate=vision.intermediate_size,
            patch_inputs=patch,
            feature_layers=vision.depth,
            crop_marks=Qwen25VL.crop_marks,
            grid=grid,
            crop_grid=crop_grid,
            window=vision.window_size // vision.patch_size // vision.spatial_merge_size,
            merge=vision.spatial_merge_size,
            full_layers=len(vision.fullatt_block_indexes),
        )

    def image_tower(self, layers: int) -> float:
        return tower(self, self.grid, layers)

    def crop_tower(self, layers: int) -> float:
        return tower(self, self.crop_grid, layers)


def window_sides(cells: int, window: int) -> list[int]:
    """Split one side of a grid into windows, the last of which may be smaller."""
    rest = [cells % window] if cells % window else []
    return [window] * (cells // window) + rest


def tower(s: QwenSizes, grid: Grid, layers: int) -> float:
    """Vision tower with `layers` layers and merger, for one image of a grid of cells."""
    cells, width = grid[0] * grid[1], s.vision_hidden
    patches = cells * s.merge**2
    down, across = (sum(side**2 for side in window_sides(n, s.window)) for n in grid)
    # Every patch with every patch: of the image, or of its window.
    pairs = s.full_layers * patches**2 + (layers - s.full_layers) * s.merge**4 * down * across
    each = patches * (8 * width**2 + 6 * width * s.vision_intermediate)
    merged = s.merge**2 * width
    merger = 2 * cells * (merged**2 + merged * s.hidden)
    return 2 * patches * s.patch_inputs * width + layers * each + 4 * pairs * width + merger
