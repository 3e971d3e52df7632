"""Accuracy over cost: `python -m tools.tiny_vstar.tune --docs docs`.

Thresholds, absolute and relative to the map's peak, and token budgets for the tiny model's RPN, on
scenes drawn for this alone (none of the benchmark's, none that trained anything). The RPN's zoom
settings and the preset `fast` are chosen there; the budgets are then measured on tiny_vstar too.
Writes fast.json, fast.png and fast.md.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from matplotlib.figure import Figure
from PIL import Image

from sdrpn import RPN, Question, ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import PEAK, ZoomConfig
from sdrpn.io.atomic import as_json
from sdrpn_eval.args import ZOOM_ARGUMENTS, LlavaArguments
from sdrpn_eval.demo import BENCHMARK, tiny_path
from sdrpn_eval.results.stats import clustered, clustered_difference, rounded
from tools.tiny_vstar import make_benchmark
from tools.tiny_vstar.score import ask_all, is_right

TUNING_SEED = (20260, 5)
SCENES = 150
THRESHOLDS = (0.05, 0.1, 0.15, 0.2)
BUDGETS = (None, 3.0, 2.5, 2.0, 1.5, 1.0)
Row = dict[str, Any]


def tuning_rows(scenes: int) -> list[Row]:
    """Questions as in the benchmark, on other scenes; every row with its decoded image."""
    rows = make_benchmark.benchmark_rows(scenes, TUNING_SEED)
    return [row | {"picture": _decoded(row)} for row in rows]


def benchmark_rows(limit: int | None = None) -> list[Row]:
    """The questions of tiny_vstar, or the first ones; every row with its decoded image."""
    rows: Any = load_dataset("parquet", data_files=str(BENCHMARK), split="train")
    return [row | {"picture": row["image"].convert("RGB")} for row in islice(rows, limit)]


def _decoded(row: Row) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


def thresholds(base: ZoomConfig) -> Iterator[tuple[str, ZoomConfig]]:
    """Every threshold, absolute and relative to the map's peak, on the crop's whole grid."""
    for threshold in (*THRESHOLDS, PEAK):
        yield f"t = {threshold}", replace(base, threshold=threshold, token_budget=None)


def budgets(base: ZoomConfig) -> Iterator[tuple[str, ZoomConfig]]:
    """Every budget at the RPN's own threshold, and the preset `fast` as the plugin sets it."""
    for budget in BUDGETS:
        yield f"budget {budget or 'whole grid'}", replace(base, token_budget=budget)
    fast = {name: v for name, v in LlavaArguments.presets["fast"].items() if name in ZOOM_ARGUMENTS}
    yield "preset fast", replace(base, **fast)


def measure(
    zoom: ZoomModel, rows: Sequence[Row], settings: Iterable[tuple[str, ZoomConfig]]
) -> list[Row]:
    """One row a setting: accuracy with its interval, share zoomed, mean crop tokens a question.

    against_whole_grid: the paired difference to that budget, in points, once it was measured.
    """
    images = [row["image_id"] for row in rows]
    found: list[Row] = []
    whole: list[float] | None = None
    for name, chosen in settings:
        asked = [Question(r["question"], (r["picture"],), zoom=chosen) for r in rows]
        answers = ask_all(zoom, asked, name)
        right = [float(is_right(a.text, r)) for a, r in zip(answers, rows, strict=True)]
        row = {
            "name": name,
            "accuracy": rounded(clustered(right, images)),
            "zoomed": round(float(np.mean([bool(a.regions) for a in answers])), 4),
            "crop_tokens": round(float(np.mean([a.crop_tokens for a in answers])), 1),
        }
        if name == "budget whole grid":
            whole = right
        elif whole is not None:
            lost = [a - b for a, b in zip(right, whole, strict=True)]
            found_lost = rounded(clustered_difference(lost, images))
            row["against_whole_grid"] = [
                None if v is None else round(100 * v, 2) for v in found_lost
            ]
        found.append(row)
        print(row, flush=True)
    return found


def tune(model: Path, scenes: int) -> dict[str, Any]:
    """Thresholds and budgets on the tuning scenes, the budgets on tiny_vstar too."""
    rpn = RPN.from_pretrained(str(model / "rpn"))
    zoom = ZoomModel(Llava15.load(str(model), dtype="float32"), rpn)
    own, rows, benchmark = rpn.config.zoom, tuning_rows(scenes), benchmark_rows()
    return {
        "tuning": {
            "scenes": scenes,
            "questions": len(rows),
            "thresholds": measure(zoom, rows, thresholds(own)),
            "budgets": measure(zoom, rows, budgets(own)),
        },
        "tiny_vstar": {
            "questions": len(benchmark),
            "budgets": measure(zoom, benchmark, budgets(own)),
        },
    }


def draw(result: dict[str, Any]) -> Figure:
    """Accuracy over crop tokens, on both sets."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=130)
    axis = figure.subplots()
    looks = {"tuning": ("#0072b2", "o", "tuning scenes"), "tiny_vstar": ("#d55e00", "s", None)}
    for name, (colour, marker, label) in looks.items():
        rows = sorted(result[name]["budgets"], key=lambda row: row["crop_tokens"])
        tokens = [row["crop_tokens"] for row in rows]
        mean, low, high = (np.array([100 * row["accuracy"][i] for row in rows]) for i in range(3))
        label = label or name
        axis.errorbar(
            tokens,
            mean,
            [mean - low, high - mean],
            color=colour,
            marker=marker,
            label=label,
            capsize=2,
        )
        (fast,) = (row for row in rows if row["name"] == "preset fast")
        point = (fast["crop_tokens"], 100 * fast["accuracy"][0])
        axis.scatter(*point, s=150, facecolors="none", edgecolors=colour, label=f"fast, {label}")
    axis.set_xlabel("mean crop tokens per question")
    axis.set_ylabel("exact match, %")
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="lower right")
    return figure


def page(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    tuning, tiny = result["tuning"], result["tiny_vstar"]
    parts = [
        "# Accuracy over crop tokens",
        "![Accuracy over crop tokens](fast.png)",
        "A crop of the embedded model has up to 64 tokens. A token budget b gives b r x b c tokens "
        "to a region of r x c cells. Bars are 95 % intervals, clustered by image. Created by "
        "`python -m tools.tiny_vstar.tune --docs docs`.",
        f"## tiny_vstar, {tiny['questions']} questions",
        _table(tiny["budgets"]),
        f"## Tuning scenes, {tuning['questions']} questions on {tuning['scenes']} scenes",
        "Scenes for tuning only, which are neither in the benchmark nor in any training set. "
        "Settings are selected on them.",
        _table(tuning["budgets"]),
        "Thresholds, with the full grid:",
        _table(tuning["thresholds"]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| setting | exact match, % | difference from full grid, points | zoomed | crop tokens |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        mean, low, high = (100 * v for v in row["accuracy"])
        paired = row.get("against_whole_grid")
        lost = f"{paired[0]:+.1f} [{paired[1]:+.1f}, {paired[2]:+.1f}]" if paired else ""
        lines.append(
            f"| {row['name']} | {mean:.1f} [{low:.1f}, {high:.1f}] | {lost} | "
            f"{100 * row['zoomed']:.0f} % | {row['crop_tokens']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a tiny model; default: the shipped")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"default: {SCENES}")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write to")
    args = parser.parse_args()
    result = tune(args.model or tiny_path(), args.scenes)
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "fast.json").write_text(as_json(result, indent=1) + "\n")
    draw(result).savefig(args.docs / "fast.png")
    (args.docs / "fast.md").write_text(page(result))


if __name__ == "__main__":
    main()
