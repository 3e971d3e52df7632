"""Trains the tiny LLaVA from scratch: `python -m tools.tiny_vstar.train_tiny --out DIR`.

Stage 0 aligns the vision tower with words: each patch's projected feature is to resemble the
language model's own embedding of the colour and of the pattern it shows (this stands for CLIP and
for LLaVA's alignment stage). Stage 1 is LLaVA training on questions about full views, zoomed views
and both. No box of a disc is ever shown to the model; boxes only steer what is cropped.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sdrpn.io.atomic import write_json
from sdrpn.io.resumable import prefetch
from tools.tiny_vstar import scenes as sc
from tools.tiny_vstar.samples import (
    Batch,
    Turns,
    batch_logits,
    one_view_batch,
    two_view_batch,
    vision_batch,
)
from tools.tiny_vstar.tiny_model import (
    build_model,
    build_processor,
    encode,
    pixel_values,
)

VISION_POOL, LANGUAGE_POOL, HELD_OUT_POOL = range(3)
"""Second number of a scene pool's seed: the pools of one run share no scene."""
VISION_STEPS, LANGUAGE_STEPS = 300, 800
POOL = 5000
"""Scenes drawn for each stage; each takes 0.65 MB of memory."""
WEBP_SHARE = 0.25
"""Share of the training scenes that went through a lossy WebP file, as the benchmark's did."""
PROJECTOR_SCALE = 0.11
"""Brings the norm of the image tokens down to that of the word embeddings after stage 0."""


def schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int):
    """Linear warm-up, then cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vision(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pool: list[sc.Scene],
    *,
    steps: int,
    batch_size: int = 48,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Stage 0; trains tower and projector in place and returns the log."""
    ids = processor.tokenizer.convert_tokens_to_ids
    words: Any = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    colour_words, pattern_words = words[ids(list(sc.COLOURS))], words[ids(list(sc.PATTERNS))]
    ground = torch.nn.Parameter(0.06 * torch.randn(1, words.shape[1]))
    heat = torch.nn.Parameter(torch.tensor(math.log(10.0)))
    trained = [model.model.vision_tower, model.model.multi_modal_projector]
    parameters = [p for module in trained for p in module.parameters()] + [ground, heat]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    rates = schedule(optimizer, 50, steps)
    rng = np.random.default_rng((seed, VISION_POOL, 1))
    batches = prefetch(range(steps), lambda _: vision_batch(pool, rng, batch_size))
    log: list[dict[str, float]] = []
    bar = tqdm(batches, "stage 0: vision", steps)
    for step, (views, colours, patterns) in bar:
        features = F.normalize(encode(model, pixel_values(views, processor)), dim=-1)
        bank = F.normalize(torch.cat([colour_words, ground]), dim=-1)
        colour_logits = heat.exp() * features @ bank.T
        pattern_logits = heat.exp() * features @ F.normalize(pattern_words, dim=-1).T
        loss = F.cross_entropy(colour_logits.flatten(0, 1), colours.flatten())
        loss = loss + F.cross_entropy(pattern_logits.flatten(0, 1), patterns.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        if step % 25 == 0 or step == steps - 1:
            pairs = ((colour_logits, colours), (pattern_logits, patterns))
            right = [(a.argmax(-1) == b)[b >= 0].float().mean().item() for a, b in pairs]
            log.append({"step": step, "loss": loss.item(), "colour": right[0], "pattern": right[1]})
            bar.set_postfix({k: f"{v:.3f}" for k, v in log[-1].items() if k != "step"})
    return log


def train_language(
    model: LlavaForConditionalGeneration,
    turns: Turns,
    pool: list[sc.Scene],
    held_out: list[sc.Scene],
    *,
    steps: int,
    batch_size: int = 48,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Stage 1; trains every weight in place, the tower slowly, and returns the log."""
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(PROJECTOR_SCALE)
        model.model.multi_modal_projector.linear_2.bias.mul_(PROJECTOR_SCALE)
    tower = list(model.model.vision_tower.parameters())
    rest = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    groups = [{"params": tower, "lr": 2e-4}, {"params": rest, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    rates = schedule(optimizer, 100, steps)
    rng = np.random.default_rng((seed, LANGUAGE_POOL, 1))
    full, zoomed = batch_size // 2, batch_size // 5

    def make(step: int) -> tuple[Batch, Batch]:
        easy = step < 100
        both = two_view_batch(pool, rng, turns, batch_size - full - zoomed, easy)
        return one_view_batch(pool, rng, turns, full, zoomed, easy), both

    log: list[dict[str, float]] = []
    bar = tqdm(prefetch(range(steps), make), "stage 1: language", steps)
    for step, batches in bar:
        optimizer.zero_grad()
        count = sum(int((b.targets >= 0).sum()) for b in batches)
        total = 0.0
        for batch in batches:
            logits = batch_logits(model, turns, batch)
            loss = F.cross_entropy(logits.flatten(0, 2), batch.targets.flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_([*tower, *rest], 1.0)
        optimizer.step()
        rates.step()
        bar.set_postfix(loss=f"{total:.3f}")
        if (step + 1) % 50 == 0 or step == steps - 1:
            log.append({"step": step + 1, "loss": total, **evaluate(model, turns, held_out)})
            tqdm.write("  ".join(f"{k} {v:.3f}" for k, v in log[-1].items()))
    return log


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, turns: Turns, held_out: list[sc.Scene]
) -> dict[str, float]:
    """Share of whole answers that are right, with the full view alone and with the oracle zoom."""
    right: dict[str, list[bool]] = {}
    asked = [(scene, disc) for scene in held_out for disc in scene.discs]
    for start in range(0, len(asked), 96):
        some = asked[start : start + 96]
        for kind in ("full", "oracle"):
            views = [
                [s.view]
                if kind == "full"
                else [s.view, sc.zoomed_view(s.image, sc.oracle_box(d.centre))]
                for s, d in some
            ]
            keep = torch.ones(len(some), sc.GRID**2 * len(views[0]), dtype=torch.bool)
            batch = Batch(np.array(views), keep, *turns.of([[d] for _, d in some]))
            logits = batch_logits(model, turns, batch)
            hits = (logits.argmax(-1) == batch.targets).all(-1)[:, 0]
            for (_, disc), hit in zip(some, hits, strict=True):
                right.setdefault(f"{kind}_{'fine' if disc.fine else 'coarse'}", []).append(
                    bool(hit)
                )
    return {name: float(np.mean(hits)) for name, hits in sorted(right.items())}


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write float16 weights and the processor to the folder `out`; the model keeps their values."""
    model.half().save_pretrained(out)
    model.float()
    processor.save_pretrained(out)


def train(
    out: Path,
    *,
    seed: int = 0,
    vision_steps: int = VISION_STEPS,
    language_steps: int = LANGUAGE_STEPS,
    pool: int = POOL,
) -> None:
    """Both stages; leaves the model and `training.json` in the folder `out`."""
    start = time.monotonic()
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    turns = Turns(processor)
    facts: dict[str, Any] = {"seed": seed, "torch": torch.__version__, "seconds": {}}

    def clock(name: str) -> None:
        facts["seconds"][name] = round(time.monotonic() - start - sum(facts["seconds"].values()), 1)

    def scenes(which: int, count: int, webp_share: float) -> list[sc.Scene]:
        drawn = sc.make_pool((seed, which), count, webp_share=webp_share)
        clock(f"scenes_{which}")
        return drawn

    facts["vision"] = train_vision(
        model, processor, scenes(VISION_POOL, pool, WEBP_SHARE), steps=vision_steps, seed=seed
    )
    clock("vision")
    held_out = scenes(HELD_OUT_POOL, 120, 1.0)
    facts["language"] = train_language(
        model,
        turns,
        scenes(LANGUAGE_POOL, pool, WEBP_SHARE),
        held_out,
        steps=language_steps,
        seed=seed,
    )
    clock("language")
    save(model, processor, out)
    write_json(out / "training.json", facts)
    print(f"held out: {facts['language'][-1]}")
    print(f"saved to {out} after {time.monotonic() - start:.0f} s")


def main() -> None:
    """Read the command line and train."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="decides scenes, weights and samples")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS, help="of stage 0")
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS, help="of stage 1")
    parser.add_argument("--pool", type=int, default=POOL, help="scenes drawn for each stage")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        args.out,
        seed=args.seed,
        vision_steps=args.vision_steps,
        language_steps=args.language_steps,
        pool=args.pool,
    )


if __name__ == "__main__":
    main()
