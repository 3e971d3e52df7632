"""Train RPNs of the tiny model on 100, 1,000 and 10,000 labels and score them.

    python -m tools.tiny_vstar.train_rpn --model sdrpn_eval/demo/tiny \\
        --work out/distil --out out/rpn
    python -m benchmarks.data_size --work out/distil --docs docs

All use the same held-out images and number of steps, and the checkpoint with the lowest held-out
loss. Each is scored on all questions of tiny_vstar.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from matplotlib.figure import Figure

from sdrpn import RPN
from sdrpn_eval.demo import BENCHMARK, tiny_path
from tools.tiny_vstar.score import Scorer
from tools.tiny_vstar.train_rpn import commands, run

SIZES = (100, 1000, 10000)
STEPS = 300


def measure(work: Path, sizes: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    """Train and score with each number of labels; returns one row each."""
    rows: Any = list(load_dataset("parquet", data_files=str(BENCHMARK), split="train"))
    scorer = Scorer(tiny_path(), rows)
    scorer.run("stock")
    found = []
    for size in sizes:
        out = work / f"rpn-{size}"
        run(commands(tiny_path(), work, out, steps=steps, samples=size)["train"])
        facts = json.loads((out / "training.json").read_text())
        scorer.rpn = RPN.from_pretrained(str(out))
        scorer.run(f"{size} labels", "rpn")
        found.append(
            {
                "labels": size,
                "held_out": {k.removeprefix("held-out "): v for k, v in facts.items() if "-" in k},
                "accuracy": scorer.results[-1]["all"],
                "zoomed": scorer.results[-1]["zoomed"],
                "seconds": facts["seconds"],
            }
        )
    return [{"labels": 0, "accuracy": scorer.results[0]["all"]}, *found]


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Plot exact match on tiny_vstar and held-out average precision over the number of labels."""
    stock, trained = rows[0], rows[1:]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained", dpi=120)
    axis = figure.subplots()
    x = [row["labels"] for row in trained]
    mean, low, high = zip(*[[100 * v for v in row["accuracy"]] for row in trained], strict=True)
    axis.plot(x, mean, marker="o", color="#c2185b", label="tiny_vstar, exact match")
    axis.fill_between(x, low, high, color="#c2185b", alpha=0.15, lw=0)
    precision = [100 * row["held_out"]["average precision"] for row in trained]
    axis.plot(x, precision, marker="s", color="#1565c0", label="held-out labels, average precision")
    axis.axhline(100 * stock["accuracy"][0], color="grey", ls=":", label="tiny_vstar, stock")
    axis.set_xscale("log")
    axis.set_xlabel("labels trained on")
    axis.set_ylabel("%")
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(out)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of train_rpn's --work")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write to")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    rows = measure(args.work, tuple(args.sizes), args.steps)
    result = {"steps": args.steps, "batch_size": 64, "rows": rows}
    (args.docs / "data_size.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, args.docs / "data_size.png")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
