"""The decoder in two parts: the layers below the RPN's branch, and those above it.

The RPN reads the output of layer B-1, so a question has passed the lower layers when it is known
whether and where to zoom. An answer without a zoom continues from there (`resume`). With
`ZoomConfig.keep_tokens`, the upper layers of a zoomed answer run over the image tokens that the
question needs (`thinned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sdrpn.backbones.base import Backbone, Segment
from sdrpn.backbones.cache import KV, GrowingLayer, cache_of
from sdrpn.inference.decoder import fill_cache, run_layers, run_to_last
from sdrpn.inference.prefix import Context, Prefix, batch_rows, by_length, last_kv


@dataclass(frozen=True)
class Lowered:
    """A segment after its prefix, run through layers 0 to B-1.

    Args:
        prefix: The prefix.
        segment: The segment, with the hidden states [n, C] after layer B-1 as its embeddings.
        kv: Its keys and values in layers 0 to B-1, each [1, heads, n, d]; empty if B is 0.
    """

    prefix: Prefix
    segment: Segment
    kv: tuple[KV, ...]


def last_token(segment: Segment) -> Segment:
    """Return the last token of a segment."""
    return replace(
        segment,
        ids=segment.ids[-1:],
        embeds=segment.embeds[-1:],
        positions=segment.positions[:, -1:],
    )


@torch.no_grad()
def run_lower(
    backbone: Backbone, prefixes: Sequence[Prefix], segments: Sequence[Segment], depth: int
) -> list[Lowered]:
    """Run segments through the lower layers, after their prefixes, in one batch.

    Args:
        backbone: The base model.
        prefixes: Prefix of each row.
        segments: Segment of each row.
        depth: B, the number of lower layers.

    Returns:
        The rows' states.
    """
    batch = batch_rows(segments, [p.length for p in prefixes])
    cache = batch.cache_of([p.kv[:depth] for p in prefixes])
    inputs = batch.attention(backbone, cache)
    hidden = run_layers(backbone.layers[:depth], batch.embeds, inputs, cache)
    return [
        Lowered(
            prefix,
            replace(segment, embeds=hidden[row, -segment.length :]),
            last_kv(cache, row, segment.length),
        )
        for row, (prefix, segment) in enumerate(zip(prefixes, segments, strict=True))
    ]


@torch.no_grad()
def resume(backbone: Backbone, rows: Sequence[Lowered]) -> list[Context]:
    """Run the upper layers over segments.

    The result is that of running the segments from layer 0.

    Args:
        backbone: The base model.
        rows: Rows after complete prefixes, with at least two tokens each.

    Returns:
        The rows' contexts.
    """
    depth = len(rows[0].kv)
    segments = [row.segment for row in rows]
    batch = batch_rows(segments, [row.prefix.length for row in rows])
    upper = batch.cache_of([row.prefix.kv[depth:] for row in rows])
    inputs = batch.attention(backbone, upper)
    cache = _from_layer(depth, upper)
    states = run_to_last(backbone, backbone.layers[depth:], batch.embeds, inputs, cache)
    contexts = []
    for number, (row, segment) in enumerate(zip(rows, segments, strict=True)):
        tails = (*row.kv, *last_kv(cache, number, segment.length, depth))
        pieces = tuple(zip(row.prefix.kv, tails, strict=True))
        contexts.append(Context((*row.prefix.ids, *segment.ids), pieces, states[number]))
    return contexts


def _from_layer(depth: int, upper: DynamicCache) -> DynamicCache:
    """Make a cache whose layers from `depth` on are those of `upper`; those below stay empty."""
    cache = cache_of([])
    cache.layers = [*(GrowingLayer() for _ in range(depth)), *upper.layers]
    return cache


@torch.no_grad()
def filled(
    backbone: Backbone, prefixes: Sequence[Prefix], segments: Sequence[Segment]
) -> list[Context]:
    """Run all layers over segments.

    Args:
        backbone: The base model.
        prefixes: Complete prefix of each row.
        segments: Segment of each row, with at least two tokens.

    Returns:
        The rows' contexts.
    """
    return resume(
        backbone, [Lowered(p, segment, ()) for p, segment in zip(prefixes, segments, strict=True)]
    )


@torch.no_grad()
def thinned(
    backbone: Backbone, rows: Sequence[Lowered], keep: Sequence[Bool[Tensor, " _"]]
) -> list[Context]:
    """Run the upper layers over some of the image tokens and the segments.

    Args:
        backbone: The base model.
        rows: Rows whose prefixes hold hidden states.
        keep: Image tokens that the upper layers see, for each row; they see all text.

    Returns:
        The rows' contexts, with fewer tokens in the upper layers.
    """
    depth = len(rows[0].kv)
    parts = _after_kept(rows, keep, [row.segment for row in rows])
    batch = batch_rows(parts, [0] * len(parts))
    inputs = batch.attention(backbone)
    cache = _from_layer(depth, cache_of([]))
    states = run_to_last(backbone, backbone.layers[depth:], batch.embeds, inputs, cache)
    contexts = []
    for number, (row, part) in enumerate(zip(rows, parts, strict=True)):
        lower = zip(row.prefix.kv[:depth], row.kv, strict=True)
        upper = ((pair,) for pair in last_kv(cache, number, part.length, depth))
        ids = (*row.prefix.ids, *row.segment.ids)
        contexts.append(Context(ids, (*lower, *upper), states[number]))
    return contexts


@torch.no_grad()
def thinned_states(
    backbone: Backbone, rows: Sequence[Lowered], keep: Sequence[Bool[Tensor, " _"]]
) -> list[Float[Tensor, "_ width"]]:
    """Run the upper layers as `thinned`, for the states of all tokens.

    Returns:
        [n, C] hidden states of each row's segment, before the final norm.
    """
    depth = len(rows[0].kv)
    parts = _after_kept(rows, keep, [row.segment for row in rows])
    batch = batch_rows(parts, [0] * len(parts))
    hidden = run_layers(backbone.layers[depth:], batch.embeds, batch.attention(backbone))
    return [states[-row.segment.length :] for states, row in zip(hidden, rows, strict=True)]


def _after_kept(
    rows: Sequence[Lowered], keep: Sequence[Tensor], segments: Sequence[Segment]
) -> list[Segment]:
    """Join the kept tokens of each row's prefix and a segment."""
    return [
        _hidden_segment(row.prefix).select_image_tokens(cells).followed_by(segment)
        for row, cells, segment in zip(rows, keep, segments, strict=True)
    ]


