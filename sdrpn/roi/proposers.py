"""Where to look again: the proposers, each from a batch of looks to a batch of regions.

`rpn` asks the trained network, `attention` reads the model's own answer (training-free),
`vicrop` is the published baseline, `none` is stock LLaVA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdrpn.backbones.llava15 import Llava
from sdrpn.config import LabelConfig, ZoomConfig
from sdrpn.distill.pseudo_labels import remove_sinks
from sdrpn.inference.attention_rows import Rows, read_rows
from sdrpn.inference.decoder import run_layers
from sdrpn.inference.generation import Suffix, generate
from sdrpn.inference.prefix import Prefix, pad_between, stack
from sdrpn.roi.postprocess import Region, View, blur, propose
from sdrpn.roi.vicrop import NEUTRAL_QUESTION, propose_window, relative_attention
from sdrpn.rpn.model import RPN


@dataclass(frozen=True)
class Look:
    """One question about one image, on its way to a region."""

    prefix: Prefix
    view: View
    question: tuple[int, ...]
    zoom: ZoomConfig


@dataclass(frozen=True)
class Proposal:
    """A region and the map it came from ([grid, grid] float32 in [0, 1], blurred; or None)."""

    region: Region
    roi_map: np.ndarray | None = None


@dataclass(frozen=True)
class Models:
    """What a proposer may ask: the backbone, a trained RPN, and which heads point."""

    llava: Llava
    rpn: RPN | None
    labels: LabelConfig | None


Proposer = Callable[[Models, Sequence[Look]], list[Proposal]]


@torch.no_grad()
def roi_logits(models: Models, looks: Sequence[Look]) -> np.ndarray:
    """The RPN's map for a batch of looks: RoI logits [B, grid, grid], float32 (METHOD section 2).

    The question runs through backbone layers 0..B-1 and the RPN, over the prefixes' KV.
    """
    llava, rpn = models.llava, models.rpn
    if rpn is None:
        raise ValueError("proposer 'rpn' needs an RPN: pass rpn=, or another proposer")
    depth = rpn.config.branch_layer
    prefixes = [look.prefix for look in looks]
    words = [llava.embed(look.question) for look in looks]
    embeds, mask = pad_between(prefixes[0].length, words)
    cache = stack([p.kv[:depth] for p in prefixes])
    span = llava.span(embeds, mask, cache)
    branch = run_layers(llava.layers[:depth], embeds, span, cache)
    states = rpn(branch, span, stack([p.rpn_kv for p in prefixes]))
    keys = torch.cat([p.rpn_keys for p in prefixes if p.rpn_keys is not None])
    logits = rpn.roi_logits(states[:, -1], keys)
    return logits.cpu().numpy().reshape(-1, llava.grid, llava.grid)


def by_rpn(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Sigmoid, blur, threshold, boxes (METHOD section 3)."""
    logits = roi_logits(models, looks)
    maps = [torch.sigmoid(torch.from_numpy(one)).numpy() for one in logits]
    shown = [
        blur(_over_its_maximum(one) if look.zoom.relative else one)
        for one, look in zip(maps, looks, strict=True)
    ]
    return _from_maps(shown, looks)


def _over_its_maximum(values: np.ndarray) -> np.ndarray:
    peak = values.max()
    return values / peak if peak > 0 else values


def known_labels(models: Models) -> LabelConfig:
    """Which heads point at the answer; ValueError where that is not known of this model, or is
    known of another."""
    if models.labels is None:
        raise ValueError(
            f"it is not known which attention heads of {models.llava.name} point at the answer: "
            "pass labels=LabelConfig(...), or an RPN that was trained with them"
        )
    text = models.llava.text_config
    models.labels.check_fits(text.num_hidden_layers, text.num_attention_heads, models.llava.name)
    return models.labels


def response_attention(
    models: Models, looks: Sequence[Look], responses: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Grounding and sink maps [B, T] of given responses (METHOD section 4); rows must have tokens.

    Raises ValueError where it is not known which heads of this model point.
    """
    labels = known_labels(models)
    rows = read_rows(
        models.llava,
        [look.prefix for look in looks],
        [(*look.question, *r) for look, r in zip(looks, responses, strict=True)],
        [len(r) for r in responses],
        [choice.layer for choice in (*labels.grounding, *labels.sink)],
    )
    return _numpy(rows, labels, "grounding"), _numpy(rows, labels, "sink")


def _numpy(rows: Rows, labels: LabelConfig, which: str) -> np.ndarray:
    return rows.mean(getattr(labels, which)).cpu().numpy()


def by_attention(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Where the model's own answer looked: the grounding map, sinks removed, over its maximum."""
    llava, labels = models.llava, known_labels(models)
    prefixes, words = [look.prefix for look in looks], [Suffix(look.question) for look in looks]
    said = generate(llava, prefixes, words, {"max_new_tokens": labels.max_new_tokens})
    # Where tokens past the model's context look means nothing.
    responses = [r[: llava.room(look.question)] for r, look in zip(said, looks, strict=True)]
    proposals = [Proposal(Region(reason="the model's first answer was empty")) for _ in looks]
    spoken = [i for i, response in enumerate(responses) if response]
    if not spoken:
        return proposals
    asked = [looks[i] for i in spoken]
    grounding, sink = response_attention(models, asked, [responses[i] for i in spoken])
    maps = []
    for one, sinks in zip(grounding, sink, strict=True):
        clean = remove_sinks(one, sinks, labels.sink_threshold)
        maps.append(blur(_over_its_maximum(clean).reshape(llava.grid, llava.grid)))
    for i, proposal in zip(spoken, _from_maps(maps, asked), strict=True):
        proposals[i] = proposal
    return proposals


def by_vicrop(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """The last prompt token's attention over that of a neutral prompt (METHOD section 8)."""
    llava = models.llava
    layer = models.labels.vicrop_layer if models.labels else round(llava.num_layers * 14 / 32)
    neutral = llava.question_ids(NEUTRAL_QUESTION)

    def attention(prefixes: list[Prefix], suffixes: list[Sequence[int]]) -> np.ndarray:
        rows = read_rows(llava, prefixes, suffixes, [1] * len(prefixes), [layer])
        return rows.by_layer[layer].mean(1).cpu().numpy()

    asked_maps = attention([look.prefix for look in looks], [look.question for look in looks])
    # The neutral prompt asks the same of every question on an image: once is enough.
    images = {id(look.prefix): look.prefix for look in looks}
    plain_maps = attention([*images.values()], [neutral] * len(images))
    plain = dict(zip(images, plain_maps, strict=True))
    proposals = []
    for look, asked in zip(looks, asked_maps, strict=True):
        ratio = relative_attention(asked, plain[id(look.prefix)]).reshape(llava.grid, llava.grid)
        shown = (ratio / ratio.max()).astype(np.float32)
        proposals.append(Proposal(propose_window(ratio, look.view), shown))
    return proposals


def by_none(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Stock LLaVA: no second look."""
    return [Proposal(Region(reason="proposer none")) for _ in looks]


def _from_maps(maps: Sequence[np.ndarray], looks: Sequence[Look]) -> list[Proposal]:
    pairs = zip(maps, looks, strict=True)
    return [Proposal(propose(one, look.view, look.zoom), one) for one, look in pairs]


BY_NAME: Mapping[str, Proposer] = {
    "rpn": by_rpn,
    "attention": by_attention,
    "vicrop": by_vicrop,
    "none": by_none,
}
