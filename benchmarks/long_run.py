"""Check on a long run that memory, prefix cache and rate stay constant.

    python -m benchmarks.long_run --out docs/long_run.json

Asks the embedded model 20,000 questions about 2,000 images through the plugin, as lmms-eval calls
it: all requests at once, grouped by image, with prefetched images and a record. The images are
drawn beforehand and stored as WebP in memory; requests are in random order, so that the plugin
groups them. Resident memory, the prefix cache and the rate are measured every 500 questions. Writes
the rows and a plot (same name, .png).

Slopes are those of straight lines through the rows after the first tenth of the run, when the cache
is full. The memory includes the answers, which lmms-eval needs all at once.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from lmms_eval.api.instance import Instance
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.memory import resident
from benchmarks.workload import describe_machine
from sdrpn.backbones.llava15 import Llava15
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.io.atomic import write_json
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.demo import embedded_model
from sdrpn_eval.model import LlavaSdrpn
from tools.tiny_vstar.scenes import COLOURS, make_scene, webp_bytes

TASK, SPLIT = "tiny_vstar", "test"
WORDINGS = ("what pattern is on the {colour} disc ?", "the {colour} disc ?")
QUALITY = 92
MIB = 1 << 20


class Watched(ZoomModel):
    """An engine that reports the number of answered questions after each batch."""

    tell: Callable[[int], None]

    def ask_batch(
        self, questions: Sequence[Question], generation: Mapping[str, Any] | None = None
    ) -> list[Answer]:
        answers = super().ask_batch(questions, generation)
        self.tell(len(answers))
        return answers


class Log:
    """Add a row after every `every` answered questions."""

    def __init__(self, engine: ZoomModel, every: int) -> None:
        self.engine, self.every = engine, every
        self.rows: list[dict[str, float]] = []
        self.answered = 0
        self.last = (0, time.perf_counter())

    def __call__(self, count: int) -> None:
        self.answered += count
        before, since = self.last
        if self.answered - before < self.every:
            return
        now = time.perf_counter()
        memory = resident()
        self.rows.append(
            {
                "questions": self.answered,
                "questions_per_second": round((self.answered - before) / (now - since), 2),
                "resident_bytes": memory["resident"],
                "anonymous_bytes": memory["anonymous"],
                "prefix_cache_bytes": self.engine.prefixes.nbytes,
                "prefixes": len(self.engine.prefixes),
            }
        )
        self.last = (self.answered, now)


def draw_documents(images: int, seed: int) -> Dataset:
    """Draw scenes; one row each."""
    rng = np.random.default_rng(seed)
    files = [
        webp_bytes(make_scene(rng).image, QUALITY) for _ in tqdm(range(images), "Drawing scenes")
    ]
    rows = [{"image": {"bytes": file, "path": None}} for file in files]
    return Dataset.from_list(rows, features=Features({"image": ImageColumn()}))


def requests(images: int, per_image: int, seed: int) -> list[Instance]:
    """Build lmms-eval's requests for several questions per image, in random order."""
    texts = [wording.format(colour=colour) for wording in WORDINGS for colour in COLOURS]
    if per_image > len(texts):
        raise ValueError(f"--per-image must be {len(texts)} or less, got {per_image}")
    settings = {"max_new_tokens": 8, "do_sample": False, "until": []}
    made = [
        Instance(
            request_type="generate_until",
            arguments=(text, settings, _picture, number, TASK, SPLIT),
            idx=0,
            metadata={"task": TASK, "doc_id": number, "repeats": 1},
        )
        for number in range(images)
        for text in texts[:per_image]
    ]
    random.Random(seed).shuffle(made)
    return made


def _picture(row: Mapping[str, Any]) -> list[Any]:
    return [row["image"].convert("RGB")]


