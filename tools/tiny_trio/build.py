"""Make the second edition anew: `python -m tools.tiny_trio.build --out out/trio`.

Seeded, in this order: stage 0 (tower), stage 1 (language model), stages 2 and 3 (labels and RPN,
with the public commands). A stage whose result is complete is skipped, so that an interrupted build
goes on with the next one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sdrpn.io.atomic import as_json, write_json
from tools.tiny_trio import distil, language, vision
from tools.tiny_trio import scenes as sc
from tools.tiny_trio.language import HELD_OUT_POOL, LANGUAGE_POOL
from tools.tiny_trio.model import build_model, build_processor
from tools.tiny_trio.patches import vision_pool
from tools.tiny_trio.workers import in_parallel, rank, world

EASY_STEPS = 400
"""Steps that ask only what the view shows."""
LOG, VIEWS, LABELS = "log.json", "views.npy", "labels.npy"


@dataclass(frozen=True)
class Sizes:
    """How much of everything: views, scenes, and steps of the rounds of stages 0 and 1."""

    views: int = 12000
    vision_steps: tuple[int, ...] = (1200, 1500, 1200)
    vision_batch: int = 64
    scenes: tuple[int, ...] = (6000, 4500)
    held_out: int = 90
    language_steps: tuple[int, ...] = (2000, 1000)
    language_batch: int = 16


def stage0(out: Path, round_: int) -> Path:
    """Folder of the model after a round of stage 0."""
    return out / f"stage0-{round_ + 1}"


def vision_job(out: Path, round_: int, sizes: Sizes, seed: int) -> None:
    """A round of stage 0 in one of the training processes; it goes on from the last one.

    The third trains the tower alone, so that a language model trained on the second fits it.
    """
    torch.manual_seed(seed)
    views = np.load(out / VIEWS, mmap_mode="r")
    labels = np.load(out / LABELS)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    if round_:
        model = LlavaForConditionalGeneration.from_pretrained(
            stage0(out, round_ - 1), dtype=torch.float32
        )
    log = vision.train_vision(
        model,
        processor,
        views,
        labels,
        steps=sizes.vision_steps[round_],
        batch_size=sizes.vision_batch,
        projector=round_ < 2,
        seed=seed,
    )
    if rank() == 0:
        save(model, processor, stage0(out, round_), log)


def language_job(start: Path, tower: Path, out: Path, round_: int, sizes: Sizes, seed: int) -> None:
    """A round of stage 1 in one of the training processes; each draws scenes of its own.

    The first teaches to name all of what is asked about and then to answer; the second to name the
    last word of it only, which is then what the end of a prompt holds and the RPN can go by, and to
    read from loose zooms.
    """
    model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    source = LlavaForConditionalGeneration.from_pretrained(tower, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(source.model.vision_tower.state_dict())
    processor = build_processor()
    first = round_ == 0
    kinds = sc.FIRST_KINDS if first else sc.KINDS
    samples = language.draw_samples(
        model,
        processor,
        (seed, LANGUAGE_POOL, rank(), *((round_,) if round_ else ())),
        sizes.scenes[round_] // world(),
        kinds=kinds,
        loose=not first,
    )
    held_out = language.draw_samples(
        model,
        processor,
        (seed, HELD_OUT_POOL),
        sizes.held_out,
        oracle=True,
        fine_share=0.5,
        kinds=kinds,
    )
    if first:
        language.scale_projector(model)
    log = language.train_language(
        model,
        language.Turns(processor, long=first),
        samples,
        held_out,
        steps=sizes.language_steps[round_],
        batch_size=sizes.language_batch,
        easy_steps=EASY_STEPS if first else 0,
        seed=seed,
    )
    if rank() == 0:
        save(model.half(), processor, out, log)


def save(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    out: Path,
    log: list[dict[str, float]],
) -> None:
    """Write model, processor and, last, the log: where it is, the stage is complete."""
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_json(out / LOG, {"log": log})


def train(out: Path, seed: int, sizes: Sizes) -> dict[str, float]:
    """Stages 0 and 1: out/stage0-*, out/stage1-* and out/model; returns the seconds of each."""
    out.mkdir(parents=True, exist_ok=True)
    seconds, started = {}, time.monotonic()
    for round_ in range(3):
        if not (stage0(out, round_) / LOG).exists():
            views, labels = vision_pool(seed, sizes.views, sc.FIRST_KINDS, round_)
            np.save(out / VIEWS, views)
            np.save(out / LABELS, labels)
            in_parallel(vision_job, out, round_, sizes, seed)
    seconds["stage 0"], started = time.monotonic() - started, time.monotonic()
    first, last = out / "stage1-1", out / "model"
    for round_, (start, end) in enumerate(((stage0(out, 1), first), (first, last))):
        if not (end / LOG).exists():
            in_parallel(language_job, start, stage0(out, 1 + round_), end, round_, sizes, seed)
    seconds["stage 1"] = time.monotonic() - started
    return seconds


def main() -> None:
    """Read the command line and build; leaves out/model with its RPN and out/facts.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/trio"))
    parser.add_argument("--branch-layer", type=int, default=distil.BRANCH_LAYER)
    parser.add_argument("--vision-steps", type=int, nargs=3, default=Sizes.vision_steps)
    parser.add_argument("--language-steps", type=int, nargs=2, default=Sizes.language_steps)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = Sizes(vision_steps=tuple(args.vision_steps), language_steps=tuple(args.language_steps))
    seconds = train(args.out, args.seed, sizes)
    facts = distil.distil(
        args.out / "model",
        args.out / "distil",
        args.out / "model" / "rpn",
        branch_layer=args.branch_layer,
        seed=args.seed,
    )
    facts["seconds"] = {k: round(v, 1) for k, v in seconds.items()} | facts["seconds"]
    write_json(args.out / "facts.json", facts)
    print(as_json(facts, indent=2))


if __name__ == "__main__":
    main()
