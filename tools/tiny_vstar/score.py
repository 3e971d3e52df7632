"""The table of proposers on tiny_vstar: `python -m tools.tiny_vstar.score --out FILE.json`.

Stock, the second look by every proposer, a sweep of the threshold, random boxes below and the true
boxes as the ceiling, all on the shipped questions, by fine and coarse, with 95 % intervals
clustered by image, and paired differences to stock and to `attention` at its best threshold.

`--scenes-seed N` scores all proposers, at the published range of thresholds, on scenes drawn now
from the seed N, which no setting was chosen on; several seeds are pooled and listed one by one.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sdrpn import RPN, Answer, Question, ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import PixelBox
from sdrpn.config import PEAK
from sdrpn.io.atomic import write_json
from sdrpn_eval.demo import BENCHMARK, tiny_path
from sdrpn_eval.results.stats import (
    Estimate,
    clustered,
    clustered_difference,
    rounded,
    with_interval,
)
from tools.tiny_vstar import make_benchmark
from tools.tiny_vstar.scenes import CELL, GRID, oracle_box

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, PEAK)
PUBLISHED = (0.05, 0.1, 0.15, 0.2, PEAK)
"""The range of the published thresholds, and the one rule for all benchmarks."""
POLICIES = ("strongest", "mask", "bbox")
BATCH = 64
GENERATION = {"max_new_tokens": 8}


def random_box(rng: np.random.Generator) -> PixelBox:
    """Any 3 x 3 cells."""
    column, row = (int(v) * CELL for v in rng.integers(0, GRID - 2, 2))
    return PixelBox(column, row, column + 3 * CELL, row + 3 * CELL)


def fresh_rows(seeds: Sequence[int], images: int = make_benchmark.IMAGES) -> list[dict[str, Any]]:
    """Questions on `images` new scenes per seed, with their pictures decoded."""
    rows = make_benchmark.fresh_rows(seeds, images)
    return [row | {"image": Image.open(io.BytesIO(row["image"]["bytes"]))} for row in rows]


def is_right(text: str, row: Mapping[str, Any]) -> bool:
    """Exact match of the pattern's word, with or without the colour before it."""
    return text.split() in ([row["answer"]], [row["colour"], row["answer"]])


def ask_all(engine: ZoomModel, questions: Sequence[Question], title: str) -> list[Answer]:
    """Answers to all questions, in batches, with a progress bar."""
    answers: list[Answer] = []
    for start in tqdm(range(0, len(questions), BATCH), title, leave=False):
        answers += engine.ask_batch(questions[start : start + BATCH], GENERATION)
    return answers


class Scorer:
    """Asks one model every question of the benchmark, one proposer after another."""

    def __init__(self, model: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows
        self.backbone = Llava15.load(str(model), dtype="float32")
        self.rpn = RPN.from_pretrained(str(model / "rpn"))
        self.zoom = self.rpn.config.zoom
        self.images = [row["image"].convert("RGB") for row in rows]
        self.results: list[dict[str, Any]] = []
        self.correct: dict[str, np.ndarray] = {}

    def run(
        self,
        name: str,
        proposer: str = "none",
        threshold: float | str | None = None,
        policy: str | None = None,
        boxes: Sequence[PixelBox] | None = None,
    ) -> None:
        """Answer all questions one way and keep the scores under `name`."""
        zoom = replace(
            self.zoom,
            threshold=threshold or self.zoom.threshold,
            policy=policy or self.zoom.policy,
        )
        engine = ZoomModel(self.backbone, self.rpn, proposer=proposer, zoom=zoom)
        questions = [
            Question(row["question"], (image,), boxes[i] if boxes else None)
            for i, (row, image) in enumerate(zip(self.rows, self.images, strict=True))
        ]
        started = time.perf_counter()
        answers = ask_all(engine, questions, name)
        seconds = time.perf_counter() - started
        right = [is_right(a.text, row) for a, row in zip(answers, self.rows, strict=True)]
        self.correct[name] = np.array(right, dtype=float)
        self.results.append(
            {
                "name": name,
                "proposer": proposer if boxes is None else "box",
                "threshold": threshold,
                "policy": policy or self.zoom.policy,
                **{group: self.estimate(self.correct[name], group) for group in GROUPS},
                "zoomed": round(sum(bool(a.regions) for a in answers) / len(answers), 4),
                "seconds_per_question": round(seconds / len(answers), 4),
            }
        )

    def estimate(
        self, values: np.ndarray, group: str, how: Callable[..., Estimate] = clustered
    ) -> list[float | None]:
        """[mean, low, high] of one group of questions."""
        chosen = [i for i, r in enumerate(self.rows) if group in ("all", r["category"])]
        images = [self.rows[i]["image_id"] for i in chosen]
        return rounded(how([float(values[i]) for i in chosen], images))

    def difference(self, name: str, other: str) -> dict[str, list[float | None]]:
        """Paired difference of two runs, by group."""
        delta = self.correct[name] - self.correct[other]
        return {group: self.estimate(delta, group, clustered_difference) for group in GROUPS}


GROUPS = ("all", "fine", "coarse")


def benchmark_questions(benchmark: Path) -> list[dict[str, Any]]:
    """The questions of a benchmark file."""
    rows: Any = load_dataset("parquet", data_files=str(benchmark), split="train")
    return list(rows)


def score(
    model: Path,
    rows: Sequence[Mapping[str, Any]],
    thresholds: Sequence[float | str] = THRESHOLDS,
    policies: Sequence[str] = POLICIES[1:],
) -> dict[str, Any]:
    """Every row of the table, and the paired differences that the claim rests on."""
    scorer = Scorer(model, rows)
    rng = np.random.default_rng(0)
    scorer.run("stock")
    scorer.run("random 3 x 3 cells", boxes=[random_box(rng) for _ in rows])
    middles = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in (row["box"] for row in rows)]
    scorer.run("oracle box, 168 px", boxes=[PixelBox(*oracle_box(middle)) for middle in middles])
    scorer.run("vicrop", "vicrop")
    for proposer in ("rpn", "attention"):
        for threshold in thresholds:
            scorer.run(f"{proposer}, t = {threshold}", proposer, threshold)
    default = scorer.zoom.threshold
    for policy in policies:
        scorer.run(f"rpn, t = {default}, {policy}", "rpn", default, policy)
    return summary(scorer, f"rpn, t = {default}")


