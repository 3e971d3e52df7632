"""Accuracy over cost: `python -m sdrpn_eval.demo.tune --out docs/fast.json`.

Thresholds, absolute and relative, and token budgets for the tiny model's RPN, on scenes drawn for
this alone (none of the benchmark's, none that trained anything). The RPN's zoom settings and the
preset `fast` are chosen from this table; tiny_vstar then only measures them.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdrpn import RPN, Question, ZoomLlava
from sdrpn.config import ZoomConfig
from sdrpn.llava import Llava
from sdrpn_eval.demo import make_benchmark, tiny_path
from sdrpn_eval.demo.score import ask_all, is_right
from sdrpn_eval.stats import clustered

TUNING_SEED = (20260, 5)
SCENES = 150
THRESHOLDS = (0.05, 0.1, 0.15, 0.2)
BUDGETS = (None, 3.0, 2.5, 2.0, 1.5, 1.0)


def tuning_rows(scenes: int) -> list[dict[str, Any]]:
    """Questions as in the benchmark, on other scenes; every row with its decoded image."""
    rows = make_benchmark.benchmark_rows(scenes, TUNING_SEED)
    return [row | {"picture": _decoded(row)} for row in rows]


def _decoded(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


def settings(base: ZoomConfig) -> Iterator[tuple[str, ZoomConfig]]:
    """What is tried: every threshold both ways, then every budget at the RPN's own threshold."""
    for relative in (False, True):
        for threshold in THRESHOLDS:
            name = f"t = {threshold}{', relative' if relative else ''}"
            yield name, replace(base, threshold=threshold, relative=relative)
    for budget in BUDGETS:
        yield f"budget {budget or 'whole grid'}", replace(base, token_budget=budget)
    yield "budget 2.5, skip above 0.7", replace(base, token_budget=2.5, skip_above=0.7)


def measure(model: Path, scenes: int) -> dict[str, Any]:
    """One row a setting: accuracy with its interval, share zoomed, mean crop tokens a question."""
    rows = tuning_rows(scenes)
    llava = Llava.load(str(model), dtype="float32")
    rpn = RPN.from_pretrained(str(model / "rpn"))
    zoom = ZoomLlava(llava, rpn)
    images = [row["image_id"] for row in rows]
    found = []
    for name, chosen in settings(rpn.config.zoom):
        asked = [Question(r["question"], (r["picture"],), zoom=chosen) for r in rows]
        answers = ask_all(zoom, asked, name)
        right = [float(is_right(a.text, r)) for a, r in zip(answers, rows, strict=True)]
        row = {
            "name": name,
            "accuracy": [round(v, 4) for v in clustered(right, images)],
            "zoomed": round(float(np.mean([bool(a.regions) for a in answers])), 4),
            "crop_tokens": round(float(np.mean([a.crop_tokens for a in answers])), 1),
        }
        found.append(row)
        print(row, flush=True)
    return {"questions": len(rows), "scenes": scenes, "rows": found}


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a tiny model; default: the shipped")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"default: {SCENES}")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    result = measure(args.model or tiny_path(), args.scenes)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
