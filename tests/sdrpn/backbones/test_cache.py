"""Keys and values that grow in place are those that a DynamicCache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sdrpn.backbones.cache import SPARE_TOKENS, GrowingLayer, cache_of
from sdrpn.inference.prefix import stack


def tokens(count: int, seed: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 3, count, 4, generator=made) for _ in "kv")
    return keys, values


def caches(room: int) -> tuple[DynamicCache, DynamicCache]:
    """A DynamicCache of five tokens in two rows, and ours with room for more."""
    keys, values = tokens(5, 0)
    plain = DynamicCache()
    plain.update(keys, values, 0)
    rows = [((keys[row : row + 1], values[row : row + 1]),) for row in range(2)]
    return plain, stack(rows, room)


def grow(cache: DynamicCache, steps: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    return [cache.update(*tokens(1, seed + step), 0) for step in range(steps)]


def held(cache: DynamicCache) -> Any:
    return cache.layers[0]


def same(one: DynamicCache, other: DynamicCache) -> bool:
    return torch.equal(held(one).keys, held(other).keys) and torch.equal(
        held(one).values, held(other).values
    )


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_tokens_are_appended(room: int) -> None:
    plain, ours = caches(room)
    steps = SPARE_TOKENS + 5  # past the room that it makes, too
    for (keys, values), found in zip(grow(plain, steps), grow(ours, steps), strict=True):
        assert torch.equal(found[0], keys)
        assert torch.equal(found[1], values)
    assert ours.get_seq_length() == 5 + steps


def test_what_is_held_is_copied_once_in_a_while() -> None:
    _, ours = caches(2)
    places = [found[0].data_ptr() for found in grow(ours, 2 + SPARE_TOKENS + 1)]
    assert len(set(places[:2])) == 1
    assert len(set(places)) == 2
    assert places[2] != places[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.crop(-2),
    ],
)
def test_beams_and_cropped_caches_grow_too(change: Any) -> None:
    plain, ours = caches(50)
    for cache in (plain, ours):
        grow(cache, 3)
        change(cache)
        for step in range(3):
            keys, values = tokens(1, 20 + step, rows=len(held(cache).keys))
            cache.update(keys, values, 0)
    assert same(plain, ours)


def test_a_prefix_is_never_written_to() -> None:
    keys, values = tokens(5, 0)
    before = keys.clone(), values.clone()
    for cache in (cache_of([(keys, values)]), stack([((keys[:1], values[:1]),)])):
        cache.update(*tokens(1, 1, rows=len(held(cache).keys)), 0)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_caches_of_one_prefix_do_not_share_what_follows() -> None:
    keys, values = tokens(5, 0, rows=1)
    one, other = stack([((keys, values),)], room=9), stack([((keys, values),)], room=9)
    one.update(*tokens(1, 1, rows=1), 0)
    kept = held(one).keys.clone()
    other.update(*tokens(1, 2, rows=1), 0)
    assert torch.equal(held(one).keys, kept)


def test_gradients_flow_as_through_a_dynamic_layer() -> None:
    ours, plain = GrowingLayer(), DynamicLayer()
    found = []
    for layer in (ours, plain):
        new = [torch.full((1, 1, 1, 2), float(i), requires_grad=True) for i in range(3)]
        for one in new:
            keys, _ = layer.update(one, one)
        (keys**2).sum().backward()
        found.append([one.grad for one in new])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][2].tolist() == [[[[4.0, 4.0]]]]
