"""Qwen2.5-VL and its RPN by plain products, over the whole sequence, without any cache.

What the fast code must agree with: sizes, patches and positions cell by cell, the RPN's map in
float64 from the weights alone. `greedy` is one plain forward of transformers' decoder a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.rpn.checkpoint import RPN
from tests.helpers.by_hand import CLIP_MEAN, CLIP_STD, heads, rms_norm

CELL, PATCH = 28, 14
Pixels = tuple[int, int]


# --- pictures ----------------------------------------------------------------------------------


def fit(width: int, height: int, least: int, most: int) -> tuple[int, int]:
    """(width, height) in whole cells, within limits in pixels."""
    a, b = CELL * round(height / CELL), CELL * round(width / CELL)
    if a * b > most:
        shrink = math.sqrt(height * width / most)
        a, b = (CELL * math.floor(edge / shrink / CELL) for edge in (height, width))
    elif a * b < least:
        grow = math.sqrt(least / (height * width))
        a, b = (CELL * math.ceil(edge * grow / CELL) for edge in (height, width))
    return b, a


class Picture(NamedTuple):
    """Its patches [n, values], and its cells."""

    patches: Tensor
    rows: int
    columns: int


def patches_of(image: Image.Image, limits: Pixels) -> Picture:
    """Resized to fit, normalised, cut into patches: cell by cell, each 2 x 2 patches."""
    width, height = fit(*image.size, *limits)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    values = resize(values, [height, width], InterpolationMode.BICUBIC, antialias=True)
    mean, std = (
        torch.tensor(one, dtype=torch.float32)[:, None, None] for one in (CLIP_MEAN, CLIP_STD)
    )
    values = (values / 255 - mean) / std
    found = []
    for top in range(0, height, CELL):
        for left in range(0, width, CELL):
            for y in (top, top + PATCH):
                for x in (left, left + PATCH):
                    patch = values[:, None, y : y + PATCH, x : x + PATCH]
                    found.append(patch.expand(-1, 2, -1, -1).reshape(-1))
    return Picture(torch.stack(found), height // CELL, width // CELL)


def whole(image: Image.Image, limits: Pixels) -> Picture:
    """The first look: PIL's resize, then the one within the limits."""
    size = fit(*image.size, 4 * CELL**2, 16384 * CELL**2)
    assert min(size) >= CELL
    return patches_of(image.resize(size, Image.Resampling.BICUBIC), limits)


@torch.no_grad()
def tokens_of(qwen: Qwen25VL, picture: Picture) -> Tensor:
    """[rows * columns, C]."""
    grid = torch.tensor([[1, 2 * picture.rows, 2 * picture.columns]])
    return qwen.model.model.visual(picture.patches, grid_thw=grid).pooler_output


def limits_of(qwen: Qwen25VL) -> Pixels:
    return qwen.image_rules.min_pixels, qwen.image_rules.max_pixels


# --- sequences ---------------------------------------------------------------------------------


class Crop(NamedTuple):
    """All tokens of a crop, and which of them stay."""

    tokens: Tensor
    rows: int
    columns: int
    keep: Tensor


def crop_of(
    qwen: Qwen25VL, image: Image.Image, box: Sequence[int], over: np.ndarray | None
) -> Crop:
    """over: the thresholded map [rows, columns]; None keeps all tokens."""
    picture = patches_of(image.crop(tuple(box)), limits_of(qwen))
    rows, columns = picture.rows, picture.columns
    keep = torch.ones(rows * columns, dtype=torch.bool)
    if over is not None:
        down, across = np.nonzero(over)
        cut = over[down.min() : down.max() + 1, across.min() : across.max() + 1]
        cells = torch.tensor(cut, dtype=torch.float32)[None, None]
        keep = (interpolate(cells, (rows, columns), mode="bilinear")[0, 0] > 0.5).flatten()
    return Crop(tokens_of(qwen, picture), rows, columns, keep)


def prompt(question: str, pictures: int = 1) -> str:
    """The chat template, written out."""
    shown = "<|vision_start|><|image_pad|><|vision_end|>" * pictures
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
    )


class Tokens(NamedTuple):
    """Embeddings [N, C], positions [3, N], and the columns of the first look."""

    embeds: Tensor
    positions: Tensor
    image: slice
    rows: int
    columns: int


