"""The tiny LLaVA, untrained: the same classes as LLaVA-1.5, 1.8 M parameters, 64 image tokens.

Its tokenizer is word-level and knows every word of the prompt that all models here share, so the
tiny model is asked in exactly the words that LLaVA-1.5-7B is asked in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sdrpn.config import VICUNA_SYSTEM_PROMPT
from sdrpn.roi.vicrop import NEUTRAL_QUESTION
from tools.tiny_vstar.scenes import COLOURS, PATTERNS, QUESTION, VIEW_SIDE

PATCH = 14
HIDDEN, HEADS = 128, 4
CONTEXT = 1024
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def prompt_of(question: str) -> str:
    """The vicuna_v1 prompt of LLaVA-1.5 for one image and one question."""
    return f"{VICUNA_SYSTEM_PROMPT} USER: <image>\n{question} ASSISTANT:"


def build_tokenizer() -> Any:
    """The word-level tokenizer of the prompt, colours and patterns."""
    texts = [
        prompt_of(QUESTION.format(colour="")).replace("<image>", ""),
        NEUTRAL_QUESTION,
        " ".join(COLOURS),
        " ".join(PATTERNS),
        "? . ,",
    ]
    return word_level_tokenizer(texts, CONTEXT)


def word_level_tokenizer(texts: Sequence[str], max_length: int) -> Any:
    """A word-level tokenizer; like LLaMA's it puts <s> first and leaves </s> to the caller.

    Args:
        texts: Texts whose words it knows, in the order of their ids.
        max_length: Longest sequence, in tokens.
    """
    splitter = pre_tokenizers.Whitespace()
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
        model_max_length=max_length,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor of the tiny model, whose view is 112 px."""
    return processor_around(build_tokenizer(), VIEW_SIDE)


def processor_around(tokenizer: Any, side: int) -> LlavaProcessor:
    """LLaVA-1.5's processor: pad to a square of `side` px, bicubic, CLIP's mean and deviation."""
    images = LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """The untrained model; torch's global seed decides its weights."""
    return build_llava(tokenizer, side=VIEW_SIDE, tower_layers=4, feature_layer=-2, context=CONTEXT)


def build_llava(
    tokenizer: Any,
    *,
    side: int,
    tower_layers: int,
    feature_layer: int,
    context: int,
    rope_theta: float = 10000.0,
) -> LlavaForConditionalGeneration:
    """An untrained LLaVA of HIDDEN channels; torch's global seed decides its weights.

    Args:
        tokenizer: Its tokenizer, from `word_level_tokenizer`.
        side: Side of the view, in pixels.
        tower_layers: Layers of the vision tower.
        feature_layer: Layer of the tower whose output is projected.
        context: Longest sequence, in tokens.
        rope_theta: Base of the language model's rotary embeddings.
    """
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=tower_layers,
        num_attention_heads=HEADS,
        image_size=side,
        patch_size=PATCH,
        projection_dim=HIDDEN,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=345,
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=context,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=(side // PATCH) ** 2,
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def pixel_values(views: np.ndarray, processor: LlavaProcessor) -> torch.Tensor:
    """Normalise views, uint8 (n, 112, 112, 3), for the vision tower: float32 (n, 3, 112, 112)."""
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name))
        for name in ("image_mean", "image_std")
    )
    scaled = torch.from_numpy(views).float() / 255
    return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()


def encode(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Projected image tokens of a batch of views, (n, 64, hidden)."""
    output: Any = model.model.get_image_features(pixels)  # type: ignore[arg-type]
    return torch.stack(list(output.pooler_output))


def split_prompt(processor: LlavaProcessor, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt before and after the image."""
    ids = processor.tokenizer(prompt_of(question))["input_ids"]
    at = ids.index(processor.image_token_id)
    return ids[:at], ids[at + 1 :]


def answer_logits(
    model: LlavaForConditionalGeneration,
    prefix: list[int],
    image_tokens: torch.Tensor,
    keep: torch.Tensor,
    turns: torch.Tensor,
) -> torch.Tensor:
    """Logits after every turn token, each turn on its own over one shared prefix.

    prefix: the ids before the image. image_tokens: (n, t, hidden); keep: bool (n, t), tokens that
    are false are left out and positions are counted through as if they were not there. turns:
    (n, k, m) ids that follow the image; the k turns of a sample do not see one another, so each is
    what the model would meet as a prompt of its own. Returns logits (n, k, m, vocabulary).
    """
    n, t = keep.shape
    k, m = turns.shape[1:]
    p = len(prefix)
    embed = model.get_input_embeddings()
    before = embed(torch.tensor(prefix))[None].expand(n, -1, -1)
    embeds = torch.cat([before, image_tokens, embed(turns.flatten(1))], dim=1)
    image_positions = p + keep.cumsum(1) - keep.long()
    turn_start = (p + keep.sum(1))[:, None, None]
    turn_positions = (turn_start + torch.arange(m)).expand(n, k, m).flatten(1)
    positions = torch.cat([torch.arange(p).expand(n, -1), image_positions, turn_positions], 1)
    turn_of = torch.cat([torch.zeros(p + t), 1 + torch.arange(k).repeat_interleave(m)])
    seen = (turn_of[None] == turn_of[:, None]) | (turn_of[None] == 0)
    kept = torch.cat([keep.new_ones(n, p), keep, keep.new_ones(n, k * m)], 1)
    length = p + t + k * m
    allowed = seen.tril()[None] & kept[:, None] | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(n, 1, length, length)
    mask.masked_fill_(~allowed[:, None], torch.finfo(torch.float32).min)
    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    )
    hidden = out.last_hidden_state[:, p + t :].unflatten(1, (k, m))
    return model.lm_head(hidden)
