"""Floating-point operations of a question: measured, by closed formula, and a lower bound.

A multiply-add counts as two operations, as in torch's counter. Only matrix products and attention
are counted; norms, rotary embeddings and softmax are negligible.

Shapes: P prefix tokens (text before the image and image), T image tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import RPNConfig

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
STATIONS = ("read", "look", "crop", "prefill", "decode")

Stations = dict[str, float]
"""Operations per question, by stage."""


def counted(work: Callable[[], Any]) -> int:
    """Count the operations of `work` with torch's counter.

    torch 2.14's counter has no formula for fused attention on the CPU and counts 0, so the formula
    for fused attention on GPUs is registered for it.
    """

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        batch, heads, new, width = query
        return 2 * batch * heads * new * key[-2] * (width + value[-1])

    unknown = {} if CPU_ATTENTION in flop_registry else {CPU_ATTENTION: attention}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        work()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a model and its RPN; widths in features, counts in tokens.

    kv_width: features of a key. head_tokens: tokens before the image. feature_layers: layers of the
    vision tower that the image features need (transformers runs all of them). crop_marks: tokens
    around a crop. The vision tower is LLaVA's; subclasses have others.
    """

    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    head_tokens: int
    image_tokens: int
    branch_layer: int
    depth: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    patch_inputs: int
    feature_layers: int
    crop_marks: int = 0

    @classmethod
    def of(cls, llava: Llava15, rpn: RPNConfig) -> Self:
        text: Any = llava.text_config
        vision: Any = llava.model.config.vision_config
        layer = llava.model.config.vision_feature_layer
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            kv_width=text.hidden_size // text.num_attention_heads * text.num_key_value_heads,
            vocabulary=text.vocab_size,
            head_tokens=len(llava.head_ids),
            image_tokens=llava.image_tokens,
            branch_layer=rpn.branch_layer,
            depth=rpn.depth,
            vision_layers=vision.num_hidden_layers,
            vision_hidden=vision.hidden_size,
            vision_intermediate=vision.intermediate_size,
            patch_inputs=3 * vision.patch_size**2,
            feature_layers=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
        )

    @property
    def prefix(self) -> int:
        return self.head_tokens + self.image_tokens

    def image_tower(self, layers: int) -> float:
        """Operations of `layers` vision layers and the projector, for the whole image."""
        return tower(self, layers)

    def crop_tower(self, layers: int) -> float:
        """The same for the crop."""
        return tower(self, layers)

    def inserted(self, crop: int) -> int:
        """Tokens that a crop of `crop` tokens adds to the sequence, with the marks around it."""
        return crop + self.crop_marks if crop else 0


@dataclass(frozen=True)
class Load:
    """Token counts of a question, and the number of questions on its image.

    neutral: tokens of ViCrop's neutral prompt. vicrop_layer: the layer whose attention it reads.
    together: questions on an image in one batch, which share the pass of the neutral prompt. kept:
    image tokens that the upper layers of a zoomed answer see; None for all. sure: share of the
    questions whose first answer stands; `crop` counts the tokens of the others.
    """

    questions_per_image: float
    question: int
    crop: int
    new: int
    neutral: int = 0
    vicrop_layer: int = 0
    together: int = 1
    kept: int | None = None
    sure: float = 0.0


Work = tuple[Sizes, Load]
"""What the formulas need."""


# --- parts ----------------------------------------------------------------------------------


def tower(s: Sizes, layers: int) -> float:
    """Vision tower with `layers` layers and projector, for one image."""
    tokens, width = s.image_tokens + 1, s.vision_hidden
    each = 8 * tokens * width**2 + 4 * tokens * width * s.vision_intermediate
    attention = 4 * tokens**2 * width
    patches = 2 * s.image_tokens * s.patch_inputs * width
    projector = 2 * s.image_tokens * (width * s.hidden + s.hidden**2)
    return patches + layers * (each + attention) + projector


def _keys(s: Sizes, tokens: float) -> float:
    return 4 * tokens * s.hidden * s.kv_width


def _rest(s: Sizes, tokens: float) -> float:
    """Operations of a layer per token, without keys, values and attention."""
    return tokens * (4 * s.hidden**2 + 6 * s.hidden * s.intermediate)


def span(s: Sizes, layers: int, new: int, cached: int) -> float:
    """Decoder layers over new tokens after cached ones, every query with every key.

    Kernels skip half of a causal square, which counters, including torch's, do not see.
    """
    attention = 4 * new * (cached + new) * s.hidden
    return layers * (_keys(s, new) + _rest(s, new) + attention)


def fill(s: Sizes, layers: int, new: int, cached: int) -> float:
    """Decoder layers that only fill the cache: of the last layer only keys and values."""
    return span(s, layers - 1, new, cached) + _keys(s, new)


