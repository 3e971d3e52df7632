"""Stage 1: LLaVA training on questions about full views, zoomed views and both.

The tower is frozen, as in LLaVA's own training, so every view is encoded once. No box is ever shown
to the model; boxes only steer what is cropped.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.tiny_trio import scenes as sc
from tools.tiny_trio.optimizers import Optimizers
from tools.tiny_trio.workers import rank, world
from tools.tiny_vstar.tiny_model import pixel_values, split_prompt

LANGUAGE_POOL, HELD_OUT_POOL = 1, 2
FINE_SHARE = 0.4
WEBP_SHARE, QUALITY = 0.25, 90
ZOOMS = 3
TURNS = 6
FINE_ASKED, RELATIONS_ASKED = 0.3, 0.5
"""How often a question that the view cannot answer, or one about a neighbour, is asked of the view.

Neither can be learned before the others are, and their loss would drown them."""
PROJECTOR_SCALE = 0.11
"""Brings the norm of the image tokens down to that of the word embeddings after stage 0."""
BFLOAT16 = True
"""Whether stage 1 computes in bfloat16 where autocast says so."""


@dataclass
class Sample:
    """A scene's views as tower features, and its questions.

    features: float16 (1 + zooms, 256, hidden), the full view first. zoomed: which item each zoom
    shows.
    """

    features: np.ndarray
    items: tuple[sc.Item, ...]
    zoomed: tuple[int, ...]


def _draw(
    seed: tuple[int, ...],
    count: int,
    *,
    oracle: bool,
    fine_share: float,
    kinds: Sequence[str],
    loose: bool,
) -> list[tuple[np.ndarray, tuple, tuple]]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        scene = sc.MAKERS[kinds[number % len(kinds)]](rng, fine_share)
        image = scene.image
        if rng.random() < WEBP_SHARE:
            stored = Image.open(io.BytesIO(sc.webp_bytes(image, QUALITY)))
            image = np.asarray(stored.convert("RGB"))
        if oracle:
            zoomed = tuple(range(len(scene.items)))[:5]
            boxes = [sc.oracle_box(scene.items[i].box) for i in zoomed]
        else:
            own = [i for i, item in enumerate(scene.items) if not item.relation]
            fine = [i for i in own if scene.items[i].fine] or own
            zoomed = (int(rng.choice(fine)), *(int(i) for i in rng.choice(own, ZOOMS - 1)))
            boxes = [sc.zoom_box(rng, scene.items[i], loose=loose) for i in zoomed]
        views = np.stack([sc.view_of(image, box) for box in (sc.WHOLE, *boxes)])
        found.append((views, scene.items, zoomed))
    return found


@torch.no_grad()
def tower_features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, views: np.ndarray
) -> np.ndarray:
    """What the tower says of views, before the projector: float16 (n, 256, hidden)."""
    found = []
    for start in range(0, len(views), 64):
        with torch.autocast("cpu", torch.bfloat16):
            pixels = pixel_values(views[start : start + 64], processor)
            states = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        found.append(states.half().numpy())
    return np.concatenate(found)


def draw_samples(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    seed: tuple[int, ...],
    scenes: int,
    *,
    oracle: bool = False,
    fine_share: float = FINE_SHARE,
    kinds: Sequence[str] = sc.KINDS,
    loose: bool = False,
) -> list[Sample]:
    """Draw scenes of all kinds in turn and encode their views; `oracle` zooms on true boxes."""
    samples = []
    for start in tqdm(range(0, scenes, 30), "scenes", mininterval=10):
        chunk = _draw(
            (*seed, start),
            min(30, scenes - start),
            oracle=oracle,
            fine_share=fine_share,
            kinds=kinds,
            loose=loose,
        )
        features = tower_features(model, processor, np.concatenate([v for v, _, _ in chunk]))
        at = 0
        for v, items, zoomed in chunk:
            samples.append(Sample(features[at : at + len(v)], items, zoomed))
            at += len(v)
    return samples


@dataclass(frozen=True)
class Batch:
    """Scenes with a full view and a crop each, and questions asked with or without the crop.

    full, crop: float16 (n, 256, hidden); keep: bool (n, 256), crop tokens that are there. turns:
    ids (n, k, m), each a question, its response and padding; zoomed: bool (n, k), the crop is seen;
    targets (n, k, m): the next token where it is of the response, else -100.
    """

    full: np.ndarray
    crop: np.ndarray
    keep: torch.Tensor
    zoomed: torch.Tensor
    turns: torch.Tensor
    targets: torch.Tensor


class Turns:
    """Token ids of questions and responses."""

    def __init__(self, processor: LlavaProcessor, long: bool = False) -> None:
        """With `long`, responses give the whole name."""
        self.processor, self.long = processor, long
        self.prefix = split_prompt(processor, "")[0]
        self.known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def ids(self, item: sc.Item) -> tuple[list[int], list[int]]:
        """Ids of the prompt after the image, and of the response with </s>."""
        said = item.long_response if self.long else item.response
        key = item.question, said
        if key not in self.known:
            tokenizer = self.processor.tokenizer
            response = tokenizer(said, add_special_tokens=False)["input_ids"]
            after = split_prompt(self.processor, item.question)[1]
            self.known[key] = after, [*response, tokenizer.eos_token_id]
        return self.known[key]

    def of(self, asked: Sequence[Sequence[sc.Item]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns and targets (n, k, m) of each sample's questions."""
        ids = [[self.ids(item) for item in row] for row in asked]
        k = max(len(row) for row in ids)
        m = max(len(a) + len(b) - 1 for row in ids for a, b in row)
        turns = torch.full((len(ids), k, m), self.processor.tokenizer.pad_token_id)
        targets = torch.full((len(ids), k, m), -100)
        for i, row in enumerate(ids):
            for j, (after, response) in enumerate(row):
                whole = after + response
                turns[i, j, : len(whole) - 1] = torch.tensor(whole[:-1])
                targets[i, j, len(after) - 1 : len(whole) - 1] = torch.tensor(response)
        return turns, targets


