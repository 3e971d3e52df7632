"""Prefixes and batches of rows by hand, most of them without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdrpn.backbones.base import Segment
from sdrpn.backbones.cache import KV, cache_of
from sdrpn.backbones.llava15 import Llava15
from sdrpn.inference.prefix import (
    Context,
    Prefix,
    PrefixCache,
    batch_rows,
    by_length,
    free_memory,
    last_kv,
    prefill,
    prefill_segments,
    stack,
    stack_pieces,
)
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import make_image


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
    # 7 x 6 hidden states of 4 bytes and 3 x 7 positions of 8.
    hidden, positions = torch.zeros(7, 6), torch.zeros(3, 7, dtype=torch.long)
    lower = Prefix((layer(7),), (), None, ids, slice(3, 7), 7, hidden, positions)
    assert lower.nbytes == 4 * (2 * 7 * 2 + 7 * 6) + 8 * 3 * 7


def test_a_prefix_is_a_context_of_one_piece_a_layer() -> None:
    first, second = layer(7), layer(7, 2.0)
    prefix = Prefix((first, second), (), None, tuple(range(7)), slice(3, 7), 7)
    assert [[*layers] for layers in prefix.pieces] == [[first], [second]]


def test_a_context_is_shortened_in_its_last_piece() -> None:
    """Two layers of three tokens and two more, of which the upper layer kept one."""
    pieces = ((layer(3), layer(2, 5.0)), (layer(3), layer(1, 6.0)))
    short = Context((1, 2, 3, 4, 5), pieces, torch.zeros(4)).without_last()
    assert (short.ids, short.length, short.state) == ((1, 2, 3, 4), 4, None)
    assert [[keys.shape[2] for keys, _ in row] for row in short.pieces] == [[3, 1], [3, 0]]
    assert [[values.shape[2] for _, values in row] for row in short.pieces] == [[3, 1], [3, 0]]
    keys, values = short.pieces[0][1]
    assert (keys.tolist(), values.tolist()) == ([[[[5.0, 5.0]]]], [[[[-5.0, -5.0]]]])
    ramp = torch.arange(3.0).reshape(1, 1, 3, 1)
    ((keys, values),) = Context((1, 2, 3), (((ramp, ramp + 9),),)).without_last().pieces[0]
    assert (keys.flatten().tolist(), values.flatten().tolist()) == ([0, 1], [9, 10])


def test_positions_have_all_their_axes() -> None:
    """Two rows of three axes each, of one and two tokens."""
    batch = batch_rows([segment(1, axes=3, start=5), segment(2, axes=3, start=8)], [0, 0])
    assert batch.positions.tolist() == [[[0, 5], [8, 9]]] * 3
    assert batch.embeds.tolist() == [[[0, 0, 0], [1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]
    assert batch.mask.tolist() == [[0, 1], [1, 1]]


def test_padding_of_prefixes_and_of_segments_is_masked() -> None:
    """Columns: four of the longest prefix, then two of the longest segment."""
    batch = batch_rows([segment(2), segment(1)], [1, 4])
    assert batch.mask.tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]]
    assert batch.mask.dtype == torch.long
    assert batch.prefix_length == 4


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
    cache = stack_pieces([((own[0],),)] * 2)
    assert cache.layers[0].keys.data_ptr() == own[0][0].data_ptr()


def test_a_batch_leaves_room_for_its_segments_behind_the_prefixes() -> None:
    """Two prefixes of one and two tokens, and two new tokens that are written in place."""
    batch = batch_rows([segment(2), segment(1)], [1, 2])
    cache: Any = batch.cache_of([(layer(1, 3.0),), (layer(2, 4.0),)])
    (held,) = cache.layers
    assert held.keys[..., 0].tolist() == [[[0, 3]], [[4, 4]]]
    assert held.values[..., 0].tolist() == [[[0, -3]], [[-4, -4]]]
    before = held.keys.data_ptr(), held.values.data_ptr()
    new = torch.full((2, 1, 2, 2), 7.0)
    keys, values = held.update(new, -new)
    assert keys[..., 0].tolist() == [[[0, 3, 7, 7]], [[4, 4, 7, 7]]]
    assert values[..., 0].tolist() == [[[0, -3, -7, -7]], [[-4, -4, -7, -7]]]
    assert (held.keys.data_ptr(), held.values.data_ptr()) == before
    held.update(new[:, :, :1], new[:, :, :1])  # more than there is room for
    assert held.keys.data_ptr() != before[0]
    assert held.keys[..., 0].tolist() == [[[0, 3, 7, 7, 7]], [[4, 4, 7, 7, 7]]]


def test_a_prefix_with_room_behind_it_is_not_written_to() -> None:
    own = (layer(2),)
    cache: Any = stack([own, own], room=1)
    cache.layers[0].update(torch.full((2, 1, 1, 2), 7.0), torch.full((2, 1, 1, 2), 7.0))
    assert own[0][0].tolist() == layer(2)[0].tolist()
    assert cache.layers[0].keys.shape == (2, 1, 3, 2)
    assert cache.layers[0].keys.data_ptr() != own[0][0].data_ptr()


def test_pieces_of_a_row_follow_each_other_behind_its_padding() -> None:
    """Rows of two and one tokens, and of one; then a layer in which the rows have other lengths."""
    first = ((layer(2), layer(1, 2.0)), (layer(1, 3.0),))
    second = ((layer(1, 4.0),), (layer(1, 5.0), layer(1, 6.0)))
    cache: Any = stack_pieces([first, second])
    lower, upper = cache.layers
    assert lower.keys[..., 0].tolist() == [[[1, 1, 2]], [[0, 0, 4]]]
    assert lower.values[..., 1].tolist() == [[[-1, -1, -2]], [[0, 0, -4]]]
    assert upper.keys[..., 0].tolist() == [[[0, 3]], [[5, 6]]]


def test_rows_share_memory_only_if_all_of_them_are_one_prefix() -> None:
    one, other = layer(2), layer(2, 2.0)
    for rows in ([one, one, other], [one, other, one]):
        cache: Any = stack([(row,) for row in rows])
        assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [
            float(row[0][0, 0, 0, 0]) for row in rows
        ]
    cache = stack_pieces([((one, other),), ((one,),)])
    assert cache.layers[0].keys[..., 0].tolist() == [[[1, 1, 2, 2]], [[0, 0, 1, 1]]]
    cache = stack_pieces([((one,),), ((one, other),)])
    assert cache.layers[0].keys[..., 0].tolist() == [[[0, 0, 1, 1]], [[1, 1, 2, 2]]]


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


def test_items_of_one_length_are_run_together_and_keep_their_order() -> None:
    runs: list[list[str]] = []

    def run(some: list[str]) -> list[str]:
        runs.append(some)
        return [word.upper() for word in some]

    assert by_length(["ab", "c", "de", "fgh", "i"], [2, 1, 2, 3, 1], run) == [
        *("AB", "C", "DE", "FGH", "I")
    ]
    assert runs == [["ab", "de"], ["c", "i"], ["fgh"]]
    assert by_length([], [], run) == []
    with pytest.raises(ValueError, match="zip"):
        by_length(["a", "b"], [1, 1], lambda some: some[:1])


def test_the_last_tokens_of_a_row_do_not_keep_its_batch_in_memory() -> None:
    """Two rows of three tokens in two layers; keys count up, values down."""
    keys = torch.arange(6.0).reshape(2, 1, 3, 1)
    cache = cache_of([(keys, -keys), (keys + 10, -keys - 10)])
    found = last_kv(cache, 1, 2)
    assert [pair[0].flatten().tolist() for pair in found] == [[4, 5], [14, 15]]
    assert [pair[1].flatten().tolist() for pair in found] == [[-4, -5], [-14, -15]]
    assert [part.shape for pair in found for part in pair] == [(1, 1, 2, 1)] * 4
    assert {part.untyped_storage().nbytes() for pair in found for part in pair} == {2 * 4}
    ((upper, _),) = last_kv(cache, 0, 1, first_layer=1)
    assert upper.flatten().tolist() == [12]
    alone = cache_of([(keys[:1].clone(), -keys[:1])])
    ((own, _),) = last_kv(alone, 0, 3)
    layers: Any = alone.layers
    assert own.data_ptr() == layers[0].keys.data_ptr()


@pytest.mark.parametrize("lower_only", [None, False, True])
def test_a_prefix_ends_at_the_branch_only_if_asked_to(
    llava: Llava15, fresh_rpn: RPN, lower_only: bool | None
) -> None:
    """Of six layers the RPN branches off after two."""
    inputs = llava.preprocess([make_image(90, 60, 0), make_image(60, 90, 1)])
    options = {} if lower_only is None else {"lower_only": lower_only}
    segments = [
        llava.prefix_segment(image, tokens)
        for image, tokens in zip(inputs, llava.encode(inputs), strict=True)
    ]
    for found in (
        prefill(llava, fresh_rpn, inputs, **options),
        prefill_segments(llava, fresh_rpn, segments, **options),
    ):
        for prefix, segment in zip(found, segments, strict=True):
            assert len(prefix.kv) == (2 if lower_only else 6)
            assert (len(prefix.rpn_kv), prefix.ids) == (2, segment.ids)
            if lower_only:
                assert prefix.hidden is not None
                assert prefix.positions is not None
                assert prefix.hidden.shape == segment.embeds.shape
                assert torch.equal(prefix.positions, segment.positions)
            else:
                assert (prefix.hidden, prefix.positions) == (None, None)


def prefix_of(tokens: int) -> Prefix:
    """A prefix of 16 bytes a token."""
    return Prefix((layer(tokens),), (), None, tuple(range(tokens)), slice(0, tokens), tokens)


def test_a_full_cache_evicts_what_was_used_longest_ago() -> None:
    cache = PrefixCache(64)
    first, second = prefix_of(2), prefix_of(2)
    cache.put("first", first)
    cache.put("second", second)
    assert (len(cache), cache.nbytes, cache.max_bytes) == (2, 64, 64)
    assert cache.get("first") is first
    assert cache.get("unknown") is None
    cache.put("third", prefix_of(1))
    assert ["first" in cache, "second" in cache, "third" in cache] == [True, False, True]
    assert cache.nbytes == 48
    cache.put("all", prefix_of(4))
    assert (len(cache), cache.nbytes) == (1, 64)
    cache.put("too large", prefix_of(5))
    assert (len(cache), "too large" in cache) == (1, False)
    cache.clear()
    assert (len(cache), cache.nbytes, "all" in cache) == (0, 0, False)


def test_a_cached_prefix_stays_unless_it_is_replaced() -> None:
    cache = PrefixCache(64)
    old, new = prefix_of(1), prefix_of(2)
    cache.put("image", old)
    cache.put("image", new)
    assert (cache.get("image"), cache.nbytes) == (old, 16)
    cache.put("image", new, replace=True)
    assert (cache.get("image"), cache.nbytes, len(cache)) == (new, 32, 1)
    cache.put("image", prefix_of(5), replace=True)
    assert (cache.get("image"), cache.nbytes, len(cache)) == (None, 0, 0)


def test_a_cache_has_no_negative_size() -> None:
    assert PrefixCache(0).max_bytes == 0
    with pytest.raises(ValueError, match=r"prefix_cache must be 0 .* got -1"):
        PrefixCache(-1)
