"""An image, read once: the KV of everything up to the last image token, and a cache of such reads.

In LLaVA-1.5 nothing up to the last image token depends on the question (METHOD section 1), so any
number of questions, looks and zooms grow from one prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sdrpn.backbones.llava15 import Llava
from sdrpn.inference.decoder import KV, cache_of, fill_cache
from sdrpn.rpn.model import RPN


@dataclass(frozen=True)
class Prefix:
    """[text before the image][image tokens], P tokens, as the backbone and the RPN remember them.

    kv: keys and values of all L backbone layers, each [1, heads, P, d]. rpn_kv: of the RPN's own
    R-1 layers. rpn_keys: its map head's image keys, [1, T, kv heads x d]; both are empty or None
    without an RPN. image_start: tokens before the image.
    """

    kv: tuple[KV, ...]
    rpn_kv: tuple[KV, ...]
    rpn_keys: Tensor | None
    ids: tuple[int, ...]
    image_start: int

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        tensors = [t for pair in (*self.kv, *self.rpn_kv) for t in pair]
        if self.rpn_keys is not None:
            tensors.append(self.rpn_keys)
        return sum(t.nbytes for t in tensors)


@torch.no_grad()
def read(llava: Llava, rpn: RPN | None, pixels: Tensor) -> list[Prefix]:
    """Read images in one batch: each becomes a Prefix. pixels: [n, 3, side, side], normalised."""
    features = llava.encode(pixels)
    head = llava.embed(llava.head_ids).expand(len(pixels), -1, -1)
    embeds = torch.cat([head, features], dim=1)
    seen = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    cache = cache_of([])
    span = llava.span(embeds, seen, cache)
    branch: dict[int, Tensor] = {}

    def keep_branch(layer: int, entering: Tensor, _: KV) -> None:
        if rpn is not None and layer == rpn.config.branch_layer:
            branch[layer] = entering

    fill_cache(llava.layers, embeds, span, cache, keep_branch)
    rpn_cache, keys = cache_of([]), None
    start = len(llava.head_ids)
    if rpn is not None:
        states = rpn(branch[rpn.config.branch_layer], span, rpn_cache)
        keys = rpn.image_keys(states[:, start:])
    ids = (*llava.head_ids, *[llava.image_token_id] * llava.image_tokens)
    alone = len(pixels) == 1
    return [
        Prefix(
            kv=_row(cache, i, alone),
            rpn_kv=_row(rpn_cache, i, alone),
            rpn_keys=None if keys is None else keys[i : i + 1].clone(),
            ids=ids,
            image_start=start,
        )
        for i in range(len(pixels))
    ]


def _row(cache: DynamicCache, row: int, alone: bool) -> tuple[KV, ...]:
    # A slice would keep the whole batch's tensors alive in the cache of prefixes.
    layers: Any = cache.layers
    pairs = [(layer.keys[row : row + 1], layer.values[row : row + 1]) for layer in layers]
    return tuple(pairs if alone else [(k.clone(), v.clone()) for k, v in pairs])


def stack(prefixes: Sequence[tuple[KV, ...]]) -> DynamicCache:
    """One cache for a batch, a row for each prefix; a prefix may stand in many rows.

    Rows of one prefix alone share its memory until the cache grows, which copies it.
    """
    layers = zip(*prefixes, strict=True)
    return cache_of(
        (_joined([k for k, _ in rows]), _joined([v for _, v in rows])) for rows in layers
    )


def _joined(rows: Sequence[Tensor]) -> Tensor:
    if all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), -1, -1, -1)
    return torch.cat(list(rows))


def pad_between(prefix_length: int, suffixes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Batch suffixes of different length by padding between prefix and suffix.

    suffixes: [n_i, C] each. Returns (embeds [B, N, C], attention mask [B, P + N]): every row ends
    in the same column and starts with the same prefix.
    """
    longest = max(len(s) for s in suffixes)
    embeds = suffixes[0].new_zeros(len(suffixes), longest, suffixes[0].shape[-1])
    mask = torch.ones(
        len(suffixes), prefix_length + longest, dtype=torch.long, device=embeds.device
    )
    for row, suffix in enumerate(suffixes):
        pad = longest - len(suffix)
        embeds[row, pad:] = suffix
        mask[row, prefix_length : prefix_length + pad] = 0
    return embeds, mask


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
