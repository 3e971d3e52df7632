"""All proposers on scenes drawn from a seed: `python -m tools.tiny_trio.score --scenes-seed N`.

Published zoom settings throughout: policy `mask`, absolute thresholds, at least two cells, at most
225 / 576 of the grid, the crop's whole grid of tokens. `--tuning` draws scenes that settings may be
chosen on instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sdrpn import RPN, Question, ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.io.atomic import write_json
from sdrpn_eval.demo import HERE
from sdrpn_eval.results.stats import (
    Estimate,
    clustered,
    clustered_difference,
    rounded,
    with_interval,
)
from tools.tiny_trio import benchmark
from tools.tiny_trio import scenes as sc

THRESHOLDS = (0.05, 0.1, 0.15, 0.2)
PUBLISHED = 0.15
GENERATION = {"max_new_tokens": 5}
BATCH = 16


def is_right(text: str, name: str, answer: str) -> bool:
    """Exact match of the answer, with or without the name of the asked thing before it."""
    return text.split() in ([answer], [*name.split(), answer])


def groups_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Indices of the questions of every group: all, all fine and coarse, and each kind's."""
    found: dict[str, list[int]] = {"all": [*range(len(rows))]}
    for i, row in enumerate(rows):
        for name in (row["category"], row["group"], f"{row['group']} {row['category']}"):
            found.setdefault(name, []).append(i)
    return found


class Scorer:
    """Asks one model all questions, one way after another."""

    def __init__(self, model: Path, rpn: Path | None, rows: list[dict[str, Any]]) -> None:
        self.rows, self.groups = rows, groups_of(rows)
        self.backbone = Llava15.load(str(model), dtype="float32")
        self.rpn = RPN.from_pretrained(str(rpn)) if rpn else None
        self.correct: dict[str, np.ndarray] = {}
        self.facts: dict[str, dict[str, float]] = {}

    def run(
        self,
        name: str,
        proposer: str = "none",
        zoom: ZoomConfig | None = None,
        boxes: Sequence[PixelBox] | None = None,
    ) -> None:
        """Answer all questions one way and keep the scores under `name`."""
        engine = ZoomModel(self.backbone, self.rpn, proposer=proposer, zoom=zoom or ZoomConfig())
        started, right, zoomed = time.perf_counter(), [], 0
        for start in tqdm(range(0, len(self.rows), BATCH), name, leave=False, mininterval=5):
            some = self.rows[start : start + BATCH]
            asked = [
                Question(r["question"], (r["image"],), boxes[start + i] if boxes else None)
                for i, r in enumerate(some)
            ]
            for answer, row in zip(engine.ask_batch(asked, GENERATION), some, strict=True):
                right.append(float(is_right(answer.text, row["name"], row["answer"])))
                zoomed += bool(answer.regions)
        self.correct[name] = np.array(right)
        seconds = (time.perf_counter() - started) / len(right)
        self.facts[name] = {"zoomed": zoomed / len(right), "seconds_per_question": seconds}
        fine = self.correct[name][self.groups["fine"]].mean()
        tqdm.write(f"{name}: {np.mean(right):.3f}, fine {fine:.3f}, {self.facts[name]}")

    def by_group(
        self, values: np.ndarray, how: Callable[..., Estimate] = clustered
    ) -> dict[str, list[float | None]]:
        """[mean, low, high] of every group, clustered by image."""
        return {
            name: rounded(
                how([float(values[i]) for i in some], [self.rows[i]["image_id"] for i in some])
            )
            for name, some in self.groups.items()
        }

    def difference(self, name: str, other: str) -> dict[str, list[float | None]]:
        """Paired difference of two runs, by group."""
        return self.by_group(self.correct[name] - self.correct[other], clustered_difference)


def score(
    model: Path,
    rpn: Path | None,
    rows: list[dict[str, Any]],
    *,
    proposers: Sequence[str] = ("rpn", "attention"),
    thresholds: Sequence[float] = THRESHOLDS,
    vicrop: bool = True,
) -> dict[str, Any]:
    """Every proposer on the rows, with the paired differences that the claims are about."""
    scorer = Scorer(model, rpn, rows)
    rng = np.random.default_rng(0)
    scorer.run("stock")
    corners = rng.integers(0, sc.GRID - 3, (len(rows), 2)) * sc.CELL
    random = [
        PixelBox(int(x), int(y), int(x) + 4 * sc.CELL, int(y) + 4 * sc.CELL) for x, y in corners
    ]
    scorer.run("random 4 x 4 cells", boxes=random)
    scorer.run("oracle", boxes=[sc.oracle_box(row["box"]) for row in rows])
    if rpn and vicrop:
        scorer.run("vicrop", "vicrop")
    for proposer in proposers if rpn else ():
        for threshold in thresholds:
            zoom = ZoomConfig(threshold=threshold)
            scorer.run(f"{proposer}, t = {threshold}", proposer, zoom)
    return summary(scorer, f"rpn, t = {PUBLISHED}")


