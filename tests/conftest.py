"""Fixtures that all tests share: a tiny random LLaVA, RPNs for it, images and questions.

The model is random but loud: its weights are scaled so that answers differ from question to
question and from image to image, which a freshly initialised model's do not.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from PIL import Image
from transformers import LlavaForConditionalGeneration

from sdrpn.backbones.llava15 import Llava15
from sdrpn.rpn.checkpoint import RPN
from tools.tiny_vstar.tiny_model import build_model, build_processor

torch.set_num_threads(1)
# The same examples on every machine, however slow. A mutant needs no smallest example to fail.
MUTATED = "MUTANT_UNDER_TEST" in os.environ
PHASES = (Phase.explicit, Phase.generate) if MUTATED else tuple(Phase)
settings.register_profile("suite", derandomize=True, deadline=None, phases=PHASES)
settings.load_profile("suite")

BRANCH_LAYER, DEPTH = 2, 3
SEED = 30
"""The first with all variety: answers that differ, end early, or are empty, and maps over 0.5 that
give one component, two, several, and none."""
THRESHOLD = 0.5
LOUDNESS = {
    "vision_tower": 0.09,
    "multi_modal_projector": 0.6,
    "language_model.layers": 0.09,
    "": 0.06,
}
"""Deviation of the random matrices, by part of their name, the first that fits."""
END = 2.0
"""How loud the end token is made, so that answers end at different lengths."""
QUESTIONS = (
    "what pattern is on the red disc ?",
    "the blue disc ?",
    "what is on the green pattern disc and on the pink disc ? what is on the red and the cyan ?",
    "yellow",
)
SIZES = ((112, 112), (200, 150), (90, 161), (300, 60), (33, 47))


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collections, which take half a second with it."""
    gc.collect()
    gc.freeze()


def make_image(width: int, height: int, seed: int) -> Image.Image:
    """A picture with something of every kind: gradients, blocks of colour, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    ramps = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1) * 255
    blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    coloured = np.asarray(blocks.resize((width, height)), dtype=np.float64)
    noise = rng.integers(-30, 30, (height, width, 3))
    return Image.fromarray((0.3 * ramps + 0.7 * coloured + noise).clip(0, 255).astype(np.uint8))


@torch.no_grad()
def draw_weights(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Random weights of our own: transformers draws its in an order that versions change."""
    rng = np.random.default_rng(seed)
    for name, weight in model.named_parameters():
        loud = next(value for part, value in LOUDNESS.items() if part in name)
        noise = torch.from_numpy(rng.standard_normal(weight.shape, dtype=np.float32))
        if weight.ndim > 1 or name.endswith("class_embedding"):
            weight.copy_(loud * noise)
        elif "language_model" in name:
            weight.copy_(1 + 0.1 * noise)


@torch.no_grad()
def make_llava(*, key_value_heads: int = 4, seed: int = SEED) -> Llava15:
    """LLaVA-1.5's architecture at 1.8 M random parameters: 112 px, 64 image tokens, 6 layers."""
    processor = build_processor()
    model = build_model(processor.tokenizer)
    if key_value_heads != model.config.text_config.num_key_value_heads:
        model.config.text_config.num_key_value_heads = key_value_heads
        model = LlavaForConditionalGeneration(model.config)
    draw_weights(model, seed)
    llava = Llava15(model, processor, name=f"random-{key_value_heads}-{seed}")
    model.lm_head.weight[processor.tokenizer.eos_token_id].mul_(END)
    # Image tokens a few times as long as word embeddings: loud, and words still count.
    features = torch.stack(llava.encode(llava.preprocess([make_image(112, 112, seed)])))
    projector = model.model.multi_modal_projector
    projector.linear_2.weight.mul_(4 / features.norm(dim=-1).mean())
    return llava


@torch.no_grad()
def make_rpn(llava: Llava15, *, perturbed: bool, multi_head: bool = True) -> RPN:
    """An RPN of R = 3 behind B = 2 layers; `perturbed` moves every one of its weights.

    The perturbed one's map head is made loud, so that its maps have peaks and empty parts.
    """
    rpn = RPN.from_backbone(llava, BRANCH_LAYER, DEPTH)
    if not multi_head:
        rpn.config = replace(rpn.config, multi_head=False)
    if perturbed:
        generator = torch.Generator().manual_seed(1)
        rpn.q_proj.weight.mul_(4)
        rpn.k_proj.weight.mul_(2)
        for weight in rpn.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std().clamp(min=0.1) * 0.5)
    return rpn.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def llava() -> Llava15:
    return make_llava()


@pytest.fixture(scope="session")
def gqa_llava() -> Llava15:
    """The same with two query heads to each key head."""
    return make_llava(key_value_heads=2)


@pytest.fixture(scope="session")
def fresh_rpn(llava: Llava15) -> RPN:
    return make_rpn(llava, perturbed=False)


@pytest.fixture(scope="session")
def perturbed_rpn(llava: Llava15) -> RPN:
    return make_rpn(llava, perturbed=True)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Five images: square, wide, tall, very wide, smaller than the model's side; odd sizes too."""
    return [make_image(*size, seed) for seed, size in enumerate(SIZES)]
