"""Finds the attention heads of the tiny LLaVA that look at the asked disc, on scenes drawn for it.

The probe's scenes are the only place where the true boxes meet the model: they choose the head
whose attention makes the pseudo-labels, as METHOD section 4 chooses heads for LLaVA-1.5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from sdrpn_eval.demo import scenes as sc
from sdrpn_eval.demo.samples import Batch, Turns, batch_logits


@torch.no_grad()
def probe_heads(
    model: LlavaForConditionalGeneration, turns: Turns, probes: list[sc.Scene]
) -> dict[str, Any]:
    """Which heads look at the asked disc while the response is written.

    For every layer and head: the attention of the response tokens to the image tokens, averaged
    over the two tokens; how much of it falls on the cells of the asked disc (`mass`, absolute, and
    for each response token apart), and how often its maximum is one of them (`hits`).
    """
    model.set_attn_implementation("eager")
    mass, hits, cells_seen = [], [], []
    for start in tqdm(range(0, len(probes), 8), "probe", leave=False):
        some = probes[start : start + 8]
        keep = torch.ones(len(some), sc.GRID**2, dtype=torch.bool)
        batch = Batch(
            np.stack([s.view[None] for s in some]), keep, *turns.of([list(s.discs) for s in some])
        )
        rows = torch.stack(batch_logits(model, turns, batch, attentions=True)[1])[..., -2:, :, :]
        for i, scene in enumerate(some):
            covers = sc.patch_covers(scene.discs, sc.WHOLE).reshape(len(scene.discs), -1)
            inside = torch.from_numpy(covers > 0.1)
            maps = rows[:, i, : len(scene.discs)]  # layers, discs, response tokens, heads, cells
            mass.append((maps * inside[None, :, None, None]).sum(-1))
            peaks = maps.mean(2).argmax(-1)  # layers, discs, heads
            hits.append(inside[torch.arange(len(inside))[None, :, None], peaks])
            cells_seen.append(maps.mean((2, 3)))
    model.set_attn_implementation("sdpa")
    share = torch.cat(mass, 1).mean(1)  # layers, response tokens, heads
    report = {
        "mass": share.mean(1),
        "mass_colour_token": share[:, 0],
        "mass_pattern_token": share[:, 1],
        "hits": torch.cat(hits, 1).float().mean(1),
        "mean_cell": torch.cat(cells_seen, 1).mean(1).amax(-1),
    }
    return {name: np.round(values.double().numpy(), 4).tolist() for name, values in report.items()}


def choose_heads(report: dict[str, Any], share_of_best: float = 0.8) -> dict[str, list[int]]:
    """The heads of the best layer whose mass is at least `share_of_best` of the best head's."""
    mass = np.array(report["mass"])
    layer = int(mass.max(axis=1).argmax())
    heads = np.flatnonzero(mass[layer] >= share_of_best * mass[layer].max())
    return {str(layer): heads.tolist()}
