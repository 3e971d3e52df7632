"""Measure how cost scales with questions per image, batch, image size, answer and processes.

    python -m benchmarks.cost_growth --out docs/cost_growth.json

Writes the seconds and a plot (same name, .png). Random weights of --shape, preset fast, a given
region, as in throughput.py. Each sweep varies one parameter; the others are one question per image,
batch size 1, 640 x 480 pixels and 4 new tokens. The points of a sweep are interleaved within every
repeat. The slope is that of a straight line through the medians.

questions per image   seconds for all questions on one image, over their number
batch size            seconds for a batch with one question per image, over its size
image size            seconds per question, over megapixels
answer length         seconds per question, over new tokens
processes             seconds for the same questions in 1 or 2 single-threaded processes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.shapes import SHAPES, random_llava, random_rpn
from benchmarks.systems import forget_images, generation_of, middle_box, zooming_engine
from benchmarks.workload import Clock, describe_machine, questions
from sdrpn.engine import Question, ZoomModel

SIZE, CELLS, WORDS, NEW = (640, 480), 8, 60, 4
COUNTS = (1, 2, 4, 8, 16)
BATCHES = (1, 2, 4, 8, 16)
SIDES = (336, 672, 1344, 2688, 5376)
LENGTHS = (1, 4, 16, 64)
PROCESSES = (1, 2)
SHARED = 8
"""Number of questions of the sweep over processes."""

Point = tuple[float, Callable[[], None]]


class Sweeps:
    """An engine and the points of each sweep: (x, function to time)."""

    def __init__(self, shape: str) -> None:
        self.engine = _engine(shape)

    def _ask(
        self,
        counts: Sequence[int] = (1,),
        batch: int = 1,
        size: tuple[int, int] = SIZE,
        new: int = NEW,
    ) -> Callable[[], None]:
        asked = questions(self.engine.backbone, counts, WORDS, size)
        return lambda: _answer(self.engine, asked, batch, new)

    def points(self) -> dict[str, list[Point]]:
        """Return the sweeps that run in one process."""
        return {
            "questions per image": [(n, self._ask([n])) for n in COUNTS],
            "batch size": [(n, self._ask([1] * n, batch=n)) for n in BATCHES],
            "image size, megapixels": [
                (side * side / 1e6, self._ask(size=(side, side))) for side in SIDES
            ],
            "answer length, tokens": [(n, self._ask(new=n)) for n in LENGTHS],
        }


def _engine(shape: str) -> ZoomModel:
    llava = random_llava(shape)
    return zooming_engine(llava, random_rpn(llava), middle_box(llava.grid, CELLS), "fast")


def _answer(engine: ZoomModel, asked: Sequence[Question], batch: int, new: int) -> None:
    forget_images(engine)
    fresh = [replace(question) for question in asked]
    for start in range(0, len(fresh), batch):
        engine.ask_batch(fresh[start : start + batch], generation_of(new))


def sweep(points: Sequence[Point], repeats: int, progress: Any) -> list[dict[str, Any]]:
    """Time each point, interleaving repeats of all points; the first round is a warm-up."""
    clock = Clock(torch.device("cpu"))
    seconds: list[list[float]] = [[] for _ in points]
    for repeat in range(repeats + 1):
        for (_, run), own in zip(points, seconds, strict=True):
            started = clock.now()
            run()
            if repeat:
                own.append(clock.now() - started)
            progress.update()
    return [
        {"x": x, "seconds": median(own), "seconds_each": own}
        for (x, _), own in zip(points, seconds, strict=True)
    ]


def _share(shape: str, mine: int, repeats: int, barrier: Any, answer: Any) -> None:
    torch.set_num_threads(1)
    engine = _engine(shape)
    asked = questions(engine.backbone, [1] * mine, WORDS, SIZE)
    for repeat in range(repeats + 1):
        barrier.wait()
        started = time.perf_counter()
        _answer(engine, asked, 1, NEW)
        barrier.wait()  # a repeat takes as long as its slowest process
        if repeat:
            answer.put(time.perf_counter() - started)


def processes(shape: str, repeats: int, progress: Any) -> list[dict[str, Any]]:
    """Time the same questions in one and in two single-threaded processes."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for count in PROCESSES:
        barrier, answer = context.Barrier(count), context.SimpleQueue()
        share = (shape, SHARED // count, repeats, barrier, answer)
        ranks = [context.Process(target=_share, args=share) for _ in range(count)]
        for rank in ranks:
            rank.start()
        each = [answer.get() for _ in range(repeats * count)]
        for rank in ranks:
            rank.join()
        rows.append({"x": count, "seconds": median(each), "seconds_each": each})
        progress.update(repeats + 1)
    return rows


def slope(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Fit a straight line to the medians: (slope, intercept)."""
    line = np.polyfit([row["x"] for row in rows], [row["seconds"] for row in rows], 1)
    return [float(v) for v in line]


def said(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Describe the slope of a sweep."""
    if name == "processes":
        return f"2 processes: {rows[0]['seconds'] / rows[1]['seconds']:.2f} times as fast as 1"
    rise, start = slope(rows)
    unit = {"batch size": "question", "questions per image": "question"}.get(
        name, name.rpartition(" ")[2].removesuffix("s")
    )
    return f"{start:.2f} s + {rise:.3g} s a {unit}"


def figure(result: dict[str, Any]) -> Figure:
    """Plot one panel per sweep."""
    sweeps = result["sweeps"]
    drawn = Figure(figsize=(3.0 * len(sweeps), 3.1), layout="constrained", dpi=120)
    panels = drawn.subplots(1, len(sweeps))
    for panel, (name, rows) in zip(panels, sweeps.items(), strict=True):
        x = np.array([row["x"] for row in rows])
        for row in rows:
            each = row["seconds_each"]
            panel.plot([row["x"]] * len(each), each, ".", color="0.7", markersize=4)
        panel.plot(x, [row["seconds"] for row in rows], "o-", color="#0072b2", markersize=4)
        panel.set_title(said(name, rows), fontsize=9)
        panel.set_xlabel(name, fontsize=9)
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds", fontsize=9)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument(
        "--out", type=Path, required=True, help="JSON file; the plot is written next to it"
    )
    p.add_argument("--shape", choices=sorted(SHAPES), default="small")
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args(arguments)
    points = Sweeps(args.shape).points()
    total = (sum(map(len, points.values())) + len(PROCESSES)) * (args.repeats + 1)
    result: dict[str, Any] = {
        "machine": describe_machine(torch.device("cpu")),
        "shape": args.shape,
        "repeats": args.repeats,
        "sweeps": {},
    }
    with tqdm(total=total, unit="run") as progress:
        for name, own in points.items():
            progress.set_description(name)
            result["sweeps"][name] = sweep(own, args.repeats, progress)
        progress.set_description("processes")
        result["sweeps"]["processes"] = processes(args.shape, args.repeats, progress)
    result["slopes"] = {name: said(name, rows) for name, rows in result["sweeps"].items()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    figure(result).savefig(args.out.with_suffix(".png"))
    print("\n".join(f"{name}: {text}" for name, text in result["slopes"].items()))


if __name__ == "__main__":
    main()
