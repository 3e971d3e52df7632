"""KV caches, independent of the installed transformers version."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

_CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(LlamaDecoderLayer.forward).parameters
)

KV = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [B, heads, tokens, head_dim]."""


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """Return the cache as a keyword argument; transformers 5.24 changed its name."""
    return {_CACHE: cache}


def cache_of(kv: Iterable[KV]) -> DynamicCache:
    """Create a cache from keys and values, without copying them.

    Updates concatenate into new tensors, so the given tensors are never modified.

    Args:
        kv: Keys and values of each layer.
    """
    cache = DynamicCache()
    for keys, values in kv:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