def best_attention(correct: Mapping[str, np.ndarray]) -> str:
    """The name of `attention` at the threshold that is best on these very questions."""
    names = [name for name in correct if name.startswith("attention, t = ")]
    return max(names, key=lambda name: correct[name].mean())


def summary(scorer: Scorer, rpn: str) -> dict[str, Any]:
    """What a result file holds; `rpn` names the row with the RPN's own settings."""
    rows, best = scorer.rows, best_attention(scorer.correct)
    return {
        "questions": len(rows),
        "images": len({row["image_id"] for row in rows}),
        "fine_share": round(float(np.mean([row["category"] == "fine" for row in rows])), 4),
        "rows": scorer.results,
        "rpn": rpn,
        "attention_best": best,
        "rpn_minus_stock": scorer.difference(rpn, "stock"),
        "rpn_minus_attention_best": scorer.difference(rpn, best),
        "oracle_minus_rpn": scorer.difference("oracle box, 168 px", rpn),
        "correct": {
            name: "".join(str(int(v)) for v in scorer.correct[name]) for name in ("stock", rpn)
        },
        "spread_over_thresholds": {
            proposer: round(float(np.ptp(_means(scorer.correct, f"{proposer}, t = "))), 4)
            for proposer in ("rpn", "attention")
        },
        "by_seed": by_seed(scorer, rpn),
    }


def _means(correct: Mapping[str, np.ndarray], start: str) -> list[float]:
    """Mean scores of the rows whose names are `start` and a number, without a policy."""
    names = [n for n in correct if n.startswith(start) and n.count(",") == 1 and PEAK not in n]
    return [float(correct[name].mean()) for name in names]


def by_seed(scorer: Scorer, rpn: str) -> list[dict[str, Any]]:
    """The claim on each seed of fresh scenes alone, `attention` at that seed's best threshold."""
    found = []
    for seed in sorted({row["seed"] for row in scorer.rows if "seed" in row}):
        chosen = [i for i, row in enumerate(scorer.rows) if row["seed"] == seed]
        images = [scorer.rows[i]["image_id"] for i in chosen]
        correct = {name: values[chosen] for name, values in scorer.correct.items()}
        best = best_attention(correct)
        gains = {
            name: rounded(
                clustered_difference([*map(float, correct[rpn] - correct[other])], images)
            )
            for name, other in (("rpn_minus_stock", "stock"), ("rpn_minus_attention_best", best))
        }
        means = {
            name: rounded(clustered([*map(float, correct[key])], images))
            for name, key in (("stock", "stock"), ("rpn", rpn), ("attention", best))
        }
        found.append(
            {"seed": seed, "questions": len(chosen), "attention_best": best} | means | gains
        )
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The table of all rows in percent, with 95 % intervals by image."""
    lines = ["| proposer | all | fine | coarse | zoomed |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        cells = (with_interval(row[group], 100, ".1f") for group in GROUPS)
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {100 * row['zoomed']:.0f} % |")
    return "\n".join(lines)


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    title = f"tiny_vstar: {result['questions']} questions, {result['images']} images"
    table = Table(title=title)
    for column in ("", *GROUPS, "zoomed"):
        table.add_column(column)
    for row in result["rows"]:
        cells = [with_interval(row[g], 1, ".3f") for g in GROUPS]
        table.add_row(row["name"], *cells, f"{row['zoomed']:.2f}")
    console = Console(width=130)
    console.print(table)
    for name in ("rpn_minus_stock", "rpn_minus_attention_best", "oracle_minus_rpn"):
        console.print(name, result[name])
    console.print("spread over thresholds", result["spread_over_thresholds"])
    for row in result["by_seed"]:
        console.print(row)


def main() -> None:
    """Read the command line, score, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a tiny model; default: the shipped")
    parser.add_argument("--benchmark", type=Path, default=BENCHMARK, help="parquet file")
    parser.add_argument(
        "--scenes-seed", type=int, nargs="+", help="seeds of new scenes, instead of --benchmark"
    )
    parser.add_argument(
        "--scenes", type=int, default=make_benchmark.IMAGES, help="new scenes per seed"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    model = args.model or tiny_path()
    if args.scenes_seed:
        result = score(model, fresh_rows(args.scenes_seed, args.scenes), PUBLISHED, ())
    else:
        result = score(model, benchmark_questions(args.benchmark))
    show(result)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
