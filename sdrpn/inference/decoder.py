"""Decoder layers over a KV cache: what stands between a hidden state and the next one.

Shapes: B rows, N new tokens, P cached tokens, C hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

_CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(LlamaDecoderLayer.forward).parameters
)

KV = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [B, heads, tokens, head_dim]."""

Tap = Callable[[int, Tensor, KV], None]
"""Called after a layer ran, with its index, the hidden state that entered it [B, N, C], and the
rotary embeddings (cos, sin) of the new tokens."""


@dataclass(frozen=True)
class Span:
    """What attention needs to know of N new tokens behind P cached ones.

    attention_mask: 2-D [B, P + N], 1 where there is a token. mask: the same with causality, as the
    attention backend wants it. rotary: (cos, sin), each [B, N, head_dim].
    """

    attention_mask: Tensor
    mask: Any
    positions: Tensor
    rotary: KV

    def to(self, device: torch.device) -> Span:
        mask = self.mask.to(device) if isinstance(self.mask, Tensor) else self.mask
        cos, sin = self.rotary
        positions = self.positions.to(device)
        return Span(
            self.attention_mask.to(device), mask, positions, (cos.to(device), sin.to(device))
        )


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """A KV cache under the name transformers takes it by, which 5.24 changed."""
    return {_CACHE: cache}


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position of every token: counted over the mask, so padding takes no number. [B, P + N]."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def cache_of(kv: Iterable[KV]) -> DynamicCache:
    """A cache that starts from given keys and values, without copying them.

    Growing it concatenates into new tensors, so the given ones are never written to.
    """
    cache = DynamicCache()
    for keys, values in kv:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def run_layers(
    layers: Iterable[tuple[int, nn.Module]],
    hidden: Tensor,
    span: Span,
    cache: Cache | None = None,
    tap: Tap | None = None,
) -> Tensor:
    """Run decoder layers over N new tokens behind a cache, which grows by them.

    layers: (index, decoder layer). hidden: [B, N, C]. Returns [B, N, C], before any final norm.
    """
    for index, layer in layers:
        entering = hidden
        hidden = layer(
            hidden,
            attention_mask=span.mask,
            position_ids=span.positions,
            use_cache=cache is not None,
            position_embeddings=span.rotary,
            **cache_argument(cache),
        )
        if tap is not None:
            tap(index, entering, span.rotary)
    return hidden


def fill_cache(
    layers: Sequence[tuple[int, nn.Module]],
    hidden: Tensor,
    span: Span,
    cache: Cache,
    tap: Tap | None = None,
) -> None:
    """As `run_layers`, for the cache alone: of the last layer only keys and values are computed.

    What the last layer makes of a token that no answer follows is read by nobody.
    """
    *lower, (index, last) = layers
    entering = run_layers(lower, hidden, span, cache, tap)
    layer: Any = last
    if layer.input_layernorm.weight.is_meta:  # offloaded: only a whole layer fetches its weights
        run_layers([(index, last)], entering, span, cache, tap)
        return
    attention = layer.self_attn
    states = layer.input_layernorm(entering.to(layer.input_layernorm.weight.device))
    keys, values = (
        proj(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for proj in (attention.k_proj, attention.v_proj)
    )
    cos, sin = (part.to(keys.device) for part in span.rotary)
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    cache.update(keys, values, attention.layer_idx)
    if tap is not None:
        tap(index, entering, span.rotary)
