"""KV caches, independent of the installed transformers version."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
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


SPARE_TOKENS = 64
"""Room for tokens that a `GrowingLayer` makes when it is full."""


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that appends in place while there is room.

    A `DynamicLayer` copies all of its keys and values for every token that is generated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor | None] = [None, None]

    def hold(self, keys: Tensor, values: Tensor, length: int | None = None) -> None:
        """Set the keys and values, without copying them.

        Args:
            keys: [B, heads, tokens, head_dim].
            values: As `keys`.
            length: Number of tokens; the rest is room that may be written. None: all, and the
                tensors are never modified.
        """
        self.lazy_initialization(keys, values)
        if length is not None:
            self._buffers = [keys, values]
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, as `DynamicLayer` does."""
        if self.get_seq_length() == 0 or (torch.is_grad_enabled() and key_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        self.keys = self._append(0, keys, key_states)
        self.values = self._append(1, values, value_states)
        return self.keys, self.values

    def _append(self, which: int, held: Tensor, new: Tensor) -> Tensor:
        before = held.shape[2]
        end = before + new.shape[2]
        buffer = self._buffers[which]
        # generate() replaces the tensors when it reorders beams.
        if buffer is None or held.data_ptr() != buffer.data_ptr() or end > buffer.shape[2]:
            rows, heads, _, width = held.shape
            buffer = held.new_empty(rows, heads, end + SPARE_TOKENS, width)
            buffer[:, :, :before] = held
            self._buffers[which] = buffer
        buffer[:, :, before:end] = new
        return buffer[:, :, :end]


def cache_of(kv: Iterable[KV]) -> DynamicCache:
    """Create a cache from keys and values, without copying them.

    The given tensors are never modified.

    Args:
        kv: Keys and values of each layer.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    for keys, values in kv:
        layer = GrowingLayer()
        layer.hold(keys, values)
        cache.layers.append(layer)
    return cache
