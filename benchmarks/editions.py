"""Time a question of both embedded models' benchmarks, without and with the second look.

    python -m benchmarks.editions --out docs/editions.json

The first --questions of each shipped benchmark, with the settings of its task, in batches of 16 and
with an empty prefix cache; the four runs take turns within every repeat. Writes the medians, and
what a question costs in image and crop tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from datasets import load_dataset
from tqdm import tqdm

from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.io.atomic import as_json, write_json
from sdrpn_eval.demo import BENCHMARK, TRIO_BENCHMARK, embedded_model, embedded_trio

EDITIONS: dict[str, tuple[Callable[[], tuple[str, str]], Path]] = {
    "tiny": (embedded_model, BENCHMARK),
    "tiny-trio": (embedded_trio, TRIO_BENCHMARK),
}
BATCH, NEW_TOKENS = 16, 8


def asked(benchmark: Path, count: int) -> list[Question]:
    """The first questions of a benchmark."""
    rows = load_dataset("parquet", data_files=str(benchmark), split=f"train[:{count}]")
    return [Question(row["question"], (row["image"].convert("RGB"),)) for row in rows]


def run(engine: ZoomModel, questions: Sequence[Question]) -> list[Answer]:
    """Answer all of them with an empty prefix cache."""
    engine.prefixes.clear()
    answers: list[Answer] = []
    for start in range(0, len(questions), BATCH):
        some = [Question(one.text, one.images) for one in questions[start : start + BATCH]]
        answers += engine.ask_batch(some, {"max_new_tokens": NEW_TOKENS})
    return answers


def measure(count: int, repeats: int) -> dict[str, Any]:
    """Seconds, image tokens and crop tokens per question, by edition and way."""
    jobs: dict[tuple[str, str], tuple[ZoomModel, list[Question]]] = {}
    for name, (embedded, benchmark) in EDITIONS.items():
        zooming = ZoomModel.from_pretrained(*embedded(), dtype="float32")
        questions = asked(benchmark, count)
        jobs[name, "stock"] = ZoomModel(zooming.backbone, proposer="none"), questions
        jobs[name, "rpn"] = zooming, questions
    answers = {key: run(*job) for key, job in jobs.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for _ in tqdm(range(repeats), "repeats"):
        for key, job in jobs.items():
            started = time.perf_counter()
            run(*job)
            seconds[key].append((time.perf_counter() - started) / count)
    return {
        "questions": count,
        "repeats": repeats,
        "editions": {
            name: {
                way: {
                    "seconds": round(median(seconds[name, way]), 5),
                    "image_tokens": round(fmean(a.image_tokens for a in answers[name, way]), 1),
                    "crop_tokens": round(fmean(a.crop_tokens for a in answers[name, way]), 1),
                }
                for way in ("stock", "rpn")
            }
            for name in EDITIONS
        },
    }


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    result = measure(args.questions, args.repeats)
    print(as_json(result, indent=2))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
