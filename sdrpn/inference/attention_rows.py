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
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sdrpn.backbones.llava15 import Llava
from sdrpn.config import LayerHeads
from sdrpn.inference.decoder import KV, run_layers
from sdrpn.inference.prefix import Prefix, pad_between, stack


@dataclass(frozen=True)
class Rows:
    """Attention to the image of one batch: {layer: [B, heads, T]}, averaged over tokens read."""

    by_layer: dict[int, Tensor]

    def mean(self, chosen: Sequence[LayerHeads]) -> Tensor:
        """Mean over all chosen heads of all chosen layers: [B, T] in float32."""
        parts = []
        for choice in chosen:
            rows = self.by_layer[choice.layer]
            parts.append(rows if choice.heads is None else rows[:, list(choice.heads)])
        return torch.cat(parts, dim=1).mean(1)


@torch.no_grad()
def read_rows(
    llava: Llava,
    prefixes: Sequence[Prefix],
    suffixes: Sequence[Sequence[int]],
    counts: Sequence[int],
    layers: Sequence[int],
) -> Rows:
    """Run token ids over prefixes and read where the last `counts[i]` tokens of row i look.

    layers: whose attention is wanted; the backbone runs no further than the last of them.
    """
    prefix = prefixes[0]
    embeds, mask = pad_between(prefix.length, [llava.embed(ids) for ids in suffixes])
    cache = stack([p.kv for p in prefixes])
    span = llava.span(embeds, mask, cache)
    reader = _Reader(llava, prefix, mask, counts, frozenset(layers), cache)
    run_layers(llava.layers[: max(layers) + 1], embeds, span, cache, reader.tap)
    return Rows(reader.found)


class _Reader:
    """Collects rows while the layers run; see `run_layers` for the tap's arguments."""

    def __init__(
        self,
        llava: Llava,
        prefix: Prefix,
        mask: Tensor,
        counts: Sequence[int],
        layers: frozenset[int],
        cache: Any,
    ) -> None:
        self.llava, self.layers, self.cache = llava, layers, cache
        self.image = slice(prefix.image_start, prefix.image_start + llava.image_tokens)
        self.longest = max(counts)
        columns = torch.arange(mask.shape[1], device=mask.device)
        causal = columns <= columns[-self.longest :, None]
        self.visible = causal & mask.bool()[:, None]
        number = torch.tensor(counts, device=mask.device)[:, None]
        read = torch.arange(self.longest, 0, -1, device=mask.device) <= number
        self.weights = read / number
        self.found: dict[int, Tensor] = {}

    def tap(self, layer: int, entering: Tensor, rotary: KV) -> None:
        if layer not in self.layers:
            return
        module: Any = self.llava.layers[layer][1]
        attention = module.self_attn
        states = module.input_layernorm(entering[:, -self.longest :])
        query = attention.q_proj(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = (part[:, -self.longest :] for part in rotary)
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        keys = self.cache.layers[layer].keys
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        scores = (query @ keys.transpose(-1, -2)).float() * attention.scaling
        scores = scores.masked_fill(~self.visible[:, None].to(scores.device), float("-inf"))
        shares = scores.softmax(-1)[..., self.image]
        weights = self.weights.to(shares.device)
        self.found[layer] = torch.einsum("bhrt,br->bht", shares, weights).to(self.llava.device)
