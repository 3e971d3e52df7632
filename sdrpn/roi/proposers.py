"""Proposers: from a batch of questions about images to a batch of regions.

`rpn` is the trained network, `attention` uses the attention of the model's first answer
(training-free), `vicrop` is a published baseline, and `none` is the stock model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
from sdrpn.inference.generation import generate
from sdrpn.inference.prefix import Prefix, batch_rows, stack
from sdrpn.inference.upper import Lowered, run_lower
from sdrpn.roi.postprocess import Region, blur, darken, propose, unsupported_crop
from sdrpn.roi.sinks import remove_sinks
from sdrpn.roi.vicrop import NEUTRAL_QUESTION, propose_window, relative_attention
from sdrpn.rpn.checkpoint import RPN

RELEVANCE_THRESHOLD = 0.01
"""Cells below this RoI probability for every question token are dropped by `thin_above`."""


@dataclass(frozen=True)
class Look:
    """One question about one image, the input of a proposer.

    Args:
        prefix: The prefilled image.
        grid: Mapping from image tokens to source pixels.
        question: Token ids after the image.
        zoom: Settings for the map's post-processing.
    """

    prefix: Prefix
    grid: ImageGrid
    question: tuple[int, ...]
    zoom: ZoomConfig

    def shaped(self, values: np.ndarray) -> np.ndarray:
        """Reshape one value per image token: [T] -> [rows, columns]."""
        return values.reshape(self.grid.rows, self.grid.columns)


@dataclass(frozen=True)
class Proposal:
    """A region and its map.

    Args:
        region: Boxes to crop, or the reason for no zoom.
        roi_map: [rows, columns] float32 in [0, 1], blurred; None if the proposer has no map.
        logits: [rows, columns] float32 RoI logits; None for proposers other than the RPN.
        gate: Probability of the RPN's learned gate that a zoom helps; None without a gate.
    """

    region: Region
    roi_map: Float32[np.ndarray, "rows columns"] | None = None
    logits: Float32[np.ndarray, "rows columns"] | None = None
    gate: float | None = None


@dataclass(frozen=True)
class Models:
    """Models available to a proposer.

    Args:
        backbone: The base model.
        rpn: A trained RPN.
        labels: Head lists of the base model.
    """

    backbone: Backbone
    rpn: RPN | None
    labels: LabelConfig | None


Proposer = Callable[[Models, Sequence[Look]], list[Proposal]]


@torch.no_grad()
def roi_logits(models: Models, looks: Sequence[Look]) -> list[Float32[np.ndarray, "_ _"]]:
    """Compute the RPN's maps for a batch of looks.

    Args:
        models: The backbone and an RPN.
        looks: Questions about prefilled images.

    Returns:
        [rows, columns] float32 RoI logits for each look.

    Raises:
        ValueError: If there is no RPN.
    """
    return [logits for logits, _ in _read_rpn(models, looks, lower_states(models, looks))]


@torch.no_grad()
def lower_states(models: Models, looks: Sequence[Look]) -> list[Lowered]:
    """Run questions through backbone layers 0 to B-1, over the prefixes' KV.

    Args:
        models: The backbone and an RPN.
        looks: Questions about prefilled images.

    Returns:
        The questions' states for `by_rpn`, and for an answer without a zoom.

    Raises:
        ValueError: If there is no RPN.
    """
    depth = _rpn(models).branch_layer
    prefixes = [look.prefix for look in looks]
    segments = [models.backbone.suffix_segment(k.prefix.next_position, k.question) for k in looks]
    return run_lower(models.backbone, prefixes, segments, depth)


def _rpn(models: Models) -> RPN:
    if models.rpn is None:
        raise ValueError("proposer 'rpn' needs an RPN: pass rpn=, or another proposer")
    return models.rpn


def _read_rpn(
    models: Models, looks: Sequence[Look], lowered: Sequence[Lowered]
) -> list[tuple[Float32[np.ndarray, "_ _"], float | None]]:
    """Compute the RoI logits, [rows, columns] each, and the learned gate's probabilities."""
    rpn = _rpn(models)
    states, (cos, sin), keys = _question_states(models, lowered)
    last = cos[:, -1:], sin[:, -1:]
    logits = rpn.roi_logits(states[:, -1], last, pad_sequence(keys, batch_first=True))
    gates = rpn.gate_probability(states[:, -1])
    probabilities = [None] * len(looks) if gates is None else gates.tolist()
    rows = zip(logits.cpu().numpy(), probabilities, looks, strict=True)
    return [(look.shaped(row[: look.grid.cells]), gate) for row, gate, look in rows]


