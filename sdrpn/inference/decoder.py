"""Decoder layers over a KV cache: what stands between a hidden state and the next one.

Shapes: B rows, N new tokens, P cached tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sdrpn.backbones.base import AttentionInputs, Backbone
from sdrpn.backbones.cache import KV, cache_argument

LayerHook = Callable[[int, Tensor, KV], None]
"""Called after a layer ran, with its index, the hidden state that entered it [B, N, C], and the
rotary embeddings (cos, sin) of the new tokens."""


def run_layers(
    layers: Iterable[tuple[int, nn.Module]],
    hidden: Float[Tensor, "batch new width"],
    inputs: AttentionInputs,
    cache: Cache | None = None,
    hook: LayerHook | None = None,
) -> Float[Tensor, "batch new width"]:
    """Run decoder layers over N new tokens behind a cache, which grows by them.

    Args:
        layers: (index, decoder layer) in their order.
        hidden: [B, N, C].
        inputs: Mask and positions of the new tokens.
        cache: Keys and values of the tokens before.
        hook: Called behind every layer.

    Returns:
        [B, N, C], before any final norm.
    """
    for index, layer in layers:
        entering = hidden
        hidden = layer(
            hidden,
            attention_mask=inputs.mask,
            use_cache=cache is not None,
            position_embeddings=inputs.rotary,
            **cache_argument(cache),
        )
        if hook is not None:
            hook(index, entering, inputs.rotary)
    return hidden


def fill_cache(
    backbone: Backbone,
    layers: Sequence[tuple[int, nn.Module]],
    hidden: Float[Tensor, "batch new width"],
    inputs: AttentionInputs,
    cache: Cache,
    hook: LayerHook | None = None,
) -> None:
    """Like `run_layers`, for the cache alone: the last layer computes only keys and values.

    Nothing reads what the last layer makes of a token that no answer follows.
    """
    *lower, (index, last) = layers
    entering = run_layers(lower, hidden, inputs, cache, hook)
    layer: Any = last
    if layer.input_layernorm.weight.is_meta:  # offloaded: only a whole layer fetches its weights
        run_layers([(index, last)], entering, inputs, cache, hook)
        return
    attention = layer.self_attn
    states = layer.input_layernorm(entering.to(layer.input_layernorm.weight.device))
    keys, values = (split_heads(proj(states), attention.head_dim) for proj in _projections(layer))
    cache.update(backbone.rotate(keys, inputs.rotary), values, attention.layer_idx)
    if hook is not None:
        hook(index, entering, inputs.rotary)


def _projections(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.self_attn.k_proj, layer.self_attn.v_proj


def split_heads(
    states: Float[Tensor, "batch new channels"], head_dim: int
) -> Float[Tensor, "batch heads new {head_dim}"]:
    """[B, N, heads * head_dim] -> [B, heads, N, head_dim]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)