@torch.no_grad()
def sequence(qwen: Qwen25VL, image: Image.Image, question: str, crop: Crop | None = None) -> Tokens:
    """[text][picture] ([mark][crop][mark]) [mark][question], as the method lays it out."""
    table = qwen.model.get_input_embeddings().weight
    start_mark, picture_id, end_mark = (
        qwen.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "image_pad", "vision_end")
    )
    ids = qwen.tokenizer(prompt(question))["input_ids"]
    where = ids.index(picture_id)
    first = whole(image, limits_of(qwen))
    embeds: list[Tensor] = []
    positions: list[tuple[int, int, int]] = []
    at = 0

    def say(tokens: Sequence[int]) -> None:
        nonlocal at
        for token in tokens:
            embeds.append(table[token])
            positions.append((at, at, at))
            at += 1

    def show(tokens: Tensor, rows: int, columns: int, keep: Tensor) -> None:
        nonlocal at
        for y in range(rows):
            for x in range(columns):
                if keep[y * columns + x]:
                    embeds.append(tokens[y * columns + x])
                    positions.append((at, at + y, at + x))
        at += max(rows, columns)

    say(ids[:where])
    every = torch.ones(first.rows * first.columns, dtype=torch.bool)
    show(tokens_of(qwen, first), first.rows, first.columns, every)
    if crop is not None:
        say([start_mark])
        show(*crop)
        say([end_mark])
    say(ids[where + 1 :])
    return Tokens(
        torch.stack(embeds),
        torch.tensor(positions).T,
        slice(where, where + len(every)),
        first.rows,
        first.columns,
    )


@torch.no_grad()
def greedy(qwen: Qwen25VL, start: Tokens, steps: int) -> tuple[list[int], list[Tensor]]:
    """Token ids and logits of a greedy answer, each by one full forward without a cache."""
    inner, table = qwen.model.model.language_model, qwen.model.get_input_embeddings().weight
    embeds, positions = start.embeds, start.positions
    ids: list[int] = []
    logits: list[Tensor] = []
    for _ in range(steps):
        hidden = inner(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            use_cache=False,
        ).last_hidden_state[0, -1]
        logits.append(hidden @ qwen.model.lm_head.weight.T)
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == qwen.tokenizer.eos_token_id:
            return ids[:-1], logits
        embeds = torch.cat([embeds, table[ids[-1:]]])
        positions = torch.cat([positions, positions.max() + torch.ones(3, 1).long()], dim=1)
    return ids, logits


# --- layers ------------------------------------------------------------------------------------


def rotate(x: Tensor, positions: Tensor, config: Any) -> Tensor:
    """M-RoPE on [H, N, D]: each frequency turns by the position on its axis."""
    half = x.shape[-1] // 2
    speed = config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=x.dtype) / half)
    sections = config.rope_parameters["mrope_section"]
    axis = [one for one, count in enumerate(sections) for _ in range(count)]
    angle = torch.stack([positions[axis[j]].to(x.dtype) * speed[j] for j in range(half)], dim=-1)
    low, high = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def decoder_layer(x: Tensor, layer: Any, positions: Tensor, config: Any) -> Tensor:
    """One causal decoder layer, [N, C] -> [N, C]."""
    w = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    count, groups = config.num_attention_heads, config.num_key_value_heads
    y = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
    q, k, v = (
        heads(y @ w[f"self_attn.{p}_proj.weight"].T + w[f"self_attn.{p}_proj.bias"], own)
        for p, own in (("q", count), ("k", groups), ("v", groups))
    )
    q, k = rotate(q, positions, config), rotate(k, positions, config)
    k, v = (part.repeat_interleave(count // groups, dim=0) for part in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    x = x + mixed.transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
    y = rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T


@torch.no_grad()
def logits_of_words(qwen: Qwen25VL, rpn: RPN, start: Tokens) -> np.ndarray:
    """Logits of all tokens behind the picture for its cells: [words, rows, columns]."""
    config, positions = qwen.text_config, start.positions
    x = start.embeds.double()
    below = qwen.model.model.language_model.layers[: rpn.config.branch_layer]
    for layer in [*below, *rpn.layers]:
        x = decoder_layer(x, layer, positions, config)
    w = {name: tensor.double() for name, tensor in rpn.state_dict().items()}
    x = rms_norm(x, w["map_norm.weight"], config.rms_norm_eps)
    count, groups = config.num_attention_heads, config.num_key_value_heads
    behind = slice(start.image.stop, None)
    q = heads(x[behind] @ w["q_proj.weight"].T + w["q_proj.bias"], count)
    k = heads(x[start.image] @ w["k_proj.weight"].T + w["k_proj.bias"], groups)
    q = rotate(q, positions[:, behind], config)
    k = rotate(k, positions[:, start.image], config).repeat_interleave(count // groups, dim=0)
    logits = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).mean(0)
    return logits.reshape(-1, start.rows, start.columns).numpy()


def roi_logits(qwen: Qwen25VL, rpn: RPN, image: Image.Image, question: str) -> np.ndarray:
    """The RPN's map, [rows, columns]: what the last token of the prompt looks at."""
    return logits_of_words(qwen, rpn, sequence(qwen, image, question))[-1]
