"""Time a question of both embedded models' benchmarks, without and with the second look.

    python -m benchmarks.editions --out docs/editions.json

The first --questions of each shipped benchmark, with the settings of its task, in batches of 16 and
with an empty prefix cache; the two runs of an edition take turns within every repeat. Writes the
medians, and what a question costs in image and crop tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from datasets import load_dataset
from tqdm import tqdm

from benchmarks.measuring import Job, measure
from benchmarks.systems import engine_system
from benchmarks.workload import Clock
from sdrpn.engine import Question, ZoomModel
from sdrpn.io.atomic import as_json, write_json
from sdrpn_eval.demo import BENCHMARK, TRIO_BENCHMARK, embedded_model, embedded_trio

EDITIONS: dict[str, tuple[Callable[[], tuple[str, str]], Path]] = {
    "tiny": (embedded_model, BENCHMARK),
    "tiny-trio": (embedded_trio, TRIO_BENCHMARK),
}
BATCH, GENERATION = 16, {"max_new_tokens": 8}


def asked(benchmark: Path, count: int) -> list[Question]:
    """The first questions of a benchmark."""
    rows = load_dataset("parquet", data_files=str(benchmark), split=f"train[:{count}]")
    return [Question(row["question"], (row["image"].convert("RGB"),)) for row in rows]


def ways_of(name: str, count: int, repeats: int, progress: Any) -> dict[str, dict[str, float]]:
    """Seconds, image tokens and crop tokens per question of an edition, stock and RPN."""
    embedded, benchmark = EDITIONS[name]
    zooming = ZoomModel.from_pretrained(*embedded(), dtype="float32")
    questions = asked(benchmark, count)
    image_tokens = zooming.ask(questions[0].images[0], questions[0].text).image_tokens
    engines = {"stock": ZoomModel(zooming.backbone, proposer="none"), "rpn": zooming}
    jobs = [Job(engine_system(e, way, None, GENERATION), BATCH) for way, e in engines.items()]
    clock = Clock(zooming.backbone.device)
    return {
        found.job.system.name: {
            "seconds": round(median(found.seconds), 5),
            "image_tokens": image_tokens,
            "crop_tokens": round(found.crop_tokens, 1),
        }
        for found in measure(jobs, questions, clock, repeats, progress)
    }


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tqdm(total=len(EDITIONS) * 2 * (args.repeats + 1)) as progress:
        editions = {
            name: ways_of(name, args.questions, args.repeats, progress) for name in EDITIONS
        }
    result = {"questions": args.questions, "repeats": args.repeats, "editions": editions}
    print(as_json(result, indent=2))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
