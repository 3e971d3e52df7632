"""Prefixes: the KV of everything up to the last image token, and a cache of them.

Nothing up to the last image token depends on the question, so an image is prefilled once, and any
number of questions, looks and zooms grow from its prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache

from sdrpn.backbones.base import AttentionInputs, Backbone, ImageInput, Segment
from sdrpn.backbones.cache import KV, cache_of
from sdrpn.inference.decoder import fill_cache


@runtime_checkable
class BranchNetwork(Protocol):
    """A network that branches off the backbone and has a cache of its own: the RPN."""

    @property
    def branch_layer(self) -> int:
        """It reads the hidden state that enters this backbone layer."""
        ...

    def __call__(self, hidden: Tensor, inputs: AttentionInputs, cache: Cache | None) -> Tensor:
        """Run its layers. hidden: [B, N, C]. Returns [B, N, C]."""
        ...

    def image_keys(self, states: Tensor, rotary: KV) -> Tensor:
        """Keys of its map head: [B, N, C] -> [B, N, kv heads * d]."""
        ...


@dataclass(frozen=True)
class Prefix:
    """[text before the image][image tokens], P tokens, as the backbone and the RPN remember them.

    Args:
        kv: Keys and values of all backbone layers, each [1, heads, P, d].
        rpn_kv: Those of the RPN's own R-1 layers; empty without an RPN.
        rpn_keys: Image keys of the RPN's map head, [1, T, kv heads * d]; None without an RPN.
        ids: Token ids, P of them.
        image: Columns of the T image tokens.
        next_position: The position of a text token right behind the prefix.
    """

    kv: tuple[KV, ...]
    rpn_kv: tuple[KV, ...]
    rpn_keys: Float[Tensor, "1 cells channels"] | None
    ids: tuple[int, ...]
    image: slice
    next_position: int

    @property
    def length(self) -> int:
        """P, the tokens of the prefix."""
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        """T, the image tokens of the prefix."""
        return self.image.stop - self.image.start

    @property
    def nbytes(self) -> int:
        """Bytes that the prefix keeps alive."""
        tensors = [t for pair in (*self.kv, *self.rpn_kv) for t in pair]
        if self.rpn_keys is not None:
            tensors.append(self.rpn_keys)
        return sum(t.nbytes for t in tensors)


@dataclass(frozen=True)
class Batch:
    """Segments of several rows, side by side and left-padded, behind their prefixes.

    Args:
        embeds: [B, N, C].
        mask: [B, P + N], 1 where there is a token, 0 in both gaps.
        positions: [A, B, N].
        prefix_length: P, the length of the longest prefix.
    """

    embeds: Float[Tensor, "batch new width"]
    mask: Int[Tensor, "batch all"]
    positions: Int[Tensor, "axes batch new"]
    prefix_length: int

    def attention(self, backbone: Backbone, cache: Cache | None = None) -> AttentionInputs:
        """What the decoder layers need to know of these rows."""
        return backbone.attention_inputs(self.embeds, self.mask, self.positions, cache)


def batch_rows(segments: Sequence[Segment], prefix_lengths: Sequence[int]) -> Batch:
    """Batch segments that stand behind prefixes of these lengths (0: behind nothing).

    Every row ends in the same column. Where prefixes differ in length, the shorter ones are padded
    on their left, as `stack` pads their keys and values.
    """
    longest, behind = max(s.length for s in segments), max(prefix_lengths)
    first = segments[0]
    embeds = first.embeds.new_zeros(len(segments), longest, first.embeds.shape[-1])
    positions = first.positions.new_zeros(len(first.positions), len(segments), longest)
    mask = torch.ones(len(segments), behind + longest, dtype=torch.long, device=embeds.device)
    for row, (segment, own) in enumerate(zip(segments, prefix_lengths, strict=True)):
        gap = longest - segment.length
        embeds[row, gap:] = segment.embeds
        positions[:, row, gap:] = segment.positions
        mask[row, : behind - own] = 0
        mask[row, behind : behind + gap] = 0
    return Batch(embeds, mask, positions, behind)


def stack(prefixes: Sequence[tuple[KV, ...]]) -> DynamicCache:
    """One cache for a batch, a row for each prefix, left-padded; a prefix may stand in many rows.

    Rows of one prefix alone share its memory until the cache grows, which copies it.
    """
    layers = zip(*prefixes, strict=True)
    return cache_of(
        (_joined([k for k, _ in rows]), _joined([v for _, v in rows])) for rows in layers
    )


def _joined(rows: Sequence[Tensor]) -> Tensor:
    if all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), -1, -1, -1)
    longest = max(row.shape[2] for row in rows)
    return torch.cat([pad(row, (0, 0, longest - row.shape[2], 0)) for row in rows])


@torch.no_grad()
def prefill(
    backbone: Backbone, rpn: BranchNetwork | None, inputs: Sequence[ImageInput]
) -> list[Prefix]:
    """Prefill images in one batch: each becomes a Prefix."""
    features = backbone.encode(inputs)
    segments = [
        backbone.prefix_segment(one, tokens) for one, tokens in zip(inputs, features, strict=True)
    ]
    return prefill_segments(backbone, rpn, segments)


@torch.no_grad()
def prefill_segments(
    backbone: Backbone, rpn: BranchNetwork | None, segments: Sequence[Segment]
) -> list[Prefix]:
    """Prefill segments that begin a sequence and end with an image: each becomes a Prefix."""
    batch = batch_rows(segments, [0] * len(segments))
    cache = cache_of([])
    attention = batch.attention(backbone, cache)
    branch: dict[int, Tensor] = {}

    def keep_branch(layer: int, entering: Tensor, _: KV) -> None:
        if rpn is not None and layer == rpn.branch_layer:
            branch[layer] = entering

    fill_cache(backbone, backbone.layers, batch.embeds, attention, cache, keep_branch)
    rpn_cache, keys = cache_of([]), None
    if rpn is not None:
        states = rpn(branch[rpn.branch_layer], attention, rpn_cache)
        keys = rpn.image_keys(states, attention.rotary)
    alone = len(segments) == 1
    prefixes = []
    for row, segment in enumerate(segments):
        gap = batch.embeds.shape[1] - segment.length
        image = slice(gap + segment.image.start, gap + segment.image.stop)
        prefixes.append(
            Prefix(
                kv=_row(cache, row, gap, alone),
                rpn_kv=_row(rpn_cache, row, gap, alone),
                rpn_keys=None if keys is None else keys[row : row + 1, image].clone(),
                ids=segment.ids,
                image=segment.image,
                next_position=segment.next_position,
            )
        )
    return prefixes


def _row(cache: DynamicCache, row: int, gap: int, alone: bool) -> tuple[KV, ...]:
    # A slice would keep the whole batch's tensors alive in the cache of prefixes.
    layers: Any = cache.layers
    pairs = [
        (layer.keys[row : row + 1, :, gap:], layer.values[row : row + 1, :, gap:])
        for layer in layers
    ]
    return tuple(pairs if alone else [(k.clone(), v.clone()) for k, v in pairs])


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device, or on the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class PrefixCache:
    """Prefixes by image content, least recently used out first, bounded in bytes (0: off)."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"prefix_cache must be 0 (off) or a number of bytes, got {max_bytes}")
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def clear(self) -> None:
        """Forget every prefix."""
        self._prefixes.clear()
        self.nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._prefixes

    def get(self, key: str) -> Prefix | None:
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
        return self._prefixes.get(key)

    def put(self, key: str, prefix: Prefix) -> None:
        if key in self._prefixes or prefix.nbytes > self.max_bytes:
            return
        self._prefixes[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.max_bytes:
            _, oldest = self._prefixes.popitem(last=False)
            self.nbytes -= oldest.nbytes
