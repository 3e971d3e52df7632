"""Decoder layers over a KV cache.

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
"""Called after each layer with its index, its input hidden states [B, N, C], and the rotary
embeddings (cos, sin) of the new tokens."""


def run_layers(
    layers: Iterable[tuple[int, nn.Module]],
    hidden: Float[Tensor, "batch new width"],
    inputs: AttentionInputs,
    cache: Cache | None = None,
    hook: LayerHook | None = None,
) -> Float[Tensor, "batch new width"]:
    """Run decoder layers over N new tokens.

    Args:
        layers: (index, decoder layer), in order.
        hidden: [B, N, C].
        inputs: Mask and rotary embeddings of the new tokens.
        cache: KV cache of the previous tokens; the new tokens are appended.
        hook: Called after every layer.

    Returns:
        [B, N, C], before any final norm.
    """
    for index, layer in layers:
        layer_input = hidden
        hidden = layer(
            hidden,
            attention_mask=inputs.mask,
            use_cache=cache is not None,
            position_embeddings=inputs.rotary,
            **cache_argument(cache),
        )
        if hook is not None:
            hook(index, layer_input, inputs.rotary)
    return hidden


def fill_cache(
    backbone: Backbone,
    layers: Sequence[tuple[int, nn.Module]],
    hidden: Float[Tensor, "batch new width"],
    inputs: AttentionInputs,
    cache: Cache,
    hook: LayerHook | None = None,
) -> None:
    """Fill a KV cache; like `run_layers`, but the last layer computes only keys and values.

    The last layer's output is not needed, as no token is generated from it.

    Args:
        backbone: Model of the layers.
        layers: (index, decoder layer), in order.
        hidden: [B, N, C].
        inputs: Mask and rotary embeddings of the new tokens.
        cache: KV cache to fill.
        hook: Called after every layer.
    """
    *lower, (index, last) = layers
    layer_input = run_layers(lower, hidden, inputs, cache, hook)
    if _is_offloaded(last):
        run_layers([(index, last)], layer_input, inputs, cache, hook)
        return
    _add_keys(backbone, last, layer_input, inputs.rotary, cache)
    if hook is not None:
        hook(index, layer_input, inputs.rotary)


def run_to_last(
    backbone: Backbone,
    layers: Sequence[tuple[int, nn.Module]],
    hidden: Float[Tensor, "batch new width"],
    inputs: AttentionInputs,
    cache: Cache,
) -> Float[Tensor, "batch width"]:
    """Fill a KV cache; like `run_layers`, but of the last layer only the last token's output.

    Args:
        backbone: Model of the layers.
        layers: (index, decoder layer), in order.
        hidden: [B, N, C], N of at least 2.
        inputs: Mask and rotary embeddings of the new tokens.
        cache: KV cache to fill.

    Returns:
        [B, C], before any final norm.
    """
    *lower, last = layers
    layer_input = run_layers(lower, hidden, inputs, cache)
    known_mask = inputs.mask is None or isinstance(inputs.mask, Tensor)
    if _is_offloaded(last[1]) or not known_mask:
        return run_layers([last], layer_input, inputs, cache)[:, -1]
    cos, sin = inputs.rotary
    _add_keys(backbone, last[1], layer_input[:, :-1], (cos[:, :-1], sin[:, :-1]), cache)
    return run_layers([last], layer_input[:, -1:], inputs.last_token(), cache)[:, -1]


def _is_offloaded(layer: Any) -> bool:
    """Whether weights are fetched by the layer's forward() only."""
    return layer.input_layernorm.weight.is_meta


def _add_keys(backbone: Backbone, layer: Any, hidden: Tensor, rotary: KV, cache: Cache) -> None:
    """Add the keys and values of a layer to a cache."""
    attention = layer.self_attn
    states = layer.input_layernorm(hidden.to(layer.input_layernorm.weight.device))
    keys = split_heads(attention.k_proj(states), attention.head_dim)
    values = split_heads(attention.v_proj(states), attention.head_dim)
    cache.update(backbone.rotate(keys, rotary), values, attention.layer_idx)


def split_heads(
    states: Float[Tensor, "batch new channels"], head_dim: int
) -> Float[Tensor, "batch heads new {head_dim}"]:
    """Split channels into heads: [B, N, heads * head_dim] -> [B, heads, N, head_dim]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)
