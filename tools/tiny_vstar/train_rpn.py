"""Stages 2 and 3 of the tiny model: `python -m tools.tiny_vstar.train_rpn --model DIR`.

The commands a user of LLaVA-1.5 types, on the tiny model: which heads point, labels from their
attention, an RPN trained on the labels. No box of a disc is used but those of the probe pictures
that `sdrpn heads` draws for itself; boxes measure, afterwards, how good the labels were.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdrpn.io.atomic import as_json
from tools.tiny_vstar.make_questions import SCENES, label_quality, write_questions

BRANCH_LAYER = 1
"""B: just past the layer whose heads point, as `sdrpn heads` finds."""
STEPS = 900
ZOOM = "threshold=peak,policy=strongest,min_cells=1,token_budget=2.5"
"""For the tiny model's 8 x 8 grid, where one cell is as wide as a small disc. Chosen by tune.py on
scenes of their own: with an absolute threshold the RPN passes by discs that it ranks first but is
unsure of. No budget measured there is both cheaper and better than 2.5 (docs/fast.md)."""


def commands(
    model: Path, work: Path, out: Path, *, seed: int = 0, steps: int = STEPS, samples: int = 0
) -> dict[str, list[str]]:
    """The commands by what they are for, in their order; `samples` trains on fewer labels."""
    questions, heads = work / "questions", work / "heads"
    fewer = f" --samples {samples}" if samples else ""
    lines = {
        "heads": f"sdrpn heads --model {model} --out {heads} --max-new-tokens 4 --batch-size 64"
        f" --seed {seed}",
        "label": f"sdrpn label --model {model} --data {questions}/questions.json"
        f" --images {questions}/images --heads {heads}/heads.json --out {work}/attention"
        " --batch-size 64 --preview 16",
        "relabel": f"sdrpn relabel {work}/attention --out {work}/labels"
        " --foreground 0.1 --background 0.05 --max-components 1",
        "train": f"sdrpn train --model {model} --labels {work}/labels --out {out}"
        f" --branch-layer {BRANCH_LAYER} --global-batch 64 --per_device_train_batch_size 64"
        f" --max_steps {steps} --learning_rate 1e-3 --seed {seed} --zoom {ZOOM}"
        f" --save-dtype float16{fewer}",
    }
    return {name: shlex.split(line) for name, line in lines.items()}


def run(command: list[str]) -> float:
    """Run one `sdrpn` command; returns its seconds. Raises CalledProcessError where it failed."""
    print(f"$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "sdrpn.cli", *command[1:]], check=True, env=offline)
    return time.monotonic() - started


def distil(model: Path, work: Path, out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Draw questions, run the commands; returns the facts: labels, training, seconds of each."""
    questions = work / "questions"
    if not (questions / "boxes.json").exists():
        write_questions(questions, SCENES, seed)
    return run_all(commands(model, work, out, seed=seed), work, out)


def run_all(commands: Mapping[str, list[str]], work: Path, out: Path) -> dict[str, Any]:
    """Run the commands; returns the facts: labels, training, seconds of each command.

    Args:
        commands: From `commands`, in their order.
        work: Folder of questions and labels.
        out: Folder of the RPN.
    """
    questions = work / "questions"
    seconds = {name: round(run(command), 1) for name, command in commands.items()}
    return {
        "labels": label_quality(work / "labels", questions),
        "labels_published_thresholds": label_quality(work / "attention", questions),
        "training": json.loads((out / "training.json").read_text()),
        "seconds": seconds,
    }


def main() -> None:
    """Read the command line and distil."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder from train_tiny")
    parser.add_argument("--work", type=Path, default=Path("out/distil"), help="labels and such")
    parser.add_argument("--out", type=Path, help="where to save the RPN; default: MODEL/rpn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    facts = distil(args.model, args.work, args.out or args.model / "rpn", seed=args.seed)
    print(as_json(facts, indent=2))


if __name__ == "__main__":
    main()
