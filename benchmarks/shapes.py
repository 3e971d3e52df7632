"""LLaVAs with random weights and LLaVA-1.5's proportions, for measurements of speed and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import LabelConfig, LayerHeads
from sdrpn.rpn.checkpoint import RPN
from tools.tiny_vstar.tiny_model import PATCH, build_tokenizer, processor_around

SIDE = 336
WORDS = "what pattern is on the red disc and the blue"


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model and its vision tower."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int


SHAPES = {
    # LLaVA-1.5-7B and 13B: config.json of llava-hf/llava-1.5-{7b,13b}-hf.
    "7b": Shape(32, 4096, 11008, 32, 32064, 24, 1024, 4096, 16),
    "13b": Shape(40, 5120, 13824, 40, 32064, 24, 1024, 4096, 16),
    # The depth and the proportions of 7B at 1/16 of its width.
    "small": Shape(32, 256, 688, 8, 2048, 24, 64, 256, 4),
}


def llava_config(shape: Shape, tokenizer: Any) -> LlavaConfig:
    """Return the configuration of a shape: 336 px, 576 image tokens, 4096 tokens of context."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_intermediate,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=shape.vision_hidden,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def random_llava(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Llava15:
    """Build a Llava15 of a named shape with random weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 4096
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = LlavaForConditionalGeneration(llava_config(SHAPES[name], tokenizer))
        torch.set_default_dtype(before)
    return Llava15(model, processor_around(tokenizer, SIDE), name=f"random {name}")


def random_rpn(llava: Llava15, branch_layer: int = 15, depth: int = 3) -> RPN:
    """Build an untrained RPN with the published B = 15 and R = 3."""
    return RPN.from_backbone(llava, branch_layer, depth).eval().requires_grad_(False)


def label_heads() -> LabelConfig:
    """Return a label configuration with the layers of 7B and three heads of layer 14."""
    return LabelConfig((LayerHeads(14, (1, 4, 6)),), (LayerHeads(2),), 14, max_new_tokens=128)


def images(count: int, width: int = 640, height: int = 480, seed: int = 0) -> list[Image.Image]:
    """Draw upscaled noise images."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((width, height)) for one in small]


def question(words: int, seed: int = 0) -> str:
    """Return a question of a number of words, each of one token."""
    rng = np.random.default_rng(seed)
    return " ".join(str(w) for w in rng.choice(WORDS.split(), words))
