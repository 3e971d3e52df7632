"""Make the second edition anew: `python -m tools.tiny_trio.build --out out/trio`.

Seeded, in this order: stage 0 (tower), stage 1 (language model), stages 2 and 3 (labels and RPN,
with the public commands). Every stage leaves its result in a folder and is skipped where that is
complete, so that an interrupted build goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sdrpn.io.atomic import write_json
from tools.tiny_trio import distil, language, vision
from tools.tiny_trio import scenes as sc
from tools.tiny_trio.language import HELD_OUT_POOL, LANGUAGE_POOL
from tools.tiny_trio.model import build_model, build_processor
from tools.tiny_trio.patches import vision_pool
from tools.tiny_trio.workers import in_parallel, rank

VIEWS, VISION_STEPS, VISION_BATCH = 12000, 1000, 64
SCENES, HELD_OUT, LANGUAGE_STEPS = 3000, 120, 700
LOG = "log.json"


def vision_job(work: Path, out: Path, steps: int, seed: int) -> None:
    """Stage 0 in one of the training processes."""
    torch.manual_seed(seed)
    views = np.load(work / "views.npy", mmap_mode="r")
    labels = np.load(work / "labels.npy")
    processor = build_processor()
    model = build_model(processor.tokenizer)
    model.model.vision_tower.set_attn_implementation("eager")  # faster than sdpa on these sizes
    log = vision.train_vision(
        model, processor, views, labels, steps=steps, batch_size=VISION_BATCH, seed=seed
    )
    _finish(model, processor, out, log)


def language_job(start: Path, out: Path, kinds: tuple[str, ...], steps: int, seed: int) -> None:
    """Stage 1 in one of the training processes; each draws and encodes the same scenes."""
    torch.manual_seed(seed + 1)
    model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(start)
    model.set_attn_implementation("eager")
    samples = language.draw_samples(
        model, processor, (seed, LANGUAGE_POOL), SCENES, kinds=kinds, workers=1
    )
    held_out = language.draw_samples(
        model,
        processor,
        (seed, HELD_OUT_POOL),
        HELD_OUT,
        oracle=True,
        fine_share=0.5,
        kinds=kinds,
        workers=1,
    )
    language.scale_projector(model)
    log = language.train_language(
        model, language.Turns(processor), samples, held_out, steps=steps, seed=seed
    )
    _finish(model, processor, out, log, half=True)


def _finish(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    out: Path,
    log: list[dict[str, float]],
    *,
    half: bool = False,
) -> None:
    if rank() == 0:
        (model.half() if half else model).save_pretrained(out)
        processor.save_pretrained(out)
        write_json(out / LOG, log)


def build(
    out: Path,
    seed: int,
    *,
    branch_layer: int,
    vision_steps: int,
    steps: int,
    kinds: tuple[str, ...],
) -> None:
    """Write out/stage0, out/model with its RPN, and out/facts.json."""
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, Any] = {}
    started = time.monotonic()
    if not (out / "stage0" / LOG).exists():
        views, labels = vision_pool(seed, VIEWS, kinds)
        np.save(out / "views.npy", views)
        np.save(out / "labels.npy", labels)
        in_parallel(vision_job, out, out / "stage0", vision_steps, seed)
    seconds["stage 0"], started = time.monotonic() - started, time.monotonic()
    if not (out / "model" / LOG).exists():
        in_parallel(language_job, out / "stage0", out / "model", kinds, steps, seed)
    seconds["stage 1"] = time.monotonic() - started
    facts = distil.distil(
        out / "model",
        out / "distil",
        out / "model" / "rpn",
        branch_layer=branch_layer,
        kinds=kinds,
        seed=seed,
    )
    facts["seconds"] = {k: round(v, 1) for k, v in seconds.items()} | facts["seconds"]
    write_json(out / "facts.json", facts)
    print(json.dumps(facts, indent=2))


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/trio"))
    parser.add_argument("--branch-layer", type=int, default=distil.BRANCH_LAYER)
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS)
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS)
    parser.add_argument("--kinds", nargs="+", default=list(sc.KINDS), choices=sc.MAKERS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(
        args.out,
        args.seed,
        branch_layer=args.branch_layer,
        vision_steps=args.vision_steps,
        steps=args.language_steps,
        kinds=tuple(args.kinds),
    )


if __name__ == "__main__":
    main()