def _hidden_segment(prefix: Prefix) -> Segment:
    """Make a segment of a prefix's hidden states after layer B-1."""
    if prefix.hidden is None or prefix.positions is None:
        raise ValueError("the prefix was prefilled without its hidden states")
    return Segment(prefix.ids, prefix.hidden, prefix.positions, prefix.next_position, prefix.image)


@torch.no_grad()
def complete(backbone: Backbone, prefixes: Sequence[Prefix]) -> list[Prefix]:
    """Run the upper layers over prefixes of the lower layers, those of one length in one batch.

    Args:
        backbone: The base model.
        prefixes: Prefixes from `prefill` with `lower_only`.

    Returns:
        Prefixes with the KV of all layers.
    """
    lengths = [prefix.length for prefix in prefixes]
    return by_length(prefixes, lengths, lambda some: _complete_batch(backbone, some))


def _complete_batch(backbone: Backbone, prefixes: Sequence[Prefix]) -> list[Prefix]:
    depth = len(prefixes[0].kv)
    segments = [_hidden_segment(prefix) for prefix in prefixes]
    batch = batch_rows(segments, [0] * len(segments))
    cache = _from_layer(depth, cache_of([]))
    inputs = batch.attention(backbone)
    fill_cache(backbone, backbone.layers[depth:], batch.embeds, inputs, cache)
    done = []
    for row, prefix in enumerate(prefixes):
        upper = last_kv(cache, row, prefix.length, depth)
        done.append(replace(prefix, kv=(*prefix.kv, *upper)))
    return done