@torch.no_grad()
def last_states(models: Models, looks: Sequence[Look]) -> Float32[Tensor, "looks width"]:
    """Compute the RPN's states of the last prompt tokens, the input of its learned gate.

    Args:
        models: The backbone and an RPN.
        looks: Questions about prefilled images.

    Returns:
        [n, C].

    Raises:
        ValueError: If there is no RPN.
    """
    states, _, _ = _question_states(models, lower_states(models, looks))
    return states[:, -1].float()


@torch.no_grad()
def relevant_cells(models: Models, look: Look) -> Bool[Tensor, " cells"]:
    """Select the cells with a RoI probability above `RELEVANCE_THRESHOLD` for any question token.

    Args:
        models: The backbone and an RPN.
        look: A question about a prefilled image.

    Returns:
        [T] bool.

    Raises:
        ValueError: If there is no RPN.
    """
    rpn = _rpn(models)
    states, (cos, sin), (keys,) = _question_states(models, lower_states(models, [look]))
    tokens = states[0]  # a single row has no padding
    rotary = cos[0][:, None], sin[0][:, None]
    logits = rpn.roi_logits(tokens, rotary, keys.expand(len(tokens), -1, -1))
    return logits.max(0).values.sigmoid() > RELEVANCE_THRESHOLD


def _question_states(
    models: Models, lowered: Sequence[Lowered]
) -> tuple[Float[Tensor, "batch new width"], KV, list[Tensor]]:
    """Run the RPN over questions behind layer B-1.

    Returns its states [B, N, C], their rotary embeddings, and the image keys of each row.
    """
    prefixes = [one.prefix for one in lowered]
    batch = batch_rows([one.segment for one in lowered], [p.length for p in prefixes])
    cache = batch.cache_of([p.rpn_kv for p in prefixes])
    # An RPN of depth 1 has no layers, and the mask of no use.
    inputs = batch.attention(
        models.backbone, cache if cache.layers else stack([p.kv[:1] for p in prefixes])
    )
    states = _rpn(models)(batch.embeds, inputs, cache)
    return states, inputs.rotary, [p.rpn_keys[0] for p in prefixes if p.rpn_keys is not None]


def by_rpn(
    models: Models, looks: Sequence[Look], lowered: Sequence[Lowered] | None = None
) -> list[Proposal]:
    """Propose regions with the RPN: sigmoid, blur, threshold, boxes (SD-RPN, section 3.3).

    Args:
        models: The backbone and an RPN.
        looks: Questions about prefilled images.
        lowered: Their states from `lower_states`, if known.
    """
    found = _read_rpn(models, looks, lowered or lower_states(models, looks))
    return from_logits(models, looks, found)


def from_logits(
    models: Models,
    looks: Sequence[Look],
    found: Sequence[tuple[Float32[np.ndarray, "_ _"], float | None]],
) -> list[Proposal]:
    """Propose regions from the RPN's output.

    Args:
        models: The backbone, for its rules.
        looks: Questions about prefilled images.
        found: RoI logits, [rows, columns], and the learned gate's probability, for each look.
    """
    rules = models.backbone.map_rules
    maps = [
        blur(darken(torch.sigmoid(torch.from_numpy(logits)).numpy(), rules)) for logits, _ in found
    ]
    return [
        replace(_gated(proposal, gate, look.zoom), logits=logits)
        for proposal, (logits, gate), look in zip(
            _from_maps(models, maps, looks), found, looks, strict=True
        )
    ]


def _gated(proposal: Proposal, gate: float | None, zoom: ZoomConfig) -> Proposal:
    """Note the learned gate's probability, and drop the region if the gate says so."""
    if zoom.learned_gate is None:
        return replace(proposal, gate=gate)
    if gate is None:
        raise ValueError(
            "learned_gate needs an RPN with a gate: train one with `sdrpn train-gate`, or leave "
            "learned_gate out"
        )
    if proposal.region.boxes and gate < zoom.learned_gate:
        reason = f"the learned gate gives {gate:.2f} (learned_gate={zoom.learned_gate:g})"
        proposal = replace(proposal, region=Region(reason=reason))
    return replace(proposal, gate=gate)


def _normalize(values: np.ndarray) -> np.ndarray:
    """Divide a map by its maximum."""
    peak = values.max()
    return values / peak if peak > 0 else values


