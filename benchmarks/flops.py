"""Floating-point operations of a question: counted, by closed formula, and the floor under both.

A multiplication with its addition counts as two, as in torch's counter. Only matrix products and
attention are counted; norms, rotations and softmax are a rounding error beside them.

Shapes: P prefix tokens (text before the image and image), T image tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import RPNConfig

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
STATIONS = ("read", "look", "crop", "prefill", "decode")

Stations = dict[str, float]
"""Operations a question, station by station."""


def counted(work: Callable[[], Any]) -> int:
    """Operations that torch's counter sees in `work`.

    torch 2.14's counter knows no formula for fused attention on the CPU and counts 0 for it, so one
    is given to it there, the same as it uses for fused attention on GPUs.
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
    """What the formulas need to know of a LLaVA and its RPN; widths in features, counts in tokens.

    kv_width: features of a key. head_tokens: text before the image. feature_layers: layers of the
    vision tower that the image features need (transformers runs all of them).
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


@dataclass(frozen=True)
class Load:
    """One question: how many share its image, and its tokens.

    neutral: tokens of ViCrop's neutral prompt. vicrop_layer: the layer whose attention it reads.
    together: questions of an image in one batch, which share the neutral prompt's pass.
    """

    questions_per_image: float
    question: int
    crop: int
    new: int
    neutral: int = 0
    vicrop_layer: int = 0
    together: int = 1


# --- parts ----------------------------------------------------------------------------------


def tower(s: Sizes, layers: int) -> float:
    """Vision tower (so many layers) and projector, one image."""
    tokens, width = s.image_tokens + 1, s.vision_hidden
    each = 8 * tokens * width**2 + 4 * tokens * width * s.vision_intermediate
    attention = 4 * tokens**2 * width
    patches = 2 * s.image_tokens * s.patch_inputs * width
    projector = 2 * s.image_tokens * (width * s.hidden + s.hidden**2)
    return patches + layers * (each + attention) + projector


def _keys(s: Sizes, tokens: float) -> float:
    return 4 * tokens * s.hidden * s.kv_width


def _rest(s: Sizes, tokens: float) -> float:
    """What a layer does for a token beside its key and value, attention apart."""
    return tokens * (4 * s.hidden**2 + 6 * s.hidden * s.intermediate)


def span(s: Sizes, layers: int, new: int, cached: int) -> float:
    """Decoder layers over new tokens behind cached ones, every query with every key.

    Kernels skip half of a causal square, but a counter (torch's, too) does not see it.
    """
    attention = 4 * new * (cached + new) * s.hidden
    return layers * (_keys(s, new) + _rest(s, new) + attention)


def fill(s: Sizes, layers: int, new: int, cached: int) -> float:
    """The same for the cache alone: of the last layer only the keys and values."""
    return span(s, layers - 1, new, cached) + _keys(s, new)


def least(s: Sizes, layers: int, new: int, cached: int, outputs: int) -> float:
    """The same, no more than needed: keys that are seen, and of the last layer `outputs` tokens.

    The last layer's other tokens need only their keys and values.
    """
    pairs = new * cached + new * (new + 1) / 2
    full = _keys(s, new) + _rest(s, new) + 4 * pairs * s.hidden
    last = _keys(s, new) + _rest(s, outputs) + 4 * outputs * (cached + new) * s.hidden
    return (layers - 1) * full + last


def decode(s: Sizes, steps: int, length: int, heads: int) -> float:
    """So many one-token steps, the first behind `length` tokens, and so many rows of logits."""
    words = heads * 2 * s.hidden * s.vocabulary
    return words + sum(span(s, s.layers, 1, length + i) for i in range(steps))


def _map_query(s: Sizes) -> float:
    """The RPN's map of one question: a query, and its products with the image keys."""
    return 2 * s.hidden**2 + 2 * s.image_tokens * s.hidden


def _map_keys(s: Sizes) -> float:
    return 2 * s.image_tokens * s.hidden * s.kv_width


# --- systems, as they are written ------------------------------------------------------------


def stock(s: Sizes, w: Load) -> Stations:
    """The whole prompt, for every question."""
    length = s.prefix + w.question
    return {
        "read": tower(s, s.vision_layers),
        "prefill": span(s, s.layers, length, 0),
        "decode": decode(s, w.new - 1, length, w.new),
    }


def two_pass(s: Sizes, w: Load) -> Stations:
    """First look over the whole prompt; then the whole prompt with the crop tokens."""
    first, second = s.prefix + w.question, s.prefix + w.crop + w.question
    return {
        "read": tower(s, s.vision_layers),
        "look": span(s, s.branch_layer + s.depth - 1, first, 0) + _map_keys(s) + _map_query(s),
        "crop": tower(s, s.vision_layers),
        "prefill": span(s, s.layers, second, 0),
        "decode": decode(s, w.new - 1, second, w.new),
    }


def _answer(s: Sizes, w: Load) -> Stations:
    suffix = w.crop + w.question
    return {
        "prefill": span(s, s.layers, suffix, s.prefix),
        "decode": decode(s, w.new - 1, s.prefix + suffix, w.new),
    }


def none(s: Sizes, w: Load) -> Stations:
    """The image once, then the question."""
    read = tower(s, s.vision_layers) + fill(s, s.layers, s.prefix, 0)
    return {"read": read / w.questions_per_image, **_answer(s, w)}


def sdrpn(s: Sizes, w: Load) -> Stations:
    """The image once; a look over it; crop tokens and question over it."""
    own = span(s, s.depth - 1, s.prefix, 0) + _map_keys(s)
    read = tower(s, s.vision_layers) + fill(s, s.layers, s.prefix, 0) + own
    look = span(s, s.branch_layer + s.depth - 1, w.question, s.prefix) + _map_query(s)
    return {
        "read": read / w.questions_per_image,
        "look": look,
        "crop": tower(s, s.vision_layers),
        **_answer(s, w),
    }


def vicrop(s: Sizes, w: Load) -> Stations:
    """The image once; attention of two prompts; crop tokens and question."""
    layers = w.vicrop_layer + 1
    own, plain = (
        span(s, layers, n, s.prefix) + 2 * s.hidden**2 + 2 * (s.prefix + n) * s.hidden
        for n in (w.question, w.neutral)
    )
    look = own + plain / w.together
    return none(s, w) | {"look": look, "crop": tower(s, s.vision_layers)}


FORMULAS: Mapping[str, Callable[[Sizes, Load], Stations]] = {
    "stock": stock,
    "two_pass": two_pass,
    "none": none,
    "sdrpn": sdrpn,
    "vicrop": vicrop,
}


def floor(system: str, s: Sizes, w: Load) -> Stations:
    """What a system must compute at least, however it is written.

    Each image once, with the vision layers its features need; each question's look; crop tokens
    and question once; one step a new token. Attention counts the keys a token may see, and in a
    last layer only the tokens whose output is used. `two_pass` looks for what `sdrpn` looks for, so
    it has the same floor, as `stock` and `none` have.
    """
    suffix = w.crop + w.question
    read = tower(s, s.feature_layers) + least(s, s.layers, s.prefix, 0, 0)
    parts: Stations = {
        "prefill": least(s, s.layers, suffix, s.prefix, 1),
        "decode": decode(s, w.new - 1, s.prefix + suffix, w.new),
    }
    if system in ("sdrpn", "two_pass"):
        # R of 1 has no layers of its own, only the map head.
        if s.depth > 1:
            read += least(s, s.depth - 1, s.prefix, 0, s.image_tokens)
        read += _map_keys(s)
        layers = s.branch_layer + s.depth - 1
        parts["look"] = least(s, layers, w.question, s.prefix, 1) + _map_query(s)
    if system == "vicrop":
        layers = w.vicrop_layer + 1
        parts["look"] = least(s, layers, w.question, s.prefix, 0)
        read += least(s, layers, w.neutral, s.prefix, 0)
    if w.crop:
        parts["crop"] = tower(s, s.feature_layers)
    return {"read": read / w.questions_per_image} | parts
