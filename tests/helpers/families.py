"""The model families, each with its tiny random model and a plain reference to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdrpn.backbones.base import Backbone
from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import SIZES, THRESHOLD, make_image, make_llava
from tests.conftest import make_rpn as make_llava_rpn
from tests.helpers import by_hand, by_hand_qwen, qwen_tiny

NEW_TOKENS = 6
Reference = tuple[list[int], torch.Tensor]
"""Token ids of a greedy answer, and the logits of its steps [steps, vocabulary]."""


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        backbone: A tiny random model.
        fresh: An RPN that is a copy of the backbone's layers.
        rpn: One with every weight moved.
        zoom: Settings under which some questions zoom and others do not.
        images: Pictures of different shapes.
        stock: An image, a question and arguments of generate() to transformers' own answer.
        in_full: An answer, its question and settings to the same by full forwards.
        full_map: An RPN, an image and a question to its RoI logits.
    """

    backbone: Backbone
    fresh: RPN
    rpn: RPN
    zoom: ZoomConfig
    images: list[Image.Image]
    stock: Callable[..., Reference]
    in_full: Callable[[Answer, Question, ZoomConfig], Reference]
    full_map: Callable[[RPN, Image.Image, str], np.ndarray]


def pictures() -> list[Image.Image]:
    return [make_image(*size, seed) for seed, size in enumerate(SIZES)]


def generated(model: Any, inputs: Any, **generation: Any) -> Reference:
    """What transformers' generate() gives, greedy unless told otherwise."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | generation
    output = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return new, torch.stack(output.logits)[:, 0]


# --- LLaVA-1.5 ---------------------------------------------------------------------------------


def llava_family() -> Family:
    llava = make_llava()

    def stock(image: Image.Image, text: str, **generation: Any) -> Reference:
        edge = max(image.size)
        square = Image.new("RGB", (edge, edge), (122, 116, 104))
        square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
        # The torchvision processor rounds a bicubic resize unlike PIL: it gets the final size.
        small = square.resize((llava.side, llava.side), Image.Resampling.BICUBIC)
        prompt = by_hand.prompt(llava, text)
        inputs = llava.processor(images=small, text=prompt, return_tensors="pt")
        return generated(llava.model, inputs, **generation)

    def in_full(answer: Answer, question: Question, zoom: ZoomConfig) -> Reference:
        image, keep = question.images[0], None
        if answer.roi_map is not None and answer.crop_tokens < llava.image_tokens:
            keep = by_hand.kept(answer.roi_map > zoom.threshold, llava.grid)
        crops = [by_hand.crop_of(llava, image, box, keep) for box in answer.regions]
        embeds, _ = by_hand.sequence(llava, image, question.text, torch.cat(crops))
        ids, logits = by_hand.greedy(llava, embeds, NEW_TOKENS)
        return ids, torch.stack(logits)

    return Family(
        llava,
        make_llava_rpn(llava, perturbed=False),
        make_llava_rpn(llava, perturbed=True),
        ZoomConfig(threshold=THRESHOLD, policy="mask"),
        pictures(),
        stock,
        in_full,
        lambda rpn, image, text: by_hand.roi_logits(llava, rpn, image, text),
    )


# --- Qwen2.5-VL --------------------------------------------------------------------------------


def qwen_family() -> Family:
    qwen = qwen_tiny.make_qwen()

    def stock(image: Image.Image, text: str, **generation: Any) -> Reference:
        size = by_hand_qwen.fit(*image.size, 4 * 784, 16384 * 784)
        least, most = by_hand_qwen.limits_of(qwen)
        inputs = qwen.processor(
            images=image.resize(size, Image.Resampling.BICUBIC),
            text=by_hand_qwen.prompt(text),
            size={"shortest_edge": least, "longest_edge": most},
            return_tensors="pt",
        )
        return generated(qwen.model, inputs, **generation)

    def in_full(answer: Answer, question: Question, zoom: ZoomConfig) -> Reference:
        (box,), image = answer.regions, question.images[0]
        over = None if answer.roi_map is None else answer.roi_map > zoom.threshold
        crop = by_hand_qwen.crop_of(qwen, image, box, over)
        assert answer.crop_tokens == int(crop.keep.sum())
        start = by_hand_qwen.sequence(qwen, image, question.text, crop)
        ids, logits = by_hand_qwen.greedy(qwen, start, NEW_TOKENS)
        return ids, torch.stack(logits)

    return Family(
        qwen,
        qwen_tiny.make_rpn(qwen, perturbed=False),
        qwen_tiny.make_rpn(qwen, perturbed=True),
        ZoomConfig(threshold=0.45, policy="mask"),
        pictures(),
        stock,
        in_full,
        lambda rpn, image, text: by_hand_qwen.roi_logits(qwen, rpn, image, text),
    )


FAMILIES: dict[str, Callable[[], Family]] = {"llava": llava_family, "qwen": qwen_family}
