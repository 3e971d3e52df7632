"""Prefixes (the KV cache up to the last image token), and an LRU cache of them.

Nothing up to the last image token depends on the question, so an image is prefilled once for any
number of questions, looks and zooms.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from sdrpn.backbones.base import AttentionInputs, Backbone, ImageInput, Segment
from sdrpn.backbones.cache import KV, GrowingLayer, cache_of
from sdrpn.inference.decoder import fill_cache, run_layers


@runtime_checkable
class BranchNetwork(Protocol):
    """A network that branches off the backbone with its own KV cache, such as the RPN."""

    @property
    def branch_layer(self) -> int:
        """Index of the backbone layer whose input is the network's input."""
        ...

    def __call__(self, hidden: Tensor, inputs: AttentionInputs, cache: Cache | None) -> Tensor:
        """Run the network's layers: [B, N, C] -> [B, N, C]."""
        ...

    def image_keys(self, states: Tensor, rotary: KV) -> Tensor:
        """Compute the keys of the map head: [B, N, C] -> [B, N, kv heads * d]."""
        ...


Item = TypeVar("Item")
Result = TypeVar("Result")

Pieces = tuple[tuple[KV, ...], ...]
"""For each layer, the keys and values of consecutive parts of a sequence."""


@dataclass(frozen=True)
class Context:
    """A row's prompt after all layers, or its tokens before the last.

    Args:
        ids: Token ids.
        pieces: Keys and values, each [1, heads, tokens, d]. Upper layers may have fewer tokens.
        state: [C] output of the last layer for the prompt's last token, before the final norm; None
            if the last token is still to be run.
    """

    ids: tuple[int, ...]
    pieces: Pieces
    state: Float[Tensor, " width"] | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def without_last(self) -> Context:
        """Return the context before its last token."""
        pieces = tuple(
            (*before, (keys[:, :, :-1], values[:, :, :-1]))
            for *before, (keys, values) in self.pieces
        )
        return Context(self.ids[:-1], pieces)


@dataclass(frozen=True)
class Prefix:
    """KV of [text before the image][image tokens], P tokens.

    A prefix of the lower layers only (`prefill` with `lower_only`) keeps the hidden states after
    them, from which `upper.complete` continues.

    Args:
        kv: Keys and values of all backbone layers, or of layers 0 to B-1, each [1, heads, P, d].
        rpn_kv: Keys and values of the RPN's R-1 layers; empty without an RPN.
        rpn_keys: Image keys of the RPN's map head, [1, T, kv heads * d]; None without an RPN.
        ids: [P] token ids.
        image: Columns of the T image tokens.
        next_position: Position of a text token that follows the prefix.
        hidden: [P, C] output of layer B-1; None if it was not kept.
        positions: [A, P] position ids; None without `hidden`.
    """

    kv: tuple[KV, ...]
    rpn_kv: tuple[KV, ...]
    rpn_keys: Float[Tensor, "1 cells channels"] | None
    ids: tuple[int, ...]
    image: slice
    next_position: int
    hidden: Float[Tensor, "prefix width"] | None = None
    positions: Int[Tensor, "axes prefix"] | None = None

    @property
    def pieces(self) -> Pieces:
        """The KV as a `Context` has it."""
        return tuple((pair,) for pair in self.kv)

    @property
    def length(self) -> int:
        """P, the number of tokens."""
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        """T, the number of image tokens."""
        return self.image.stop - self.image.start

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        tensors = [t for pair in (*self.kv, *self.rpn_kv) for t in pair]
        optional = (self.rpn_keys, self.hidden, self.positions)
        tensors += [tensor for tensor in optional if tensor is not None]
        return sum(t.nbytes for t in tensors)


@dataclass(frozen=True)
class Batch:
    """Left-padded segments of several rows, after their prefixes.

    Args:
        embeds: [B, N, C] input embeddings.
        mask: [B, P + N], 1 for tokens, 0 for padding of prefixes and of segments.
        positions: [A, B, N] position ids.
        prefix_length: P, the length of the longest prefix.
    """

    embeds: Float[Tensor, "batch new width"]
    mask: Int[Tensor, "batch all"]
    positions: Int[Tensor, "axes batch new"]
    prefix_length: int

    def attention(self, backbone: Backbone, cache: Cache | None = None) -> AttentionInputs:
        """Compute the decoder layers' mask and rotary embeddings."""
        return backbone.attention_inputs(self.embeds, self.mask, self.positions, cache)

    def cache_of(self, prefixes: Sequence[tuple[KV, ...]]) -> DynamicCache:
        """Batch the KV of the rows' prefixes, with room for the segments; see `stack`."""
        return stack(prefixes, room=self.embeds.shape[1])


