"""Draws questions to measure on, from a seed: `fresh` scenes that no training has seen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tools.tiny_trio import scenes as sc

TUNING, FRESH = 30261, 30262
"""First numbers of the seeds: scenes that settings are chosen on, and scenes that are reported."""
FINE_SHARE = 0.75
QUALITY = 92
SCENES = 40
"""Scenes of each kind and seed."""


def rows_of(
    seeds: Sequence[int], scenes: int = SCENES, stream: int = FRESH, kinds: Sequence[str] = sc.KINDS
) -> list[dict[str, Any]]:
    """One row per question on `scenes` scenes of each kind for every seed.

    `box` is where to look, half-open, in pixels; `group` the kind, or `relation`.
    """
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for kind in kinds:
            rng = np.random.default_rng((stream, seed, list(sc.MAKERS).index(kind)))
            for number in range(scenes):
                rows += scene_rows(sc.MAKERS[kind](rng, FINE_SHARE), f"{seed}/{kind}_{number:03d}")
    return rows


def scene_rows(scene: sc.Scene, image_id: str) -> list[dict[str, Any]]:
    """The questions about one scene, with its picture as it comes out of a lossy WebP file."""
    stored = io.BytesIO(sc.webp_bytes(scene.image, QUALITY))
    image = Image.open(stored).convert("RGB")
    return [
        {
            "question_id": f"{image_id}-{number}",
            "image_id": image_id,
            "seed": int(image_id.split("/")[0]),
            "image": image,
            "question": item.question,
            "name": item.name,
            "answer": item.answer,
            "group": "relation" if item.relation else item.kind,
            "category": item.category,
            "box": tuple(item.box),
        }
        for number, item in enumerate(scene.items)
    ]