def kept_tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    """Which crop tokens stay, bool (n, 256): all, or in a quarter of the samples a blob of them."""
    keep = np.ones((count, sc.GRID, sc.GRID), bool)
    y, x = np.mgrid[: sc.GRID, : sc.GRID]
    for i in np.flatnonzero(rng.random(count) < 0.25):
        centre, radius = rng.uniform(5, 10, 2), rng.uniform(5, 9)
        keep[i] = np.hypot(y - centre[0], x - centre[1]) < radius
    return keep.reshape(count, -1)


Asked = tuple[Sample, int, list[sc.Item], list[sc.Item]]
"""A sample, one of its zooms, questions on the full view alone and with that zoom."""


def make_batch(
    samples: Sequence[Sample],
    rng: np.random.Generator,
    turns: Turns,
    size: int,
    easy: bool,
) -> Batch:
    """`size` scenes at random; `easy` asks only what the view shows, and no relations."""

    def is_asked(item: sc.Item) -> bool:
        if easy:
            return not item.fine and not item.relation
        often = FINE_ASKED if item.fine else 1.0
        return rng.random() < often * (RELATIONS_ASKED if item.relation else 1.0)

    asked: list[Asked] = []
    while len(asked) < size:
        sample = samples[int(rng.integers(0, len(samples)))]
        items = [sample.items[i] for i in rng.permutation(len(sample.items))]
        full = [item for item in items if is_asked(item)]
        if not full:
            continue
        z = int(rng.integers(0, len(sample.zoomed)))
        shown = sample.items[sample.zoomed[z]].box
        same = [item for item in items if item.box == shown and not (easy and item.relation)]
        others = [item for item in full if item.box != shown and not item.fine]
        asked.append((sample, z, full[:TURNS], [*same[:2], *others[: int(rng.integers(0, 2))]]))
    return packed(asked, turns, torch.tensor(kept_tokens(rng, size)))


def packed(asked: Sequence[Asked], turns: Turns, keep: torch.Tensor) -> Batch:
    """The batch of these questions."""
    full = np.stack([sample.features[0] for sample, _, _, _ in asked])
    crop = np.stack([sample.features[1 + z] for sample, z, _, _ in asked])
    ids, targets = turns.of([[*first, *second] for _, _, first, second in asked])
    zoomed = torch.zeros(ids.shape[:2], dtype=torch.bool)
    for i, (_, _, first, second) in enumerate(asked):
        zoomed[i, len(first) : len(first) + len(second)] = True
    return Batch(full, crop, keep, zoomed, ids, targets)