def batch_rows(segments: Sequence[Segment], prefix_lengths: Sequence[int]) -> Batch:
    """Batch segments that follow prefixes, left-padded.

    All rows end in the same column. Shorter prefixes are left-padded too, as in `stack`.

    Args:
        segments: Segment of each row.
        prefix_lengths: Length of each row's prefix; 0 for none.
    """
    longest, longest_prefix = max(s.length for s in segments), max(prefix_lengths)
    first = segments[0]
    embeds = first.embeds.new_zeros(len(segments), longest, first.embeds.shape[-1])
    positions = first.positions.new_zeros(len(first.positions), len(segments), longest)
    columns = longest_prefix + longest
    mask = torch.ones(len(segments), columns, dtype=torch.long, device=embeds.device)
    for row, (segment, prefix_length) in enumerate(zip(segments, prefix_lengths, strict=True)):
        padding = longest - segment.length
        embeds[row, padding:] = segment.embeds
        positions[:, row, padding:] = segment.positions
        mask[row, : longest_prefix - prefix_length] = 0
        mask[row, longest_prefix : longest_prefix + padding] = 0
    return Batch(embeds, mask, positions, longest_prefix)


def stack(prefixes: Sequence[tuple[KV, ...]], room: int = 0) -> DynamicCache:
    """Batch the KV of prefixes into one left-padded cache.

    Args:
        prefixes: Keys and values of each row's prefix, by layer.
        room: Number of tokens that will be added. With 0, rows of one prefix share its memory.
    """
    return stack_pieces([tuple((pair,) for pair in prefix) for prefix in prefixes], room)


def stack_pieces(rows: Sequence[Pieces], room: int = 0) -> DynamicCache:
    """Batch the KV of sequences in several parts into one left-padded cache, as `stack`.

    Args:
        rows: Pieces of each row.
        room: As `stack`.
    """
    cache = cache_of([])
    for pieces in zip(*rows, strict=True):
        longest = max(sum(keys.shape[2] for keys, _ in row) for row in pieces)
        keys = _pad_and_concat([[keys for keys, _ in row] for row in pieces], longest, room)
        values = _pad_and_concat([[values for _, values in row] for row in pieces], longest, room)
        layer = GrowingLayer()
        layer.hold(keys, values, longest if room else None)
        cache.layers.append(layer)
    return cache


def _pad_and_concat(rows: Sequence[Sequence[Tensor]], longest: int, room: int) -> Tensor:
    """Left-pad to `longest` tokens, with room behind them: [B, heads, longest + room, d]."""
    first = rows[0]
    shared = len(first) == 1 and all(len(row) == 1 and row[0] is first[0] for row in rows)
    if shared and not room:
        return first[0].expand(len(rows), -1, -1, -1)
    shape = (len(rows), first[0].shape[1], longest + room, first[0].shape[3])
    stacked = first[0].new_empty(shape)
    for row, parts in enumerate(rows):
        start = longest - sum(part.shape[2] for part in parts)
        stacked[row, :, :start] = 0
        for part in parts:
            end = start + part.shape[2]
            stacked[row, :, start:end] = part[0]
            start = end
    return stacked


@torch.no_grad()
def prefill(
    backbone: Backbone,
    rpn: BranchNetwork | None,
    inputs: Sequence[ImageInput],
    *,
    lower_only: bool = False,
) -> list[Prefix]:
    """Prefill images; see `prefill_segments`.

    Args:
        backbone: The base model.
        rpn: The RPN, whose KV is added to the prefixes.
        inputs: Preprocessed images.
        lower_only: Stop at the RPN's branch, and keep the hidden states there.

    Returns:
        A prefix for each image.
    """
    features = backbone.encode(inputs)
    segments = [
        backbone.prefix_segment(image, tokens)
        for image, tokens in zip(inputs, features, strict=True)
    ]
    return prefill_segments(backbone, rpn, segments, lower_only=lower_only)


