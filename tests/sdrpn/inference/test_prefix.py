"""Prefixes and batches of rows by hand, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdrpn.backbones.base import Segment
from sdrpn.backbones.cache import KV
from sdrpn.inference.prefix import Prefix, batch_rows, free_memory, stack


def layer(tokens: int, value: float = 1.0) -> KV:
    """Keys and values of one head and two channels."""
    return torch.full((1, 1, tokens, 2), value), torch.full((1, 1, tokens, 2), -value)


def segment(tokens: int, *, axes: int = 1, start: int = 0) -> Segment:
    embeds = torch.arange(1.0, 1 + 3 * tokens).reshape(tokens, 3)
    positions = torch.arange(start, start + tokens).repeat(axes, 1)
    return Segment(tuple(range(tokens)), embeds, positions, start + tokens)


def test_a_prefix_counts_its_tokens_and_bytes() -> None:
    """Three tokens of text, four of the image; keys and values of two layers and of one more."""
    keys = torch.zeros(1, 4, 5)
    ids = tuple(range(7))
    prefix = Prefix((layer(7), layer(7)), (layer(7),), keys, ids, slice(3, 7), 7)
    assert (prefix.length, prefix.image_tokens) == (7, 4)
    # 3 layers x keys and values x 7 tokens x 2 channels, and 4 x 5 image keys, of 4 bytes each.
    assert prefix.nbytes == 4 * (3 * 2 * 7 * 2 + 4 * 5)
    assert Prefix((layer(7),), (), None, ids, slice(3, 7), 7).nbytes == 4 * 2 * 7 * 2


def test_positions_have_all_their_axes() -> None:
    """Two rows of three axes each, of one and two tokens."""
    batch = batch_rows([segment(1, axes=3, start=5), segment(2, axes=3, start=8)], [0, 0])
    assert batch.positions.tolist() == [[[0, 5], [8, 9]]] * 3
    assert batch.embeds.tolist() == [[[0, 0, 0], [1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]
    assert batch.mask.tolist() == [[0, 1], [1, 1]]


def test_every_row_needs_the_length_of_its_prefix() -> None:
    for lengths in ([3], [3, 3, 3]):
        with pytest.raises(ValueError, match="zip"):
            batch_rows([segment(2), segment(2)], lengths)


def test_rows_of_one_prefix_share_its_memory() -> None:
    own = (layer(3), layer(3, 2.0))
    cache: Any = stack([own, own, own])
    for (keys, values), found in zip(own, cache.layers, strict=True):
        assert found.keys.shape == (3, 1, 3, 2)
        assert found.keys.data_ptr() == keys.data_ptr()
        assert found.values.data_ptr() == values.data_ptr()


def test_prefixes_of_unlike_depth_make_no_batch() -> None:
    with pytest.raises(ValueError, match="zip"):
        stack([(layer(3),), (layer(3), layer(3))])


def test_free_memory_is_the_device_s_or_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU (free, total) bytes are known, each device's own."""
    known = {torch.device("cuda", 0): (5, 9), torch.device("cuda", 1): (7, 9)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: known[device])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=11, total=99))
    assert [free_memory(torch.device("cuda", i)) for i in (0, 1)] == [5, 7]
    assert free_memory(torch.device("cpu")) == 11