def batch_logits(model: LlavaForConditionalGeneration, turns: Turns, batch: Batch) -> torch.Tensor:
    """Logits after every turn token: float32 (n, k, m, vocabulary).

    A scene is one sequence, [prefix][full view][crop][turns]: turns do not see one another, and
    only those asked with the crop see it. Positions are those that each question has on its own.
    """
    (n, k, m), p, t = batch.turns.shape, len(turns.prefix), batch.keep.shape[1]
    keep, zoomed, embed = batch.keep, batch.zoomed, model.get_input_embeddings()
    after = p + t + keep.sum(1)
    start = torch.where(zoomed, after[:, None], p + t)[:, :, None]
    positions = torch.cat(
        [
            torch.arange(p + t).expand(n, -1),
            p + t + keep.cumsum(1) - keep.long(),
            (start + torch.arange(m)).flatten(1),
        ],
        dim=1,
    )
    group = torch.cat([torch.zeros(p + t), torch.ones(t), 2 + torch.arange(k).repeat_interleave(m)])
    sees_crop = torch.cat(
        [keep.new_zeros(n, p + t), keep.new_ones(n, t), zoomed.repeat_interleave(m, 1)], 1
    )
    kept = torch.cat([keep.new_ones(n, p + t), keep, keep.new_ones(n, k * m)], 1)
    seen = (group[None] == group[:, None]) | (group == 0)[None]
    allowed = seen[None] | ((group == 1)[None, None] & sees_crop[:, :, None])
    length = len(group)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = allowed & causal & kept[:, None] | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(n, 1, length, length)
    mask.masked_fill_(~allowed[:, None], -1e9)
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        views = torch.from_numpy(np.concatenate([batch.full, batch.crop], axis=1)).float()
        tokens = model.model.multi_modal_projector(views)
        before = embed(torch.tensor(turns.prefix))[None].expand(n, -1, -1)
        embeds = torch.cat([before, tokens.float(), embed(batch.turns.flatten(1))], dim=1)
        out = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        states = out.last_hidden_state[:, p + 2 * t :].unflatten(1, (k, m))
        return model.lm_head(states).float()


def train_language(
    model: LlavaForConditionalGeneration,
    turns: Turns,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    steps: int,
    batch_size: int = 16,
    easy_steps: int = 0,
    rate: float = 1e-3,
    seed: int = 0,
    evaluate_every: int = 100,
) -> list[dict[str, float]]:
    """Train projector and language model in place; returns the log."""
    named = [pair for pair in model.named_parameters() if "vision_tower" not in pair[0]]
    optimizers = Optimizers(named, rate=rate, warmup=50, steps=steps)
    rng = np.random.default_rng((seed, LANGUAGE_POOL, 1, rank()))
    log: list[dict[str, float]] = []
    losses = []
    for step in tqdm(range(steps), "stage 1", mininterval=20, disable=rank() > 0):
        batch = make_batch(samples, rng, turns, batch_size // world(), step < easy_steps)
        logits = batch_logits(model, turns, batch)
        loss = F.cross_entropy(logits.flatten(0, 2), batch.targets.flatten())
        optimizers.step(loss)
        total = loss.item()
        losses.append(total)
        if rank():
            continue
        if (step + 1) % 25 == 0:
            tqdm.write(f"step {step + 1} loss {np.mean(losses[-25:]):.3f}")
        if (step + 1) % evaluate_every == 0 or step == steps - 1:
            log.append({"step": step + 1, "loss": total, **evaluate(model, turns, held_out)})
            tqdm.write("  ".join(f"{k} {v:.3f}" for k, v in log[-1].items()))
    return log


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, turns: Turns, held_out: Sequence[Sample]
) -> dict[str, float]:
    """Shares of names and of whole responses that are right, full view and oracle zoom."""
    right: dict[str, list[bool]] = {}

    zooms = [(s, z) for s in held_out for z in range(min(2, len(s.zoomed)))]
    asked: list[Asked] = [
        (s, z, [] if z else list(s.items), [s.items[s.zoomed[z]]]) for s, z in zooms
    ]
    for begin in range(0, len(asked), 16):
        some = asked[begin : begin + 16]
        batch = packed(some, turns, torch.ones(len(some), sc.GRID**2, dtype=torch.bool))
        hits = batch_logits(model, turns, batch).argmax(-1) == batch.targets
        for i, (_, _, first, second) in enumerate(some):
            for j, item in enumerate([*first, *second]):
                told = hits[i, j][batch.targets[i, j] >= 0].tolist()
                kind = "relation" if item.relation else item.kind
                how = "full" if j < len(first) else "oracle"
                right.setdefault(f"{kind}_{how}_{item.category}", []).append(all(told))
                if how == "full":
                    right.setdefault(f"{kind}_name", []).append(all(told[:-2]))
    return {name: float(np.mean(hits)) for name, hits in sorted(right.items())}


def scale_projector(model: LlavaForConditionalGeneration, scale: float = PROJECTOR_SCALE) -> None:
    """Bring the norm of image tokens down to that of word embeddings, once after stage 0."""
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(scale)
        model.model.multi_modal_projector.linear_2.bias.mul_(scale)
