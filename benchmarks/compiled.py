"""Measure what torch.compile of the decoder layers gains, for stock and for sdrpn.

    python -m benchmarks.compiled --shape 7b --device cuda --dtype float16 --out compiled.json

Layers are compiled in place with dynamic shapes; sdrpn runs the same layers as stock. CUDA graphs
(mode="reduce-overhead") are not measured: they need a KV cache of a fixed size, and both systems'
caches grow. The seconds of compilation are those of the warm-up after it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.systems import System, all_systems, middle_box
from benchmarks.workload import Clock, describe_machine, load, questions
from sdrpn.engine import Question
from sdrpn.io.atomic import write_json

NEW_TOKENS, QUESTION_TOKENS, CELLS = 4, 60, 8
IMAGE_SIZE = (640, 480)
MEASURED = ("stock", "sdrpn-fast")


def seconds_of(system: System, asked: Sequence[Question], clock: Clock, repeats: int) -> float:
    """Median seconds per question, one question at a time, each on an empty cache."""
    found = []
    for _ in range(repeats):
        started = clock.now()
        for question in asked:
            system.run([question])
        found.append((clock.now() - started) / len(asked))
        system.cool()
    return median(found)


def measure(
    shape: str, layers: int | None, device: str, dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """Return a row per system: seconds per question before and after compilation."""
    llava, rpn = load(shape, layers=layers, device=device, dtype=dtype)
    box = middle_box(llava.grid, CELLS)
    every = all_systems(llava, rpn, box, NEW_TOKENS, vicrop_batched=False)
    systems = [system for system in every if system.label in MEASURED]
    asked = questions(llava, [1] * 4, QUESTION_TOKENS, IMAGE_SIZE)
    clock = Clock(llava.device)

    def everywhere(count: int) -> list[float]:
        return [seconds_of(system, asked, clock, count) for system in systems]

    everywhere(1)
    plain = everywhere(repeats)
    for _, layer in llava.layers:
        layer.compile(dynamic=True)
    started = time.perf_counter()
    everywhere(2)
    warm = time.perf_counter() - started
    compiled = everywhere(repeats)
    return [
        {
            "system": system.label,
            "seconds": before,
            "compiled": after,
            "ratio": before / after,
            "seconds_of_compilation": warm,
        }
        for system, before, after in zip(systems, plain, compiled, strict=True)
    ]


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--shape", default="small", help="random weights: small, 7b, 13b")
    p.add_argument("--layers", type=int, help="cut the shape to so many decoder layers")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="auto", help="auto: float32 on a CPU, else float16")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=Path, help="JSON file to write")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    args = parser().parse_args(arguments)
    rows = measure(args.shape, args.layers, args.device, args.dtype, args.repeats)
    for row in rows:
        print(row)
    if args.out is not None:
        machine = describe_machine(torch.device(args.device))
        write_json(args.out, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
