"""Attention rows of selected layers, without full attention matrices.

The attention and ViCrop proposers and the pseudo-labels need the attention of a few tokens in a few
layers. The backbone runs with its fused kernels; after each selected layer, a hook recomputes the
rows of these tokens from the layer's query projection and the cached keys.
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
from sdrpn.inference.prefix import Batch, Prefix, batch_rows


@dataclass(frozen=True)
class Rows:
    """Attention to the image tokens, averaged over the query tokens of each row.

    Args:
        by_layer: For each layer, [heads, T] for every row; T is the row's number of image tokens.
    """

    by_layer: dict[int, list[Float[Tensor, "heads _"]]]

    def mean(self, chosen: Sequence[LayerHeads]) -> list[Float[Tensor, " _"]]:
        """Average over all heads in `chosen`.

        Args:
            chosen: Heads by layer.

        Returns:
            [T] in float32 for each row.
        """
        return [
            torch.cat([self._heads(selected, row) for selected in chosen]).mean(0)
            for row in range(len(next(iter(self.by_layer.values()))))
        ]

    def _heads(self, selected: LayerHeads, row: int) -> Tensor:
        values = self.by_layer[selected.layer][row]
        return values if selected.heads is None else values[list(selected.heads)]


@torch.no_grad()
def read_rows(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    suffixes: Sequence[Sequence[int]],
    counts: Sequence[int],
    layers: Sequence[int],
) -> Rows:
    """Run suffixes over prefixes and compute the attention of the last tokens to the image.

    Args:
        backbone: The base model.
        prefixes: Prefilled image of each row.
        suffixes: Token ids after each prefix.
        counts: Number of query tokens at the end of each row, at least 1.
        layers: Layer indices to read; later layers are not run.

    Returns:
        Attention to the image tokens, by layer.
    """
    segments: list[Segment] = [
        backbone.suffix_segment(prefix.next_position, ids)
        for prefix, ids in zip(prefixes, suffixes, strict=True)
    ]
    batch = batch_rows(segments, [p.length for p in prefixes])
    cache = batch.cache_of([p.kv for p in prefixes])
    inputs = batch.attention(backbone, cache)
    probe = _AttentionHook(backbone, prefixes, batch, counts, frozenset(layers), cache)
    run_layers(backbone.layers[: max(layers) + 1], batch.embeds, inputs, cache, probe)
    return Rows(probe.by_layer)


class _AttentionHook:
    """A `LayerHook` that computes the attention rows of selected layers."""

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
        self.num_queries = max(counts)
        mask = batch.mask
        columns = torch.arange(mask.shape[1], device=mask.device)
        causal = columns <= columns[-self.num_queries :, None]
        self.visible = causal & mask.bool()[:, None]
        count = torch.tensor(counts, device=mask.device)[:, None]
        is_query = torch.arange(self.num_queries, 0, -1, device=mask.device) <= count
        self.weights = is_query / count
        self.by_layer: dict[int, list[Tensor]] = {}

    def __call__(
        self, layer: int, layer_input: Float[Tensor, "batch new width"], rotary: KV
    ) -> None:
        if layer not in self.layers:
            return
        module: Any = self.backbone.layers[layer][1]
        attention = module.self_attn
        states = module.input_layernorm(layer_input[:, -self.num_queries :])
        query = split_heads(attention.q_proj(states), attention.head_dim)
        cos, sin = (part[:, -self.num_queries :] for part in rotary)
        query = self.backbone.rotate(query, (cos, sin))
        keys = self.cache.layers[layer].keys
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        scores = (query @ keys.transpose(-1, -2)).float() * attention.scaling
        scores = scores.masked_fill(~self.visible[:, None].to(scores.device), float("-inf"))
        rows = scores.softmax(-1)
        weights = self.weights.to(rows.device)
        self.by_layer[layer] = [
            torch.einsum("hqt,q->ht", rows[row, ..., image], weights[row]).to(self.backbone.device)
            for row, image in enumerate(self.images)
        ]
