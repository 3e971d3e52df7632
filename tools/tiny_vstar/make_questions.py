"""Draws questions to distil from: `python -m tools.tiny_vstar.make_questions --out DIR`.

Leaves DIR/questions.json in the layout of LLaVA's instruction data and the pictures below
DIR/images, as a user of `sdrpn label` has them. The pictures are 112 px views, all that the first
look and the RPN ever see. DIR/boxes.json holds the true boxes, which no command reads: they only
tell afterwards how good the labels were.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sdrpn.distill.label_dataset import load_labels
from sdrpn.io.atomic import as_json
from sdrpn.io.plurals import counted
from tools.tiny_vstar import scenes as sc

LABEL_POOL = 7
"""Second number of the seed of these scenes; no other stage draws them."""
SCENES = 4000


def write_questions(out: Path, scenes: int, seed: int) -> int:
    """Draw `scenes` scenes and ask about each of their discs; returns the number of questions."""
    pictures = out / "images" / "scenes"
    pictures.mkdir(parents=True, exist_ok=True)
    pool = sc.make_pool((seed, LABEL_POOL), scenes, webp_share=1.0, quality=92)
    entries, covers = [], {}
    for number, scene in enumerate(tqdm(pool, "pictures", leave=False)):
        name = f"scenes/{number:05d}.png"
        Image.fromarray(scene.view).save(out / "images" / name, compress_level=1)
        for disc in scene.discs:
            identity = f"{number:05d}-{disc.colour}"
            turns = [
                {"from": "human", "value": f"<image>\n{disc.question}"},
                {"from": "gpt", "value": disc.response},
            ]
            entries.append({"id": identity, "image": name, "conversations": turns})
            covers[identity] = np.flatnonzero(sc.patch_covers((disc,), sc.WHOLE)[0] > 0.1).tolist()
    (out / "questions.json").write_text(as_json(entries))
    (out / "boxes.json").write_text(as_json(covers))
    return len(entries)


def label_quality(labels: Path, questions: Path) -> dict[str, float]:
    """How a folder of labels agrees with the cells that each asked disc covers.

    Share of samples kept; precision, recall and IoU of their foreground cells, means over samples.
    """
    covers: dict[str, list[int]] = json.loads((questions / "boxes.json").read_text())
    scores: list[tuple[float, float, float]] = []
    rows = load_labels(labels)
    row: Any
    for row in rows:
        if row["reason"] is None:
            foreground = set(np.flatnonzero(np.array(row["labels"]) == 1).tolist())
            true = set(covers[row["id"]])
            both = len(foreground & true)
            union = len(foreground | true)
            scores.append((both / len(foreground), both / max(len(true), 1), both / union))
    means = np.mean(scores, axis=0)
    names = ("precision", "recall", "iou")
    kept = {"questions": len(rows), "kept": round(len(scores) / len(rows), 4)}
    return kept | {name: round(float(v), 4) for name, v in zip(names, means, strict=True)}


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"scenes (default: {SCENES})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{counted(write_questions(args.out, args.scenes, args.seed), 'question')} in {args.out}")


if __name__ == "__main__":
    main()