def to_last(s: Sizes, layers: int, new: int, cached: int) -> float:
    """As `fill`, and the last layer's output for the last token."""
    last = _rest(s, 1) + 4 * (cached + new) * s.hidden
    return fill(s, layers, new, cached) + last


def least(s: Sizes, layers: int, new: int, cached: int, outputs: int) -> float:
    """Lower bound of decoder layers: unmasked keys, and `outputs` tokens of the last layer.

    The other tokens of the last layer need only keys and values.
    """
    last = _keys(s, new) + _rest(s, outputs) + 4 * outputs * (cached + new) * s.hidden
    return unmasked(s, layers - 1, new, cached) + last


def unmasked(s: Sizes, layers: int, new: int, cached: int) -> float:
    """Decoder layers over new tokens after cached ones, without masked keys."""
    pairs = new * cached + new * (new + 1) / 2
    return layers * (_keys(s, new) + _rest(s, new) + 4 * pairs * s.hidden)


def decode(s: Sizes, steps: int, length: int, heads: int, upper: int | None = None) -> float:
    """Decoding steps of one token, the first after `length` tokens, and rows of logits.

    upper: tokens before the first step in the layers from the RPN's branch on, if they have fewer.
    """
    words = heads * 2 * s.hidden * s.vocabulary
    return words + sum(_step(s, length + i, (upper or length) + i) for i in range(steps))


def _step(s: Sizes, length: int, upper: int) -> float:
    above = s.layers - s.branch_layer
    return span(s, s.branch_layer, 1, length) + span(s, above, 1, upper)


def _map_query(s: Sizes) -> float:
    """The RPN's map for one question: a query and its products with the image keys."""
    return 2 * s.hidden**2 + 2 * s.image_tokens * s.hidden


def _map_keys(s: Sizes) -> float:
    return 2 * s.image_tokens * s.hidden * s.kv_width


# --- systems, as they are written ------------------------------------------------------------


def stock(s: Sizes, w: Load) -> Stations:
    """The full prompt for every question."""
    length = s.prefix + w.question
    return {
        "read": s.image_tower(s.vision_layers),
        "prefill": span(s, s.layers, length, 0),
        "decode": decode(s, w.new - 1, length, w.new),
    }


def two_pass(s: Sizes, w: Load) -> Stations:
    """The full prompt to find the region, then the full prompt with the crop tokens."""
    first, second = s.prefix + w.question, s.prefix + s.inserted(w.crop) + w.question
    return {
        "read": s.image_tower(s.vision_layers),
        "look": span(s, s.branch_layer + s.depth - 1, first, 0) + _map_keys(s) + _map_query(s),
        "crop": s.crop_tower(s.vision_layers),
        "prefill": span(s, s.layers, second, 0),
        "decode": decode(s, w.new - 1, second, w.new),
    }


def _answer(s: Sizes, w: Load) -> Stations:
    suffix = s.inserted(w.crop) + w.question
    return {
        "prefill": span(s, s.layers, suffix, s.prefix),
        "decode": decode(s, w.new - 1, s.prefix + suffix, w.new),
    }


def none(s: Sizes, w: Load) -> Stations:
    """The image once, then each question."""
    read = s.image_tower(s.vision_layers) + fill(s, s.layers, s.prefix, 0)
    return {"read": read / w.questions_per_image, **_answer(s, w)}


def _own(s: Sizes) -> float:
    """The RPN's part of an image."""
    return span(s, s.depth - 1, s.prefix, 0) + _map_keys(s)


def _seen_above(s: Sizes, kept: int) -> int:
    """Tokens of a prefix that the upper layers of a thinned answer see."""
    return s.head_tokens + min(kept, s.image_tokens)


def sdrpn(s: Sizes, w: Load) -> Stations:
    """The image once, then for each question the map, the crop tokens and the question."""
    if w.kept is not None:
        return _thinned(s, w, w.kept)
    read = s.image_tower(s.vision_layers) + fill(s, s.layers, s.prefix, 0) + _own(s)
    look = span(s, s.branch_layer + s.depth - 1, w.question, s.prefix) + _map_query(s)
    return {
        "read": read / w.questions_per_image,
        "look": look,
        "crop": s.crop_tower(s.vision_layers),
        **_answer(s, w),
    }


def _thinned(s: Sizes, w: Load, kept: int) -> Stations:
    """As `sdrpn`; only the question's image tokens pass the upper layers, once per question."""
    above, suffix = s.layers - s.branch_layer, s.inserted(w.crop) + w.question
    read = s.image_tower(s.vision_layers) + span(s, s.branch_layer, s.prefix, 0) + _own(s)
    seen = _seen_above(s, kept) + suffix
    lower, length = span(s, s.branch_layer, suffix, s.prefix), s.prefix + suffix
    return {
        "read": read / w.questions_per_image,
        "look": span(s, s.branch_layer + s.depth - 1, w.question, s.prefix) + _map_query(s),
        "crop": s.crop_tower(s.vision_layers),
        "prefill": lower + to_last(s, above, seen, 0),
        "decode": decode(s, w.new - 1, length, w.new, seen),
    }