def long_run(
    images: int, per_image: int, *, every: int, batch_size: int, cache: int, seed: int = 0
) -> list[dict[str, float]]:
    """Ask all questions; returns a row for every `every` of them."""
    folder, rpn = embedded_model()
    llava = Llava15.load(folder, dtype="float32", device="cpu")
    engine = Watched(llava, RPN.from_pretrained(rpn), prefix_cache=cache)
    documents, asked = draw_documents(images, seed), requests(images, per_image, seed)
    log = Log(engine, every)
    engine.tell = log
    with tempfile.TemporaryDirectory() as record:
        model = LlavaSdrpn(pretrained=engine, batch_size=batch_size, record=record)
        model.task_dict = {TASK: {SPLIT: documents}}
        answers = model.generate_until(asked)
    if len(answers) != len(asked):
        raise RuntimeError(f"{len(asked)} questions were asked, {len(answers)} answered")
    return log.rows


def slope(rows: Sequence[Mapping[str, float]], what: str) -> float:
    """Slope of a column per question, after the first tenth of the run."""
    last = rows[-1]["questions"]
    settled = [row for row in rows if row["questions"] > last / 10]
    if len(settled) < 2:
        raise ValueError("too few rows for a slope; ask more questions or note more often")
    x, y = ([row[name] for row in settled] for name in ("questions", what))
    return float(np.polyfit(x, y, 1)[0])


def findings(rows: Sequence[Mapping[str, float]], cache: int) -> dict[str, float]:
    """Summarise the rows: slopes, maximum size of the cache, rate."""
    rates = [row["questions_per_second"] for row in rows]
    return {
        "anonymous_bytes_a_question": round(slope(rows, "anonymous_bytes"), 1),
        "resident_bytes_a_question": round(slope(rows, "resident_bytes"), 1),
        "largest_prefix_cache_bytes": max(row["prefix_cache_bytes"] for row in rows),
        "prefix_cache_limit_bytes": cache,
        "questions_per_second": round(float(np.median(rates)), 2),
        "rate_change_over_the_run": round(
            slope(rows, "questions_per_second") * rows[-1]["questions"] / float(np.median(rates)), 4
        ),
    }


def figure(result: Mapping[str, Any]) -> Figure:
    """Plot memory, cache and rate over the number of answered questions."""
    rows, found = result["rows"], result["findings"]
    drawn = Figure(figsize=(10, 3), layout="constrained", dpi=120)
    panels = drawn.subplots(1, 3)
    x = [row["questions"] for row in rows]
    for kind, colour in (("resident", "#0072b2"), ("anonymous", "#d55e00")):
        label = f"{kind}: {found[f'{kind}_bytes_a_question']:+.0f} bytes a question"
        panels[0].plot(x, [row[f"{kind}_bytes"] / MIB for row in rows], color=colour, label=label)
    panels[0].set_title("memory, MiB", fontsize=9)
    panels[0].legend(fontsize=7, loc="lower right")
    panels[1].plot(x, [row["prefix_cache_bytes"] / MIB for row in rows], color="#0072b2")
    panels[1].axhline(found["prefix_cache_limit_bytes"] / MIB, color="0.5", ls="--")
    panels[1].set_title("prefix cache, MiB; dashed: its limit", fontsize=9)
    panels[2].plot(x, [row["questions_per_second"] for row in rows], color="#0072b2")
    change = 100 * found["rate_change_over_the_run"]
    panels[2].set_title(f"questions a second; {change:+.1f} % over the run", fontsize=9)
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.set_xlabel("questions", fontsize=9)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument(
        "--out", type=Path, required=True, help="JSON file; the plot is written next to it"
    )
    p.add_argument("--images", type=int, default=2000)
    p.add_argument("--per-image", type=int, default=10)
    p.add_argument("--every", type=int, default=500, help="questions between two rows")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--cache", type=int, default=64, help="MiB of the prefix cache")
    args = p.parse_args(arguments)
    cache = args.cache * MIB
    rows = long_run(
        args.images, args.per_image, every=args.every, batch_size=args.batch_size, cache=cache
    )
    result: dict[str, Any] = {
        "machine": describe_machine(torch.device("cpu")),
        "images": args.images,
        "questions": args.images * args.per_image,
        "batch_size": args.batch_size,
        "findings": findings(rows, cache),
        "rows": rows,
    }
    write_json(args.out, result)
    figure(result).savefig(args.out.with_suffix(".png"))
    for name, value in result["findings"].items():
        print(f"{name}: {value:,}")


if __name__ == "__main__":
    main()
