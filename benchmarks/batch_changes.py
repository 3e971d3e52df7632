"""Count the answers that change with the batch size, for sdrpn and left-padded stock LLaVA.

    python -m benchmarks.batch_changes --out docs/batch_changes.json

Asks every question of tiny_vstar at batch size 1 and at --batch-size, in benchmark order, on the
embedded model, and counts the answers whose text differs. In float32 there should be none; in half
precision, matrix products of a batch round differently from those of a single row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.systems import stock
from sdrpn import RPN, Question, ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn_eval.demo import tiny_path
from tools.tiny_vstar.score import GENERATION, is_right
from tools.tiny_vstar.tune import benchmark_rows

DTYPES = ("float32", "bfloat16", "float16")
Ask = Callable[[Sequence[Question]], list[str]]


def _engine(engine: ZoomModel) -> Ask:
    return lambda batch: [answer.text for answer in engine.ask_batch(batch, GENERATION)]


def _stock(llava: Llava15) -> Ask:
    ask = stock(llava, GENERATION).run
    return lambda batch: [said.text for said in ask(batch)]


def systems(dtype: str, device: str) -> dict[str, Ask]:
    """The systems to compare, over the same weights."""
    llava = Llava15.load(str(tiny_path()), dtype=dtype, device=device)
    rpn = RPN.from_pretrained(str(tiny_path() / "rpn"))
    return {
        "stock, left-padded": _stock(llava),
        "ours, no second look": _engine(ZoomModel(llava, proposer="none")),
        "ours, rpn": _engine(ZoomModel(llava, rpn)),
    }


def _in_batches(ask: Ask, questions: Sequence[Question], size: int, title: str) -> list[str]:
    starts = tqdm(range(0, len(questions), size), title, leave=False)
    return [text for start in starts for text in ask(questions[start : start + size])]


def measure(
    size: int, dtypes: Sequence[str], limit: int | None = None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return a row per system and dtype: changed answers, and those that changed the score."""
    rows = benchmark_rows(limit)
    questions = [Question(row["question"], (row["picture"],)) for row in rows]
    found = []
    for dtype in dtypes:
        for name, ask in systems(dtype, device).items():
            alone = _in_batches(ask, questions, 1, f"{dtype}, {name}, batch 1")
            together = _in_batches(ask, questions, size, f"{dtype}, {name}, batch {size}")
            pairs = list(zip(rows, alone, together, strict=True))
            found.append(
                {
                    "system": name,
                    "dtype": dtype,
                    "questions": len(rows),
                    "batch_size": size,
                    "answers_changed": sum(a != b for _, a, b in pairs),
                    "scores_changed": sum(is_right(a, r) != is_right(b, r) for r, a, b in pairs),
                }
            )
            print(found[-1], flush=True)
    return found


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--out", type=Path, help="JSON file to write")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    p.add_argument("--limit", type=int, help="number of questions, for a quick run")
    p.add_argument("--device", default="cpu")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    args = parser().parse_args(arguments)
    rows = measure(args.batch_size, args.dtypes, args.limit, args.device)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