def gated(s: Sizes, w: Load) -> Stations:
    """As `sdrpn`, but each question is answered without a zoom first, and some answers stand.

    The first answer continues from the states that the RPN reads.
    """
    zoomed, plain = sdrpn(s, w), replace(w, crop=0)
    lower, above = span(s, s.branch_layer, w.question, s.prefix), s.layers - s.branch_layer
    resumed = to_last(s, above, w.question, s.prefix)
    left = 1 - w.sure
    return {
        "read": zoomed["read"],
        "look": lower + left * (zoomed["look"] - lower),
        "crop": left * zoomed["crop"],
        "prefill": resumed + left * zoomed["prefill"],
        "decode": _answer(s, plain)["decode"] + left * zoomed["decode"],
    }


def vicrop(s: Sizes, w: Load) -> Stations:
    """The image once, then attention of two prompts, the crop tokens and the question."""
    layers = w.vicrop_layer + 1
    own, plain = (
        span(s, layers, n, s.prefix) + 2 * s.hidden**2 + 2 * (s.prefix + n) * s.hidden
        for n in (w.question, w.neutral)
    )
    look = own + plain / w.together
    return none(s, w) | {"look": look, "crop": s.crop_tower(s.vision_layers)}


FORMULAS: Mapping[str, Callable[[Sizes, Load], Stations]] = {
    "stock": stock,
    "two_pass": two_pass,
    "none": none,
    "sdrpn": sdrpn,
    "gated": gated,
    "vicrop": vicrop,
}


def floor(system: str, s: Sizes, w: Load) -> Stations:
    """Lower bound of the operations of a system, whatever its implementation.

    Each image once, with the vision layers that its features need; the map of each question; crop
    tokens and question once; one step per new token. Attention counts unmasked keys, and in the
    last layer only tokens whose output is used. `two_pass` has the bound of `sdrpn`, since it finds
    the same region, and `none` that of `stock`. With `Load.kept`, the upper layers run only the
    image tokens that they see.
    """
    if system == "gated":
        return _floor_of_gated(s, w)
    suffix = s.inserted(w.crop) + w.question
    read = s.image_tower(s.feature_layers)
    if w.kept is None:
        read += least(s, s.layers, s.prefix, 0, 0)
        parts: Stations = {
            "prefill": least(s, s.layers, suffix, s.prefix, 1),
            "decode": decode(s, w.new - 1, s.prefix + suffix, w.new),
        }
    else:
        read += unmasked(s, s.branch_layer, s.prefix, 0)
        seen = _seen_above(s, w.kept) + suffix
        lower = unmasked(s, s.branch_layer, suffix, s.prefix)
        parts = {
            "prefill": lower + least(s, s.layers - s.branch_layer, seen, 0, 1),
            "decode": decode(s, w.new - 1, s.prefix + suffix, w.new, seen),
        }
    if system in ("sdrpn", "two_pass"):
        read += _own_least(s)
        layers = s.branch_layer + s.depth - 1
        parts["look"] = least(s, layers, w.question, s.prefix, 1) + _map_query(s)
    if system == "vicrop":
        layers = w.vicrop_layer + 1
        parts["look"] = least(s, layers, w.question, s.prefix, 0)
        read += least(s, layers, w.neutral, s.prefix, 0)
    if w.crop:
        parts["crop"] = s.crop_tower(s.feature_layers)
    return {"read": read / w.questions_per_image} | parts


def _own_least(s: Sizes) -> float:
    """Lower bound of the RPN's part of an image. R of 1 has no layers of its own, only the head."""
    own = least(s, s.depth - 1, s.prefix, 0, s.image_tokens) if s.depth > 1 else 0
    return own + _map_keys(s)


def _floor_of_gated(s: Sizes, w: Load) -> Stations:
    """The lower bound of `none` for every question, and of the map and the zoom for some."""
    first, zoomed = floor("none", s, replace(w, crop=0)), floor("sdrpn", s, w)
    own = least(s, s.depth - 1, w.question, s.prefix, 1) if s.depth > 1 else 0
    left = 1 - w.sure
    return {
        "read": zoomed["read"],
        "look": left * (own + _map_query(s)),
        "crop": left * zoomed.get("crop", 0.0),
        "prefill": first["prefill"] + left * zoomed["prefill"],
        "decode": first["decode"] + left * zoomed["decode"],
    }
