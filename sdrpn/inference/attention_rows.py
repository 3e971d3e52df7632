"""Attention rows of chosen layers and heads, without any full attention matrix.

The attention and ViCrop proposers and the pseudo-labels read where a few tokens look. Only those
tokens' rows are computed, only in the layers asked for: the backbone runs with its fast kernels,
and behind each such layer the rows follow from its own query projection and the cached keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sdrpn.backbones.base import Backbone, Segment
from sdrpn.backbones.cache import KV
from sdrpn.config import LayerHeads
from sdrpn.inference.decoder import run_layers, split_heads
from sdrpn.inference.prefix import Batch, Prefix, batch_rows, stack


@dataclass(frozen=True)
class Rows:
    """Attention to the image of one batch, averaged over the tokens read.

    Args:
        by_layer: For each layer, [heads, T] of every row; T is the row's own number of image
            tokens.
    """

    by_layer: dict[int, list[Float[Tensor, "heads _"]]]

    def mean(self, chosen: Sequence[LayerHeads]) -> list[Float[Tensor, " _"]]:
        """Mean over all chosen heads of all chosen layers: [T] in float32, for each row."""
        return [
            torch.cat([self._heads(choice, row) for choice in chosen]).mean(0)
            for row in range(len(next(iter(self.by_layer.values()))))
        ]

    def _heads(self, choice: LayerHeads, row: int) -> Tensor:
        values = self.by_layer[choice.layer][row]
        return values if choice.heads is None else values[list(choice.heads)]


@torch.no_grad()
def read_rows(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    suffixes: Sequence[Sequence[int]],
    counts: Sequence[int],
    layers: Sequence[int],
) -> Rows:
    """Run token ids over prefixes and read where the last `counts[i]` tokens of row i look.

    Args:
        suffixes: Token ids behind each prefix.
        counts: How many of the last tokens of each row are read, 1 or more.
        layers: Whose attention is wanted; the backbone runs no further than the last of them.
    """
    segments: list[Segment] = [
        backbone.suffix_segment(prefix.next_position, ids)
        for prefix, ids in zip(prefixes, suffixes, strict=True)
    ]
    batch = batch_rows(segments, [p.length for p in prefixes])
    cache = stack([p.kv for p in prefixes])
    inputs = batch.attention(backbone, cache)
    reader = _Reader(backbone, prefixes, batch, counts, frozenset(layers), cache)
    run_layers(backbone.layers[: max(layers) + 1], batch.embeds, inputs, cache, reader.hook)
    return Rows(reader.found)


class _Reader:
    """Collects rows while the layers run; see `run_layers` for the hook's arguments."""

    def __init__(
        self,
        backbone: Backbone,
        prefixes: Sequence[Prefix],
        batch: Batch,
        counts: Sequence[int],
        layers: frozenset[int],
        cache: Any,
    ) -> None:
        self.backbone, self.layers, self.cache = backbone, layers, cache
        gaps = [batch.prefix_length - prefix.length for prefix in prefixes]
        self.images = [
            slice(gap + prefix.image.start, gap + prefix.image.stop)
            for gap, prefix in zip(gaps, prefixes, strict=True)
        ]
        self.longest = max(counts)
        mask = batch.mask
        columns = torch.arange(mask.shape[1], device=mask.device)
        causal = columns <= columns[-self.longest :, None]
        self.visible = causal & mask.bool()[:, None]
        number = torch.tensor(counts, device=mask.device)[:, None]
        read = torch.arange(self.longest, 0, -1, device=mask.device) <= number
        self.weights = read / number
        self.found: dict[int, list[Tensor]] = {}

    def hook(self, layer: int, entering: Float[Tensor, "batch new width"], rotary: KV) -> None:
        if layer not in self.layers:
            return
        module: Any = self.backbone.layers[layer][1]
        attention = module.self_attn
        states = module.input_layernorm(entering[:, -self.longest :])
        query = split_heads(attention.q_proj(states), attention.head_dim)
        cos, sin = (part[:, -self.longest :] for part in rotary)
        query = self.backbone.rotate(query, (cos, sin))
        keys = self.cache.layers[layer].keys
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        scores = (query @ keys.transpose(-1, -2)).float() * attention.scaling
        scores = scores.masked_fill(~self.visible[:, None].to(scores.device), float("-inf"))
        shares = scores.softmax(-1)
        weights = self.weights.to(shares.device)
        self.found[layer] = [
            torch.einsum("hrt,r->ht", shares[row, ..., image], weights[row]).to(
                self.backbone.device
            )
            for row, image in enumerate(self.images)
        ]
