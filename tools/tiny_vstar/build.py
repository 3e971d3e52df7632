"""Make the embedded model, benchmark and table anew: `python -m tools.tiny_vstar.build`.

Seeded, one command, in this order: train the tiny LLaVA (stages 0 and 1), draw the benchmark,
distil the RPN from the model's own attention with the commands that anyone trains with (stages 2
and 3), score every proposer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sdrpn.io.atomic import write_json
from tools.tiny_vstar import make_benchmark, score, train_rpn, train_tiny


def build(out: Path, seed: int) -> None:
    """Write out/tiny (with its RPN), out/data/tiny_vstar.parquet and out/tiny_vstar.json."""
    model, benchmark = out / "tiny", out / "data" / "tiny_vstar.parquet"
    train_tiny.train(model, seed=seed)
    make_benchmark.write(make_benchmark.benchmark_rows(make_benchmark.IMAGES), benchmark)
    facts = train_rpn.distil(model, out / "distil", model / "rpn", seed=seed)
    result = measure(model, benchmark, facts)
    write_json(out / "tiny_vstar.json", result)
    score.show(result)


def measure(model: Path, benchmark: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Score every proposer; with the facts of the distillation and the minutes of every stage."""
    started = time.monotonic()
    result = score.score(model, score.benchmark_questions(benchmark))
    trained = json.loads((model / "training.json").read_text())["seconds"]
    stages = {"tiny model": sum(trained.values()), **facts.pop("seconds")}
    stages["score"] = time.monotonic() - started
    minutes = {name: round(seconds / 60, 1) for name, seconds in stages.items()}
    return result | {
        "labels_and_rpn": facts,
        "minutes": minutes | {"all": round(sum(stages.values()) / 60, 1)},
    }


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tiny"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.out, args.seed)


if __name__ == "__main__":
    main()