def summary(scorer: Scorer, rpn: str) -> dict[str, Any]:
    """What a result file holds."""
    correct = scorer.correct
    result: dict[str, Any] = {
        "questions": len(scorer.rows),
        "images": len({row["image_id"] for row in scorer.rows}),
        "counts": {name: len(some) for name, some in scorer.groups.items()},
        "right": {
            name: "".join(str(int(v)) for v in correct[name])
            for name in ("stock", rpn)
            if name in correct
        },
        "rows": {name: scorer.by_group(v) | scorer.facts[name] for name, v in correct.items()},
    }
    teachers = [name for name in correct if name.startswith("attention")]
    if rpn in correct:
        others = {"stock": "stock", "vicrop": "vicrop", "oracle": "oracle"}
        if teachers:
            best = max(teachers, key=lambda name: correct[name].mean())
            result["attention_best"] = best
            others["attention_best"] = best
        result["differences"] = {
            f"rpn - {key}": scorer.difference(rpn, other)
            for key, other in others.items()
            if other in correct
        }
        means = {name: v.mean() for name, v in correct.items() if name.startswith("rpn")}
        ends = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        result["rpn_spread_over_thresholds"] = scorer.difference(*ends)["all"]
        result["by_seed"] = _by_seed(scorer, rpn, teachers)
    return result


def _by_seed(scorer: Scorer, rpn: str, teachers: Sequence[str]) -> list[dict[str, Any]]:
    """Each seed alone, `attention` at that seed's own best threshold."""
    found = []
    for seed in sorted({row["seed"] for row in scorer.rows}):
        chosen = [i for i, row in enumerate(scorer.rows) if row["seed"] == seed]
        images = [scorer.rows[i]["image_id"] for i in chosen]
        correct = {name: values[chosen] for name, values in scorer.correct.items()}
        others = [name for name in ("stock", "vicrop") if name in correct]
        if teachers:
            others.append(max(teachers, key=lambda name: correct[name].mean()))
        row: dict[str, Any] = {"seed": seed, "questions": len(chosen)}
        row["rpn"] = rounded(clustered([*map(float, correct[rpn])], images))
        for name in others:
            delta = [*map(float, correct[rpn] - correct[name])]
            row[f"rpn - {name}"] = rounded(clustered_difference(delta, images))
        found.append(row)
    return found


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    groups = [*result["counts"]]
    table = Table(title=f"{result['questions']} questions, {result['images']} images")
    for column in ("", *groups):
        table.add_column(column)
    for name, row in result["rows"].items():
        table.add_row(name, *(f"{100 * row[group][0]:.1f}" for group in groups))
    console = Console(width=180)
    console.print(table)
    for name, row in result.get("differences", {}).items():
        console.print(
            name, {g: with_interval(row[g], 100, "+.1f") for g in ("all", "fine", "coarse")}
        )
    for row in result.get("by_seed", []):
        console.print(row)
    if spread := result.get("rpn_spread_over_thresholds"):
        console.print("spread", with_interval(spread, 100, ".1f"))


def main() -> None:
    """Read the command line, score, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "trio", help="default: what ships")
    parser.add_argument("--rpn", type=Path, help="default: MODEL/rpn, where it is")
    parser.add_argument("--scenes-seed", type=int, nargs="+", required=True)
    parser.add_argument("--scenes", type=int, default=benchmark.SCENES, help="of a kind and seed")
    parser.add_argument("--kinds", nargs="+", default=list(sc.KINDS), choices=sc.MAKERS)
    parser.add_argument("--tuning", action="store_true")
    parser.add_argument("--proposers", nargs="*", default=["rpn", "attention"])
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS))
    parser.add_argument("--no-vicrop", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    stream = benchmark.TUNING if args.tuning else benchmark.FRESH
    rows = benchmark.rows_of(args.scenes_seed, args.scenes, stream, args.kinds)
    own = args.model / "rpn"
    rpn = args.rpn or (own if own.exists() else None)
    result = score(
        args.model,
        rpn,
        rows,
        proposers=args.proposers,
        thresholds=args.thresholds,
        vicrop=not args.no_vicrop,
    )
    show(result)
    result["scenes"] = args.scenes
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
