"""Stage 0: the tower learns to name, in the language model's own words, what each patch shows.

A patch's projected feature is to resemble the word embeddings of its colour, shape, pattern, digit
and field; this stands for CLIP and for LLaVA's alignment stage.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.tiny_trio.drawing import GROUPS
from tools.tiny_trio.optimizers import Optimizers
from tools.tiny_trio.workers import rank, world
from tools.tiny_vstar.tiny_model import encode, pixel_values


class Banks(torch.nn.Module):
    """Word embeddings of each group, with a learned vector for "none of them" and temperatures."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        super().__init__()
        words: Any = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        ids = processor.tokenizer.convert_tokens_to_ids
        self.words = [words[ids(list(group))] for group in GROUPS.values()]
        self.none = torch.nn.Parameter(0.06 * torch.randn(len(GROUPS), words.shape[1]))
        self.heat = torch.nn.Parameter(torch.full((len(GROUPS),), math.log(12.0)))

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Logits (n, 256, words + 1) of each group."""
        unit = F.normalize(features.float(), dim=-1)
        banks = [torch.cat([w, self.none[i : i + 1]]) for i, w in enumerate(self.words)]
        return [
            self.heat[i].exp() * unit @ F.normalize(bank, dim=-1).T for i, bank in enumerate(banks)
        ]


def train_vision(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    views: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    batch_size: int = 64,
    rate: float = 1.5e-3,
    projector: bool = True,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train the tower, and the `projector`, in place; returns the log.

    The last 200 views are held out.
    """
    torch.manual_seed(seed)
    banks = Banks(model, processor)
    projectors = [model.model.multi_modal_projector] if projector else []
    trained = (model.model.vision_tower, *projectors, banks)
    named = [pair for module in trained for pair in module.named_parameters()]
    optimizers = Optimizers(named, rate=rate, warmup=30, steps=steps)
    rng = np.random.default_rng((seed, 0, 1))
    order = np.concatenate(
        [
            rng.permutation(len(views) - 200)
            for _ in range(1 + steps * batch_size // (len(views) - 200))
        ]
    )
    log: list[dict[str, float]] = []
    for step in tqdm(range(steps), "stage 0", mininterval=10, disable=rank() > 0):
        chosen = order[step * batch_size : (step + 1) * batch_size][rank() :: world()]
        loss = group_losses(model, processor, banks, views[chosen], labels[chosen])[0]
        optimizers.step(loss)
        if rank() == 0 and ((step + 1) % 50 == 0 or step == steps - 1):
            with torch.no_grad():
                _, right = group_losses(model, processor, banks, views[-200:], labels[-200:])
            log.append({"step": step + 1, "loss": loss.item(), **right})
            tqdm.write("  ".join(f"{k} {v:.3f}" for k, v in log[-1].items()))
    return log


def group_losses(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    banks: Banks,
    views: np.ndarray,
    labels: np.ndarray,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, and per group the share of right patches among those that show one of its words."""
    with torch.autocast("cpu", torch.bfloat16):
        features = encode(model, pixel_values(views, processor))
    loss, right = torch.zeros(()), {}
    for i, (name, logits) in enumerate(zip(GROUPS, banks(features), strict=True)):
        wanted = torch.from_numpy(labels[:, i].astype(np.int64))
        count = len(GROUPS[name])
        shown = (wanted >= 0) & (wanted < count)
        none = wanted == count
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        each = each.view_as(wanted)
        for chosen, weight in ((shown, 1.0), (none, 0.5)):
            if chosen.any():
                loss = loss + weight * each[chosen].mean()
        if shown.any():
            right[name] = (logits.argmax(-1) == wanted)[shown].float().mean().item()
    return loss, right
