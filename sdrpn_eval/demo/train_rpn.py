"""Stages 2 and 3 of the tiny model: `python -m sdrpn_eval.demo.train_rpn --model DIR`.

The frozen tiny LLaVA answers questions about fresh scenes, its own attention becomes
pseudo-labels, and an RPN learns from those alone. No box of a disc is used; boxes only measure,
afterwards, how good the labels were. Scenes are shown as their 112 px views, the only thing that
the model's first look and the RPN ever see.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdrpn import RPN, LabelConfig, Question, RPNConfig, ZoomConfig, ZoomLlava
from sdrpn.config import LayerHeads
from sdrpn.distill.label import Labelled, label
from sdrpn.distill.pseudo_labels import IGNORED
from sdrpn.distill.train import train, training_arguments
from sdrpn.llava import Llava
from sdrpn_eval.demo import scenes as sc

LABEL_POOL = 7
"""Second number of the seed of the scenes that are labelled; no other stage draws them."""
BRANCH_LAYER, DEPTH = 3, 3
ZOOM = ZoomConfig(threshold=0.1, policy="strongest", min_cells=1)
"""Best settings on the tiny model's 8 x 8 grid, where one cell is as wide as a small disc."""
NO_SINKS = 1.0
"""The tiny model has no sink tokens, so no share of attention counts as one."""


def label_config(model: Path) -> LabelConfig:
    """Which heads point, as the probe after stage 1 found them (training.json)."""
    facts = json.loads((model / "training.json").read_text())
    grounding = tuple(
        LayerHeads(int(layer), tuple(heads)) for layer, heads in facts["grounding_heads"].items()
    )
    first = grounding[0].layer
    return LabelConfig(
        grounding=grounding,
        sink=(LayerHeads(first),),
        vicrop_layer=first,
        sink_threshold=NO_SINKS,
        max_components=1,
        max_new_tokens=4,
    )


def questions_on(scenes: Sequence[sc.Scene]) -> tuple[list[Question], list[sc.Disc]]:
    """One question a disc, each about its scene's view, and the discs in the same order."""
    questions, discs = [], []
    for scene in scenes:
        view = Image.fromarray(scene.view)
        for disc in scene.discs:
            questions.append(Question(disc.question, (view,)))
            discs.append(disc)
    return questions, discs


def label_quality(labelled: Sequence[Labelled], discs: Sequence[sc.Disc]) -> dict[str, float]:
    """Kept share, and precision and recall of foreground cells against the discs (kept samples)."""
    kept = [(one, disc) for one, disc in zip(labelled, discs, strict=True) if one.reason is None]
    precision, recall = [], []
    for one, disc in kept:
        disc_cells = sc.patch_covers((disc,), sc.WHOLE)[0].ravel() > 0.1
        foreground = one.labels == 1
        precision.append((foreground & disc_cells).sum() / max(foreground.sum(), 1))
        recall.append((foreground & disc_cells).sum() / max(disc_cells.sum(), 1))
    return {
        "kept": round(len(kept) / len(labelled), 4),
        "precision": round(float(np.mean(precision)), 4),
        "recall": round(float(np.mean(recall)), 4),
    }


def distil(
    model: Path, *, seed: int = 0, scenes: int = 2000, steps: int = 900, lr: float = 1e-3
) -> tuple[RPN, dict[str, Any]]:
    """Label `scenes` scenes and train an RPN for `steps` steps of 64; returns it and the facts."""
    labels = label_config(model)
    llava = Llava.load(str(model), dtype="float32")
    llava.name = "tiny"
    zoom = ZoomLlava(llava, proposer="none", labels=labels, prefix_cache=0)
    pool = sc.make_pool((seed, LABEL_POOL), scenes, webp_share=1.0, quality=92)
    questions, discs = questions_on(pool)
    labelled = list(label(zoom, questions, batch_size=64))
    facts = label_quality(labelled, discs) | {"questions": len(questions)}
    print(f"labels: {facts}")
    rows = [
        {"image": q.images[0], "question": q.text, "labels": one.labels}
        for q, one in zip(questions, labelled, strict=True)
        if (one.labels != IGNORED).any()
    ]
    rpn = fresh(llava, labels)
    arguments = training_arguments(
        "out/tiny-rpn",
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=64,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        seed=seed,
        use_cpu=True,
    )
    facts |= train(llava, rpn, rows, arguments)
    rpn.facts |= {f"label {name}": facts[name] for name in ("kept", "precision", "recall")}
    return rpn, facts


def fresh(llava: Llava, labels: LabelConfig) -> RPN:
    """A copy of the backbone's layers that knows the tiny model's labels and zoom settings."""
    rpn = RPN.from_backbone(llava, BRANCH_LAYER, DEPTH)
    values = rpn.config.to_dict() | {"labels": labels, "zoom": ZOOM}
    tuned = RPN(RPNConfig(**values))
    tuned.load_state_dict(rpn.state_dict())
    return tuned


def main() -> None:
    """Read the command line, distil, save next to the model."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder from train_tiny")
    parser.add_argument("--out", type=Path, help="where to save; default: MODEL/rpn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=2000, help="scenes to label")
    parser.add_argument("--steps", type=int, default=900, help="training steps of 64 questions")
    args = parser.parse_args()
    rpn, facts = distil(args.model, seed=args.seed, scenes=args.scenes, steps=args.steps)
    rpn.half().save_pretrained(args.out or args.model / "rpn")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
