"""A tiny random Qwen2.5-VL: tokenizer of Qwen's kind, model, and a folder as the Hub lays it out.

Loud, as the tiny LLaVA of tests/conftest.py is: answers differ from question to question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.rpn.checkpoint import RPN

if not hasattr(Qwen2_5_VLRotaryEmbedding, "recomposition_frequencies"):
    pytest.skip("Qwen2.5-VL needs a newer transformers", allow_module_level=True)

CELL_PIXELS = 28 * 28
LEAST, MOST = 12, 40
"""Tokens of a picture: few, and different from picture to picture."""

BRANCH_LAYER, DEPTH = 2, 3
SEED = 7
LOUDNESS = {"visual": 0.12, "language_model.layers": 0.12, "": 0.08}
BIAS = 0.1

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = (
    "You are a helpful assistant. system user assistant",
    "what pattern is on the red disc ? the blue disc ? yellow",
    "what is on the green pattern disc and on the pink disc ? the cyan",
    "Answer the question using a single word or phrase.",
)


def build_tokenizer(merges: int = 40) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's special tokens and a few merges."""
    blank = Tokenizer(models.BPE())
    blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[misc]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False
    )
    blank.train_from_iterator(CORPUS, trainer)
    learned = json.loads(blank.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor(merges: int = 40) -> Qwen2_5_VLProcessor:
    """The processor with the Hub's own limits, which runs override."""
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056),
        build_tokenizer(merges),
        Qwen2VLVideoProcessor(min_pixels=3136, max_pixels=12845056),
        chat_template=CHAT_TEMPLATE,
    )


def flat_config(tokenizer: Any, *, tied: bool = False) -> dict[str, Any]:
    """config.json with the Hub's field names: sizes of the language model at the top."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "max_window_layers": 6,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 3,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": len(tokenizer),
    }


@torch.no_grad()
def draw_weights(model: Any, seed: int) -> None:
    """Random weights of our own: transformers draws its in an order that versions change."""
    rng = np.random.default_rng(seed)
    for name, weight in model.named_parameters():
        loud = next(value for part, value in LOUDNESS.items() if part in name)
        noise = torch.from_numpy(rng.standard_normal(tuple(weight.shape), dtype=np.float32))
        if weight.ndim > 1:
            weight.copy_(loud * noise)
        else:
            weight.copy_(BIAS * noise if name.endswith("bias") else 1 + 0.1 * noise)


def make_qwen(*, seed: int = SEED, tied: bool = False) -> Qwen25VL:
    """Qwen2.5-VL's architecture, random, with pictures of LEAST to MOST tokens."""
    processor = build_processor()
    values = flat_config(processor.tokenizer, tied=tied) | {"torch_dtype": "float32"}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(values))
    draw_weights(model, seed)
    return Qwen25VL(
        model,
        processor,
        min_pixels=LEAST * CELL_PIXELS,
        max_pixels=MOST * CELL_PIXELS,
        name=f"random-qwen-{seed}",
    )


@torch.no_grad()
def make_rpn(qwen: Qwen25VL, *, perturbed: bool) -> RPN:
    """An RPN of R = 3 behind B = 2 layers; `perturbed` moves every weight and makes maps loud."""
    rpn = RPN.from_backbone(qwen, BRANCH_LAYER, DEPTH)
    if perturbed:
        generator = torch.Generator().manual_seed(1)
        rpn.q_proj.weight.mul_(3)
        rpn.k_proj.weight.mul_(3)
        for weight in rpn.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std().clamp(min=0.05) * 0.5)
    return rpn.eval().requires_grad_(False)


def hub_name(name: str) -> str:
    """transformers' name of a weight -> the Hub's."""
    for ours, theirs in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def write_checkpoint(
    qwen: Qwen25VL, folder: Path, *, more: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """A folder as the Hub's: flat config.json, tokenizer, processor, shards of old names.

    more: tensors beside the model's, under their names. config: keys to add or change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = bool(qwen.model.config.tie_word_embeddings)
    values = flat_config(qwen.tokenizer, tied=tied) | config
    (folder / "config.json").write_text(json.dumps(values))
    generation = {
        "bos_token_id": values["bos_token_id"],
        "pad_token_id": values["bos_token_id"],
        "do_sample": True,
        "eos_token_id": [values["eos_token_id"], values["bos_token_id"]],
        "repetition_penalty": 1.05,
        "temperature": 1e-06,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
            }
        )
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    qwen.tokenizer.save_pretrained(folder)
    skipped = {"lm_head.weight"} if tied else set()
    state = {
        hub_name(name): tensor.contiguous()
        for name, tensor in qwen.model.state_dict().items()
        if name not in skipped
    } | dict(more or {})
    names = sorted(state)
    shards = [names[i::3] for i in range(3)]
    where: dict[str, str] = {}
    for number, own in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: state[n].clone() for n in own}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(own, file)
    size = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def authors_tensors(rpn: RPN, head: torch.Tensor) -> dict[str, torch.Tensor]:
    """An RPN's weights as the authors name them, with those that nothing reads."""
    state, last = rpn.state_dict(), rpn.config.depth - 1
    tensors = {
        f"model.twig_{name}": tensor.contiguous()
        for name, tensor in state.items()
        if name.startswith("layers.")
    }
    for ours, theirs in (
        ("map_norm.", "input_layernorm."),
        ("q_proj.", "self_attn.q_proj."),
        ("k_proj.", "self_attn.k_proj."),
    ):
        for name in [name for name in state if name.startswith(ours)]:
            target = f"model.twig_layers.{last}.{theirs}{name.removeprefix(ours)}"
            tensors[target] = state[name].contiguous()
    unread = {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "mlp.up_proj.weight"}
    for name in [n for n in state if n.startswith("layers.0.")]:
        part = name.removeprefix("layers.0.")
        if part in unread:
            tensors[f"model.twig_layers.{last}.{part}"] = state[name].contiguous() + 1
    tensors["model.twig_norm.weight"] = torch.ones(rpn.config.hidden_size)
    return tensors | {"twig_head.weight": head.contiguous()}
