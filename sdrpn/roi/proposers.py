"""Where to look again: the proposers, each from a batch of looks to a batch of proposals.

`rpn` asks the trained network, `attention` reads the model's own answer (training-free), `vicrop`
is the published baseline, `none` is the stock model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdrpn.backbones.base import Backbone
from sdrpn.backbones.cache import KV
from sdrpn.boxes import ImageGrid
from sdrpn.config import LabelConfig, ZoomConfig
from sdrpn.inference.attention_rows import read_rows
from sdrpn.inference.decoder import run_layers
from sdrpn.inference.generation import generate
from sdrpn.inference.prefix import Prefix, batch_rows, stack
from sdrpn.roi.postprocess import Region, blur, darken, propose, refused
from sdrpn.roi.sinks import remove_sinks
from sdrpn.roi.vicrop import NEUTRAL_QUESTION, propose_window, relative_attention
from sdrpn.rpn.checkpoint import RPN

LOOKED_AT = 0.01
"""A cell below this probability for every token of a question is dropped by `thin_above`."""


@dataclass(frozen=True)
class Look:
    """One question about one image, on its way to a region.

    Args:
        prefix: The image, prefilled.
        grid: How its tokens lie on the image.
        question: Token ids after the image.
        zoom: How a map becomes a region.
    """

    prefix: Prefix
    grid: ImageGrid
    question: tuple[int, ...]
    zoom: ZoomConfig

    def shaped(self, values: np.ndarray) -> np.ndarray:
        """One value per image token, [T] -> [rows, columns]."""
        return values.reshape(self.grid.rows, self.grid.columns)


@dataclass(frozen=True)
class Proposal:
    """A region and the map it came from ([rows, columns] float32 in [0, 1], blurred; or None)."""

    region: Region
    roi_map: Float32[np.ndarray, "rows columns"] | None = None


@dataclass(frozen=True)
class Models:
    """What a proposer may ask: the backbone, a trained RPN, and which heads point."""

    backbone: Backbone
    rpn: RPN | None
    labels: LabelConfig | None


Proposer = Callable[[Models, Sequence[Look]], list[Proposal]]


@torch.no_grad()
def roi_logits(models: Models, looks: Sequence[Look]) -> list[Float32[np.ndarray, "_ _"]]:
    """The RPN's maps for a batch of looks: RoI logits [rows, columns] each, float32."""
    states, (cos, sin), keys, rpn = _question_states(models, looks)
    last = cos[:, -1:], sin[:, -1:]
    logits = rpn.roi_logits(states[:, -1], last, pad_sequence(keys, batch_first=True))
    pairs = zip(logits.cpu().numpy(), looks, strict=True)
    return [look.shaped(one[: look.grid.cells]) for one, look in pairs]


@torch.no_grad()
def cells_looked_at(models: Models, look: Look) -> Bool[Tensor, " cells"]:
    """The cells that any token behind the image looks at: a logit above that of `LOOKED_AT`."""
    states, (cos, sin), (keys,), rpn = _question_states(models, [look])
    tokens = states[0]  # one row: no padding among them
    every = cos[0][:, None], sin[0][:, None]
    logits = rpn.roi_logits(tokens, every, keys.expand(len(tokens), -1, -1))
    return logits.max(0).values.sigmoid() > LOOKED_AT


def _question_states(
    models: Models, looks: Sequence[Look]
) -> tuple[Float[Tensor, "batch new width"], KV, list[Tensor], RPN]:
    """What the map head reads of the questions' tokens, their rotary embeddings, the image keys.

    The question runs through backbone layers 0..B-1 and the RPN, over the prefixes' KV.
    """
    backbone, rpn = models.backbone, models.rpn
    if rpn is None:
        raise ValueError("proposer 'rpn' needs an RPN: pass rpn=, or another proposer")
    depth = rpn.branch_layer
    prefixes = [look.prefix for look in looks]
    segments = [backbone.suffix_segment(k.prefix.next_position, k.question) for k in looks]
    batch = batch_rows(segments, [p.length for p in prefixes])
    cache = stack([p.kv[:depth] for p in prefixes])
    inputs = batch.attention(backbone, cache)
    branch = run_layers(backbone.layers[:depth], batch.embeds, inputs, cache)
    states = rpn(branch, inputs, stack([p.rpn_kv for p in prefixes]))
    keys = [p.rpn_keys[0] for p in prefixes if p.rpn_keys is not None]
    return states, inputs.rotary, keys, rpn


