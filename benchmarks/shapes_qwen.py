"""Qwen2.5-VLs with random weights and the real proportions, for measurements of speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.backbones.qwen25_vl_published import CELL_PIXELS, DEPTH, branch_layer
from sdrpn.rpn.checkpoint import RPN
from tests.helpers.qwen_tiny import build_processor, flat_config

FIRST_TOKENS = 576
MERGES = 400
"""Merges of the tokenizer, enough for every word of a question to be one token."""


@dataclass(frozen=True)
class QwenShape:
    """Sizes of a language model and its vision tower."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_layers: int = 32
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    vision_heads: int = 16
    full_attention: tuple[int, ...] = (7, 15, 23, 31)


QWEN_SHAPES = {
    # config.json of Qwen/Qwen2.5-VL-{3,7,32,72}B-Instruct, from memory.
    "3b": QwenShape(36, 2048, 11008, 16, 2, 151936),
    "7b": QwenShape(28, 3584, 18944, 28, 4, 152064),
    "32b": QwenShape(64, 5120, 27648, 40, 8, 152064, vision_intermediate=3456),
    "72b": QwenShape(80, 8192, 29568, 64, 8, 152064, vision_intermediate=3456),
    # The depth and the proportions of 7B at 1/16 of its width.
    "small": QwenShape(28, 224, 1184, 7, 1, 9504, 32, 80, 214, 4),
}


def qwen_config(
    shape: QwenShape, tokenizer: Any, dtype: torch.dtype = torch.float32
) -> Qwen2_5_VLConfig:
    """Return the configuration of a shape; M-RoPE's sections scale with the head."""
    head = shape.hidden // shape.heads
    values = flat_config(tokenizer)
    vision = values["vision_config"] | {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden,
        "fullatt_block_indexes": list(shape.full_attention),
    }
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 128_000,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        # 16, 24 and 24 of the 64 frequencies of a head of 128.
        "rope_scaling": {"type": "mrope", "mrope_section": [head // 8, *[head * 3 // 16] * 2]},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": shape.vocabulary,
    }
    return Qwen2_5_VLConfig.from_dict(values | text | {"vision_config": vision})


def random_qwen(
    shape: QwenShape,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Qwen25VL:
    """Build a Qwen25VL of a shape with random weights and 576 tokens an image."""
    torch.manual_seed(seed)
    processor = build_processor(MERGES)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = Qwen2_5_VLForConditionalGeneration(qwen_config(shape, processor.tokenizer, dtype))
        torch.set_default_dtype(before)
    return Qwen25VL(model, processor, name=f"random Qwen2.5-VL {name}")


def with_tokens(qwen: Qwen25VL, tokens: int) -> Qwen25VL:
    """The same model with about so many tokens per image, exactly as many for a square number."""
    pixels = tokens * CELL_PIXELS
    return Qwen25VL(
        qwen.model, qwen.processor, min_pixels=pixels, max_pixels=pixels, name=qwen.name
    )


def qwen_rpn(qwen: Qwen25VL) -> RPN:
    """Build an untrained RPN with the published R = 3 and the size's B."""
    layers = qwen.num_layers
    branch = min(branch_layer(qwen.text_config.hidden_size, layers), layers - DEPTH)
    return RPN.from_backbone(qwen, branch, DEPTH).eval().requires_grad_(False)


def load_qwen(
    shape: str,
    *,
    layers: int | None = None,
    pretrained: str | None = None,
    rpn: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype,
    attention: str | None = None,
) -> tuple[Qwen25VL, RPN]:
    """Load a Qwen2.5-VL and an RPN, as `workload.load` does for LLaVA."""
    if pretrained is not None:
        qwen = Qwen25VL.load(
            pretrained,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            attn_implementation=attention,
        )
        return qwen, RPN.from_pretrained(rpn) if rpn else qwen_rpn(qwen)
    sizes, name = QWEN_SHAPES[shape], shape
    if layers is not None:
        sizes, name = replace(sizes, layers=layers), f"{shape}, {layers} layers"
    qwen = random_qwen(sizes, name, dtype, device)
    if attention is not None:
        qwen.model.set_attn_implementation(attention)
    return qwen, qwen_rpn(qwen)
