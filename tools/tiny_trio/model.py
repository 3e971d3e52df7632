"""The second edition's tiny LLaVA, untrained: 16 x 16 image tokens of a 224 px view.

The tower's position embeddings start as plane waves and its heads start out looking at their
neighbours, as a convolution does; the language model's heads start out looking at what resembles
the token that asks (mimetic initialization, arXiv 2305.09828). This is only where training starts;
every weight is trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sdrpn.roi.vicrop import NEUTRAL_QUESTION
from tools.tiny_trio import scenes as sc
from tools.tiny_trio.drawing import GROUPS
from tools.tiny_vstar.tiny_model import (
    HEADS,
    HIDDEN,
    build_llava,
    processor_around,
    prompt_of,
    word_level_tokenizer,
)

TOWER_LAYERS, CONTEXT = 3, 2048
WAVES = 8
"""Plane waves per axis in the position embeddings; they fill the first 4 * WAVES channels."""
WAVE_HEIGHT, SHARPNESS = 0.5, 1.3
ROPE_THETA, LIKENESS = 1e6, 0.7
"""A slow rotation, so that likeness counts at any distance; variance of queries and keys."""


def build_tokenizer() -> Any:
    """The word-level tokenizer of the prompt, the questions and their answers."""
    questions = (sc.ASK_SHAPE, sc.ASK_NEIGHBOUR, sc.ASK_SIGN, sc.ASK_FIELD)
    blanks = dict.fromkeys(("colour", "shape", "side", "field"), "")
    texts = [
        prompt_of("").replace("<image>", ""),
        NEUTRAL_QUESTION,
        *(question.format(**blanks) for question in questions),
        *(" ".join(words) for words in GROUPS.values()),
        "left right ? . ,",
    ]
    return word_level_tokenizer(texts, CONTEXT)


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor of a 224 px view."""
    return processor_around(build_tokenizer(), sc.VIEW)


def build_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """The untrained model; torch's global seed decides its weights."""
    model = build_llava(
        tokenizer,
        side=sc.VIEW,
        tower_layers=TOWER_LAYERS,
        feature_layer=-1,
        context=CONTEXT,
        rope_theta=ROPE_THETA,
    )
    start_local(model.model.vision_tower)
    start_matching(model.model.language_model)
    return model


@torch.no_grad()
def start_matching(language_model: Any) -> None:
    """Let keys start out equal to queries, so that a token first looks at what resembles it.

    With independent ones, the model pooled the answers of all objects for hundreds of steps.
    """
    for layer in language_model.layers:
        query = layer.self_attn.q_proj.weight
        query.copy_(torch.randn_like(query) * (LIKENESS / HIDDEN) ** 0.5)
        layer.self_attn.k_proj.weight.copy_(query)


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
