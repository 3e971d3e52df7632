"""Stages 2 and 3: labels from the model's own attention and an RPN trained on them.

`python -m tools.tiny_trio.distil --model DIR` runs the commands that a user of LLaVA-1.5 types. No
box is used but those of the probe pictures that `sdrpn heads` draws for itself; boxes measure,
afterwards, how good the labels were.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sdrpn.distill.probes import box_cover
from sdrpn.io.atomic import as_json, write_json
from tools.tiny_trio import scenes as sc
from tools.tiny_vstar.train_rpn import run, run_all

LABEL_POOL = 3
SCENES, STEPS, BRANCH_LAYER = 6000, 3000, 2
RELABEL = "--foreground 0.07 --strongest 0.85 --max-box-fraction 0.2"
ALL_HEADS = "heads-all.json"
"""All heads of the layers that `sdrpn heads` finds, as in the paper; probes show shapes only."""


def write_questions(out: Path, scenes: int, seed: int, kinds: Sequence[str] = sc.KINDS) -> int:
    """Draw scenes of the kinds in turn and ask all about them; returns the number of questions.

    The pictures are 224 px views, all that the first look and the RPN ever see.
    """
    rng = np.random.default_rng((seed, LABEL_POOL))
    entries, covers = [], {}
    for number in tqdm(range(scenes), "pictures", leave=False):
        kind = kinds[number % len(kinds)]
        scene = sc.MAKERS[kind](rng, 0.5)
        name = f"{kind}/{number:05d}.png"
        (out / "images" / kind).mkdir(parents=True, exist_ok=True)
        view = Image.fromarray(sc.view_of(scene.image, sc.WHOLE))
        view.save(out / "images" / name, compress_level=1)
        for index, item in enumerate(scene.items):
            identity = f"{number:05d}-{index}"
            turns = [
                {"from": "human", "value": f"<image>\n{item.question}"},
                {"from": "gpt", "value": item.response},
            ]
            entries.append({"id": identity, "image": name, "conversations": turns})
            cover = box_cover(item.box, sc.WHOLE, sc.GRID, sc.GRID)
            covers[identity] = np.flatnonzero(cover > 0.25).tolist()
    (out / "questions.json").write_text(as_json(entries))
    (out / "boxes.json").write_text(as_json(covers))
    return len(entries)


def commands(
    model: Path, work: Path, out: Path, *, branch_layer: int, steps: int, seed: int, relabel: str
) -> dict[str, list[str]]:
    """The commands by what they are for, in their order; zoom settings stay as published."""
    questions, heads = work / "questions", work / "heads"
    lines = {
        "heads": f"sdrpn heads --model {model} --out {heads} --max-new-tokens 5 --batch-size 32"
        f" --seed {seed}",
        "label": f"sdrpn label --model {model} --data {questions}/questions.json"
        f" --images {questions}/images --heads {heads}/{ALL_HEADS} --out {work}/attention"
        " --batch-size 32 --preview 16",
        "relabel": f"sdrpn relabel {work}/attention --out {work}/labels {relabel}",
        "train": f"sdrpn train --model {model} --labels {work}/labels --out {out}"
        f" --branch-layer {branch_layer} --global-batch 32 --per_device_train_batch_size 32"
        f" --max_steps {steps} --learning_rate 2e-3 --seed {seed} --save-dtype float16 --bf16 true",
    }
    return {name: shlex.split(line) for name, line in lines.items()}


def distil(
    model: Path,
    work: Path,
    out: Path,
    *,
    scenes: int = SCENES,
    steps: int = STEPS,
    branch_layer: int = BRANCH_LAYER,
    relabel: str = RELABEL,
    kinds: Sequence[str] = sc.KINDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw questions, run the commands; returns the facts: labels, training, seconds of each."""
    questions = work / "questions"
    if not (questions / "boxes.json").exists():
        questions.mkdir(parents=True, exist_ok=True)
        write_questions(questions, scenes, seed, kinds)
    lines = commands(
        model, work, out, branch_layer=branch_layer, steps=steps, seed=seed, relabel=relabel
    )
    seconds = run(lines.pop("heads"))
    use_all_heads(work / "heads")
    facts = run_all(lines, work, out)
    facts["seconds"] = {"heads": round(seconds, 1)} | facts["seconds"]
    return facts


def use_all_heads(folder: Path) -> None:
    """Write ALL_HEADS next to the heads.json of `sdrpn heads`."""
    found = json.loads((folder / "heads.json").read_text())
    for layer in found["grounding"]:
        layer["heads"] = None
    write_json(folder / ALL_HEADS, found)


def main() -> None:
    """Read the command line and distil."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="labels and such")
    parser.add_argument("--out", type=Path, help="where to save the RPN; default: MODEL/rpn")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--branch-layer", type=int, default=BRANCH_LAYER)
    parser.add_argument("--relabel", default=RELABEL, help="options of sdrpn relabel")
    parser.add_argument("--kinds", nargs="+", default=list(sc.KINDS), choices=sc.MAKERS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    facts = distil(
        args.model,
        args.work,
        args.out or args.model / "rpn",
        scenes=args.scenes,
        steps=args.steps,
        branch_layer=args.branch_layer,
        relabel=args.relabel,
        kinds=args.kinds,
        seed=args.seed,
    )
    print(as_json(facts, indent=2))


if __name__ == "__main__":
    main()