def require_labels(models: Models) -> LabelConfig:
    """Return the head lists of the base model.

    Raises:
        ValueError: If there are none, or they do not fit the model.
    """
    if models.labels is None:
        raise ValueError(
            f"no grounding heads are known for {models.backbone.name}: pass "
            "labels=LabelConfig(...), or an RPN that was trained with head lists"
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
    """Compute the attention of responses to the image.

    Args:
        models: The backbone and its head lists.
        looks: Questions about prefilled images.
        responses: Token ids of each response, at least one.
        labels: Heads to read; default: `models.labels`.

    Returns:
        ([T] grounding map, [T] sink map) for each look; the sink map is 0 without sink heads.

    Raises:
        ValueError: If there are no head lists, or they do not fit the model.
    """
    labels = labels or require_labels(models)
    rows = read_rows(
        models.backbone,
        [look.prefix for look in looks],
        [(*look.question, *r) for look, r in zip(looks, responses, strict=True)],
        [len(r) for r in responses],
        [choice.layer for choice in (*labels.grounding, *labels.sink)],
    )
    grounding = rows.mean(labels.grounding)
    sink = rows.mean(labels.sink) if labels.sink else [values * 0 for values in grounding]
    pairs = zip(grounding, sink, strict=True)
    return [(a.cpu().numpy(), b.cpu().numpy()) for a, b in pairs]


def by_attention(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Propose regions from the attention of the model's first answer, with sinks removed."""
    labels = require_labels(models)
    responses = _first_answers(models.backbone, looks, labels.max_new_tokens)
    proposals = [Proposal(Region(reason="the model's first answer was empty")) for _ in looks]
    answered = [i for i, response in enumerate(responses) if response]
    if not answered:
        return proposals
    some = [looks[i] for i in answered]
    maps = []
    attention = response_attention(models, some, [responses[i] for i in answered])
    for look, (grounding, sink) in zip(some, attention, strict=True):
        clean = remove_sinks(grounding, sink, labels.sink_threshold)
        maps.append(blur(look.shaped(_normalize(clean))))
    for i, proposal in zip(answered, _from_maps(models, maps, some), strict=True):
        proposals[i] = proposal
    return proposals


def _first_answers(
    backbone: Backbone, looks: Sequence[Look], max_new_tokens: int
) -> list[list[int]]:
    """Generate answers without a zoom, truncated where they exceed the model's context."""
    prefixes = [look.prefix for look in looks]
    suffixes = [backbone.suffix_segment(k.prefix.next_position, k.question) for k in looks]
    answers = generate(backbone, prefixes, suffixes, {"max_new_tokens": max_new_tokens})
    limits = [backbone.remaining_tokens(look.grid.cells, look.question) for look in looks]
    return [answer[:limit] for answer, limit in zip(answers, limits, strict=True)]


def by_vicrop(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Propose regions from attention relative to a neutral prompt's (arXiv 2502.17422)."""
    backbone = models.backbone
    layer = models.labels.vicrop_layer if models.labels else round(backbone.num_layers * 14 / 32)
    neutral = backbone.prompt_ids(NEUTRAL_QUESTION).after

    def attention(prefixes: list[Prefix], suffixes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        rows = read_rows(backbone, prefixes, suffixes, [1] * len(prefixes), [layer])
        return [heads.mean(0).cpu().numpy() for heads in rows.by_layer[layer]]

    question_maps = attention([look.prefix for look in looks], [look.question for look in looks])
    # The neutral prompt does not depend on the question: run it once per image.
    images = {id(look.prefix): look.prefix for look in looks}
    neutral_maps = attention([*images.values()], [neutral] * len(images))
    neutral_by_image = dict(zip(images, neutral_maps, strict=True))
    proposals = []
    for look, question_map in zip(looks, question_maps, strict=True):
        ratio = look.shaped(relative_attention(question_map, neutral_by_image[id(look.prefix)]))
        roi_map = (ratio / ratio.max()).astype(np.float32)
        region = propose_window(ratio, look.grid)
        if reason := unsupported_crop(region.boxes[0], backbone.map_rules):
            region = Region(reason=reason)
        proposals.append(Proposal(region, roi_map))
    return proposals


def by_none(models: Models, looks: Sequence[Look]) -> list[Proposal]:
    """Propose no region, as the stock model."""
    return [Proposal(Region(reason="proposer none")) for _ in looks]


def _from_maps(models: Models, maps: Sequence[np.ndarray], looks: Sequence[Look]) -> list[Proposal]:
    rules = models.backbone.map_rules
    pairs = zip(maps, looks, strict=True)
    return [
        Proposal(propose(values, look.grid, look.zoom, rules), values) for values, look in pairs
    ]


BY_NAME: Mapping[str, Proposer] = {
    "rpn": by_rpn,
    "attention": by_attention,
    "vicrop": by_vicrop,
    "none": by_none,
}
