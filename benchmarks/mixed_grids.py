"""Time a batch of Qwen2.5-VL's images with different grids against the same images one by one.

    python -m benchmarks.mixed_grids --repeats 2

sdrpn with a first look and a crop of about 576 tokens and one question per image, on random
weights; both ways alternate. Prints JSON; `speed_up` is the seconds of one by one over those of
the batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import Job
from benchmarks.shapes import images
from benchmarks.shapes_qwen import QWEN_SHAPES, load_qwen
from benchmarks.systems import engine_system, force_region, generation_of, middle_box
from benchmarks.workload import Clock, describe_machine, describe_shape, questions
from sdrpn.backbones.loading import pick_dtype
from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.engine import Question, ZoomModel
from sdrpn.rpn.checkpoint import RPN

SIZES = [(640, 480), (480, 640), (640, 640), (640, 360), (360, 640), (800, 400), (400, 800)]
SIZES += [(720, 480)]
"""Pixels of the images: eight shapes, eight grids."""

CELLS = 8


def asked_of(qwen: Qwen25VL, tokens: int, sizes: Sequence[tuple[int, int]]) -> list[Question]:
    """Build a question on an image of each size."""
    asked = questions(qwen, [1] * len(sizes), tokens, sizes[0])
    drawn = [images(1, *size, seed)[0] for seed, size in enumerate(sizes)]
    return [replace(q, images=(image,)) for q, image in zip(asked, drawn, strict=True)]


def measure(
    qwen: Qwen25VL, rpn: RPN, asked: Sequence[Question], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Time both ways in turn, after one round of warm-up."""
    grids = [qwen.image_grid(q.images[0]) for q in asked]
    least = min(min(grid.rows, grid.columns) for grid in grids)
    # One box for all grids, so that every image has a crop of the same shape in cells.
    engine = force_region(ZoomModel(qwen, rpn), middle_box(least, min(CELLS, least)))
    system = engine_system(engine, "sdrpn", "paper", generation_of(new_tokens))
    jobs = {"batch": Job(system, len(asked)), "one_by_one": Job(system, 1)}
    clock, seconds = Clock(qwen.device), {name: [] for name in jobs}
    for repeat in tqdm(range(repeats + 1), unit="round"):
        for name, job in jobs.items():
            started = clock.now()
            said = job.run(asked)
            assert all(one.crop_tokens for one in said)
            if repeat:
                seconds[name].append(clock.now() - started)
    pairs = [a / b for a, b in zip(seconds["one_by_one"], seconds["batch"], strict=True)]
    return {
        "grids": [[grid.rows, grid.columns] for grid in grids],
        "batch_size": len(asked),
        "seconds": seconds,
        "speed_up": median(seconds["one_by_one"]) / median(seconds["batch"]),
        "spread": [min(pairs), max(pairs)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--shape", choices=sorted(QWEN_SHAPES), default="small")
    p.add_argument("--layers", type=int, help="cut the shape to so many decoder layers")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="auto", help="auto: float32 on a CPU, else bfloat16")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--question-tokens", type=int, default=60)
    p.add_argument("--new-tokens", type=int, default=4)
    args = p.parse_args(arguments)
    dtype = pick_dtype(args.dtype, torch.device(args.device), torch.bfloat16)
    qwen, rpn = load_qwen(args.shape, layers=args.layers, device=args.device, dtype=dtype)
    asked = asked_of(qwen, args.question_tokens, SIZES)
    found = measure(qwen, rpn, asked, args.new_tokens, args.repeats)
    tokens = qwen.image_grid(asked[0].images[0]).cells
    facts = {
        "machine": describe_machine(qwen.device),
        "shape": describe_shape(qwen, rpn, tokens),
    }
    print(json.dumps(facts | found, indent=1))


if __name__ == "__main__":
    main()
