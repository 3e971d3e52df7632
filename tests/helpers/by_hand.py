"""LLaVA-1.5 and its RPN by plain matrix products, over the whole sequence, without any cache.

What the fast code must agree with. The RPN's map is computed in float64 from the
weights alone, by no layer of transformers or sdrpn. `greedy` is one plain forward of transformers'
decoder a token. Pictures go through PIL and the vision tower. Shapes: N tokens, C hidden size,
H heads, D = C / H.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sdrpn.backbones.llava15 import Llava15
from sdrpn.rpn.checkpoint import RPN

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


# --- pictures ----------------------------------------------------------------------------------


def normalised(image: Image.Image) -> Tensor:
    """[3, height, width] as CLIP wants it."""
    values = (np.asarray(image, dtype=np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.tensor(values.astype(np.float32)).permute(2, 0, 1)


def padded(image: Image.Image, side: int) -> Tensor:
    """The whole image on a centred square of the CLIP mean colour, resized: [3, side, side]."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), (122, 116, 104))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return normalised(square.resize((side, side), Image.Resampling.BICUBIC))


def stretched(image: Image.Image, box: tuple[int, int, int, int], side: int) -> Tensor:
    """A box of the original, resized without keeping its shape: [3, side, side]."""
    cut = image.crop(box)
    wide = cut.resize((side, cut.height), Image.Resampling.BILINEAR)
    return normalised(wide.resize((side, side), Image.Resampling.BILINEAR))


@torch.no_grad()
def image_tokens(llava: Llava15, pixels: Tensor) -> Tensor:
    """Tower features of layer -2 without the CLS token, projected: [3, side, side] -> [T, C]."""
    inner = llava.model.model
    states = inner.vision_tower(pixels[None], output_hidden_states=True).hidden_states
    first, second = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
    hidden = torch.nn.functional.gelu(states[-2][0, 1:] @ first.weight.T + first.bias)
    return hidden @ second.weight.T + second.bias


def crop_of(
    llava: Llava15, image: Image.Image, box: tuple[int, int, int, int], keep: Tensor | None = None
) -> Tensor:
    """Crop tokens of one box; keep: bool [T], which of them stay."""
    tokens = image_tokens(llava, stretched(image, box, llava.side))
    return tokens if keep is None else tokens[keep]


def kept(over: np.ndarray, grid: int) -> Tensor:
    """The mask policy: the thresholded map, cut to the box around it, over 0.5. [T]."""
    rows, columns = np.nonzero(over)
    cut = over[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    cells = torch.tensor(cut, dtype=torch.float32)[None, None]
    return (interpolate(cells, (grid, grid), mode="bilinear")[0, 0] > 0.5).flatten()


# --- sequences ---------------------------------------------------------------------------------


def prompt(llava: Llava15, question: str) -> str:
    """The vicuna_v1 prompt, written out."""
    return (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        f"USER: <image>\n{question} ASSISTANT:"
    )


@torch.no_grad()
def sequence(
    llava: Llava15, image: Image.Image, question: str, crop: Tensor | None = None
) -> tuple[Tensor, int]:
    """Embeddings [N, C] of [text][image tokens][crop tokens][question], and where the image is."""
    table = llava.model.get_input_embeddings().weight
    ids = llava.tokenizer(prompt(llava, question))["input_ids"]
    where = ids.index(llava.tokenizer.convert_tokens_to_ids("<image>"))
    parts = [table[ids[:where]], image_tokens(llava, padded(image, llava.side))]
    if crop is not None:
        parts.append(crop)
    return torch.cat([*parts, table[ids[where + 1 :]]]), where


@torch.no_grad()
def greedy(llava: Llava15, embeds: Tensor, steps: int) -> tuple[list[int], list[Tensor]]:
    """Token ids and logits of a greedy answer, each by one full forward without a cache."""
    inner, ids, logits = llava.model.model.language_model, [], []
    table = llava.model.get_input_embeddings().weight
    for _ in range(steps):
        hidden = inner(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, -1]
        logits.append(hidden @ llava.model.lm_head.weight.T)
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == llava.tokenizer.eos_token_id:
            return ids[:-1], logits
        embeds = torch.cat([embeds, table[ids[-1:]]])
    return ids, logits


# --- layers ------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0..N-1 on [H, N, D]: pairs (i, i + D/2) turn by position / theta^(2i/D)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * speed
    low, high = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def heads(x: Tensor, count: int) -> Tensor:
    """[N, H x D] -> [H, N, D]."""
    return x.reshape(len(x), count, -1).transpose(0, 1)


def decoder_layer(x: Tensor, layer: Any, config: Any) -> tuple[Tensor, Tensor]:
    """One causal decoder layer, [N, C] -> [N, C], and its attention [H, N, N]."""
    w = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    count, groups = config.num_attention_heads, config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    y = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
    q = rotate(heads(y @ w["self_attn.q_proj.weight"].T, count), theta)
    k = rotate(heads(y @ w["self_attn.k_proj.weight"].T, groups), theta)
    v = heads(y @ w["self_attn.v_proj.weight"].T, groups)
    k, v = (part.repeat_interleave(count // groups, dim=0) for part in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    attention = scores.masked_fill(future, float("-inf")).softmax(-1)
    mixed = (attention @ v).transpose(0, 1).flatten(1)
    x = x + mixed @ w["self_attn.o_proj.weight"].T
    y = rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T, attention


@torch.no_grad()
def roi_logits(llava: Llava15, rpn: RPN, image: Image.Image, question: str) -> np.ndarray:
    """The RPN's map (SD-RPN, section 3): [grid, grid]."""
    config = llava.text_config
    embeds, start = sequence(llava, image, question)
    x = embeds.double()
    for layer in llava.model.model.language_model.layers[: rpn.config.branch_layer]:
        x, _ = decoder_layer(x, layer, config)
    for layer in rpn.layers:
        x, _ = decoder_layer(x, layer, config)
    w = {name: tensor.double() for name, tensor in rpn.state_dict().items()}
    x = rms_norm(x, w["norm.weight"], config.rms_norm_eps)
    x = rms_norm(x, w["map_norm.weight"], config.rms_norm_eps)
    count, groups = config.num_attention_heads, config.num_key_value_heads
    q = heads(x[-1:] @ w["q_proj.weight"].T, count)
    k = heads(x[start : start + llava.image_tokens] @ w["k_proj.weight"].T, groups)
    k = k.repeat_interleave(count // groups, dim=0)
    products = (q @ k.transpose(1, 2))[:, 0]
    scaled = products / q.shape[-1] ** 0.5
    logits = scaled.mean(0) if rpn.config.multi_head else products.sum(0)
    return logits.reshape(llava.grid, llava.grid).numpy()