@torch.no_grad()
def prefill_segments(
    backbone: Backbone,
    rpn: BranchNetwork | None,
    segments: Sequence[Segment],
    *,
    lower_only: bool = False,
) -> list[Prefix]:
    """Prefill segments from `Backbone.prefix_segment`, those of one length in one batch.

    One image keeps a CPU busy, and padding would only add operations.

    Args:
        backbone: The base model.
        rpn: The RPN, whose KV is added to the prefixes.
        segments: Segments that start a sequence and end with an image.
        lower_only: As `prefill`; needs an RPN.

    Returns:
        A prefix for each segment.
    """
    return by_length(
        segments,
        [segment.length for segment in segments],
        lambda some: _prefill_batch(backbone, rpn, some, lower_only),
    )


def by_length(
    items: Sequence[Item], lengths: Sequence[int], run: Callable[[list[Item]], list[Result]]
) -> list[Result]:
    """Run items of equal length together, and return the results in the items' order."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        rows[length].append(row)
    found: dict[int, Result] = {}
    for same in rows.values():
        found |= zip(same, run([items[row] for row in same]), strict=True)
    return [found[row] for row in range(len(items))]


def _prefill_batch(
    backbone: Backbone, rpn: BranchNetwork | None, segments: Sequence[Segment], lower_only: bool
) -> list[Prefix]:
    """Prefill segments of one length, as `prefill_segments`."""
    batch = batch_rows(segments, [0] * len(segments))
    cache = cache_of([])
    attention = batch.attention(backbone, cache)
    depth = 0 if rpn is None else rpn.branch_layer
    hidden = run_layers(backbone.layers[:depth], batch.embeds, attention, cache)
    if not lower_only:
        fill_cache(backbone, backbone.layers[depth:], hidden, attention, cache)
    rpn_cache, keys = cache_of([]), None
    if rpn is not None:
        states = rpn(hidden, attention, rpn_cache)
        keys = rpn.image_keys(states, attention.rotary)
    return [
        Prefix(
            kv=last_kv(cache, row, segment.length),
            rpn_kv=last_kv(rpn_cache, row, segment.length),
            rpn_keys=None if keys is None else keys[row : row + 1, segment.image].clone(),
            ids=segment.ids,
            image=segment.image,
            next_position=segment.next_position,
            hidden=hidden[row].clone() if lower_only else None,
            positions=segment.positions if lower_only else None,
        )
        for row, segment in enumerate(segments)
    ]


def last_kv(cache: DynamicCache, row: int, tokens: int, first_layer: int = 0) -> tuple[KV, ...]:
    """Return the keys and values of a row's last tokens.

    Args:
        cache: A left-padded batch.
        row: The row.
        tokens: Number of tokens.
        first_layer: First layer to return.

    Returns:
        For each layer, [1, heads, tokens, d] keys and values, which do not share a batch's memory.
    """
    layers: Any = cache.layers[first_layer:]
    return tuple(
        (_part(layer.keys, row, tokens), _part(layer.values, row, tokens)) for layer in layers
    )


def _part(states: Tensor, row: int, tokens: int) -> Tensor:
    # A slice of a batch would keep the batch in memory.
    part = states[row : row + 1, :, -tokens:]
    return part if part.shape == states.shape else part.clone()


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device, in bytes; for the CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class PrefixCache:
    """LRU cache of prefixes.

    Args:
        max_bytes: Maximum total size; 0 disables the cache.

    Raises:
        ValueError: If `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"prefix_cache must be 0 (off) or a number of bytes, got {max_bytes}")
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def clear(self) -> None:
        """Remove all prefixes."""
        self._prefixes.clear()
        self.nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._prefixes

    def get(self, key: str) -> Prefix | None:
        """Return a prefix and mark it as recently used; None if it is not cached."""
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
        return self._prefixes.get(key)

    def put(self, key: str, prefix: Prefix, *, replace: bool = False) -> None:
        """Add a prefix, evicting the least recently used; skipped if larger than the cache.

        Args:
            key: Key of the prefix.
            prefix: The prefix.
            replace: Replace a prefix with this key, instead of keeping it.
        """
        if replace and key in self._prefixes:
            self.nbytes -= self._prefixes.pop(key).nbytes
        if key in self._prefixes or prefix.nbytes > self.max_bytes:
            return
        self._prefixes[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.max_bytes:
            _, oldest = self._prefixes.popitem(last=False)
            self.nbytes -= oldest.nbytes