def by_rpn(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Sigmoid, blur, threshold, boxes (SD-RPN, section 3.3)."""
    logits, rules = roi_logits(models, looks), models.backbone.map_rules
    maps = [darken(torch.sigmoid(torch.from_numpy(one)).numpy(), rules) for one in logits]
    shown = [
        blur(_over_its_maximum(one) if look.zoom.relative else one)
        for one, look in zip(maps, looks, strict=True)
    ]
    return _from_maps(models, shown, looks)


def _over_its_maximum(values: np.ndarray) -> np.ndarray:
    peak = values.max()
    return values / peak if peak > 0 else values


def known_labels(models: Models) -> LabelConfig:
    """Which heads point at the answer; ValueError where that is not known of this model, or is
    known of another."""
    if models.labels is None:
        raise ValueError(
            f"it is not known which attention heads of {models.backbone.name} point at the answer: "
            "pass labels=LabelConfig(...), or an RPN that was trained with them"
        )
    text = models.backbone.text_config
    models.labels.check_fits(text.num_hidden_layers, text.num_attention_heads, models.backbone.name)
    return models.labels


def response_attention(
    models: Models,
    looks: Sequence[Look],
    responses: Sequence[Sequence[int]],
    labels: LabelConfig | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Grounding and sink maps, [T] each, of given responses; every response must have a token.

    labels: the heads to read; None for those that are known of the model. Without sink heads the
    sink map is 0. Raises ValueError where it is not known which heads of this model point.
    """
    labels = labels or known_labels(models)
    rows = read_rows(
        models.backbone,
        [look.prefix for look in looks],
        [(*look.question, *r) for look, r in zip(looks, responses, strict=True)],
        [len(r) for r in responses],
        [choice.layer for choice in (*labels.grounding, *labels.sink)],
    )
    grounding = rows.mean(labels.grounding)
    sink = rows.mean(labels.sink) if labels.sink else [one * 0 for one in grounding]
    pairs = zip(grounding, sink, strict=True)
    return [(one.cpu().numpy(), other.cpu().numpy()) for one, other in pairs]


def by_attention(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Where the model's own answer looked: the grounding map, sinks removed, over its maximum."""
    backbone, labels = models.backbone, known_labels(models)
    prefixes = [look.prefix for look in looks]
    asked = [backbone.suffix_segment(k.prefix.next_position, k.question) for k in looks]
    said = generate(backbone, prefixes, asked, {"max_new_tokens": labels.max_new_tokens})
    # Where tokens past the model's context look means nothing.
    rooms = [backbone.room(look.grid.cells, look.question) for look in looks]
    responses = [one[:room] for one, room in zip(said, rooms, strict=True)]
    proposals = [Proposal(Region(reason="the model's first answer was empty")) for _ in looks]
    spoken = [i for i, response in enumerate(responses) if response]
    if not spoken:
        return proposals
    some = [looks[i] for i in spoken]
    maps = []
    read = response_attention(models, some, [responses[i] for i in spoken])
    for look, (grounding, sink) in zip(some, read, strict=True):
        clean = remove_sinks(grounding, sink, labels.sink_threshold)
        maps.append(blur(look.shaped(_over_its_maximum(clean))))
    for i, proposal in zip(spoken, _from_maps(models, maps, some), strict=True):
        proposals[i] = proposal
    return proposals


def by_vicrop(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """The last prompt token's attention over that of a neutral prompt (arXiv 2502.17422)."""
    backbone = models.backbone
    layer = models.labels.vicrop_layer if models.labels else round(backbone.num_layers * 14 / 32)
    neutral = backbone.prompt_ids(NEUTRAL_QUESTION).after

    def attention(prefixes: list[Prefix], suffixes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        rows = read_rows(backbone, prefixes, suffixes, [1] * len(prefixes), [layer])
        return [one.mean(0).cpu().numpy() for one in rows.by_layer[layer]]

    asked_maps = attention([look.prefix for look in looks], [look.question for look in looks])
    # The neutral prompt asks the same of every question on an image: once is enough.
    images = {id(look.prefix): look.prefix for look in looks}
    plain_maps = attention([*images.values()], [neutral] * len(images))
    plain = dict(zip(images, plain_maps, strict=True))
    proposals = []
    for look, asked in zip(looks, asked_maps, strict=True):
        ratio = look.shaped(relative_attention(asked, plain[id(look.prefix)]))
        shown = (ratio / ratio.max()).astype(np.float32)
        region = propose_window(ratio, look.grid)
        if refusal := refused(region.boxes[0], backbone.map_rules):
            region = Region(reason=refusal)
        proposals.append(Proposal(region, shown))
    return proposals


def by_none(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """The stock model: no second look."""
    return [Proposal(Region(reason="proposer none")) for _ in looks]


def _from_maps(models: Models, maps: Sequence[np.ndarray], looks: Sequence[Look]) -> list[Proposal]:
    rules = models.backbone.map_rules
    pairs = zip(maps, looks, strict=True)
    return [Proposal(propose(one, look.grid, look.zoom, rules), one) for one, look in pairs]


BY_NAME: Mapping[str, Proposer] = {
    "rpn": by_rpn,
    "attention": by_attention,
    "vicrop": by_vicrop,
    "none": by_none,
}
