"""The second edition's tiny LLaVA, untrained: 16 x 16 image tokens of a 224 px view.

The tower's position embeddings start as plane waves and its heads start out looking at their
neighbours, as a convolution does. Both are only where training starts; every weight is trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sdrpn.roi.vicrop import NEUTRAL_QUESTION
from tools.tiny_trio import scenes as sc
from tools.tiny_trio.drawing import GROUPS
from tools.tiny_vstar.tiny_model import PATCH, SPECIAL_TOKENS, processor_around, prompt_of

HIDDEN, HEADS = 128, 4
TOWER_LAYERS, TEXT_LAYERS = 3, 6
WAVES = 8
"""Plane waves per axis in the position embeddings; they fill the first 4 * WAVES channels."""
WAVE_HEIGHT, SHARPNESS = 0.5, 1.3


def build_tokenizer() -> Any:
    """A word-level tokenizer; like LLaMA's it puts <s> first and leaves </s> to the caller."""
    splitter = pre_tokenizers.Whitespace()
    questions = (sc.ASK_SHAPE, sc.ASK_NEIGHBOUR, sc.ASK_SIGN, sc.ASK_FIELD)
    blanks = dict.fromkeys(("colour", "shape", "side", "field"), "")
    texts = [
        prompt_of("").replace("<image>", ""),
        NEUTRAL_QUESTION,
        *(question.format(**blanks) for question in questions),
        *(" ".join(words) for words in GROUPS.values()),
        "left right ? . ,",
    ]
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(text)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor of a 224 px view."""
    return processor_around(build_tokenizer(), sc.VIEW)


def build_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """The untrained model; torch's global seed decides its weights."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=sc.VIEW,
        patch_size=PATCH,
        projection_dim=HIDDEN,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=345,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=sc.GRID**2,
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    start_local(model.model.vision_tower)
    return model


@torch.no_grad()
def start_local(tower: Any) -> None:
    """Let the tower's heads start out as looks at the neighbours left, right, above and below."""
    frequencies = torch.exp(torch.linspace(math.log(0.12), math.log(1.5), WAVES))
    y, x = (
        axis.flatten().float()
        for axis in torch.meshgrid(*[torch.arange(sc.GRID)] * 2, indexing="ij")
    )
    angles = torch.cat([x[:, None] * frequencies, y[:, None] * frequencies], dim=1)
    inner = getattr(tower, "vision_model", tower)
    positions = inner.embeddings.position_embedding.weight
    positions[:, : 4 * WAVES] = 0
    positions[1:, : 4 * WAVES : 2] = WAVE_HEIGHT * angles.cos()
    positions[1:, 1 : 4 * WAVES : 2] = WAVE_HEIGHT * angles.sin()
    width = HIDDEN // HEADS
    for layer in inner.encoder.layers:
        attention = layer.self_attn
        for head, (dx, dy) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            turn = torch.cat([dx * frequencies, dy * frequencies])
            rows = slice(head * width, (head + 1) * width)
            query, key = attention.q_proj.weight[rows], attention.k_proj.weight[rows]
            for i, angle in enumerate(turn):
                c, s = math.cos(angle), math.sin(angle)
                query[2 * i : 2 * i + 2] *= 0.3
                key[2 * i : 2 * i + 2] *= 0.3
                query[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] += SHARPNESS * torch.tensor(
                    [[c, -s], [s, c]]
                )
                key[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] += SHARPNESS * torch.eye(2)
