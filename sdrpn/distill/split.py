"""Split labels by image into training and held-out sets."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Subset

from sdrpn.distill.label_dataset import LabelledImages
from sdrpn.io.plurals import counted


def split_by_image(
    rows: LabelledImages, held_out: float, samples: int | None, seed: int
) -> tuple[Subset, Subset | None]:
    """Split rows so that no image is in both sets.

    Args:
        rows: Labelled rows.
        held_out: Share of the images to hold out, in [0, 1).
        samples: Number of training rows, drawn at random; a larger number draws a superset.
        seed: Seed of both draws.

    Returns:
        (training rows, held-out rows or None).

    Raises:
        ValueError: If one of the sets would be empty.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {held_out}")
    if not len(rows):
        raise ValueError("no sample has a label, so there is nothing to train on")
    images = list(dict.fromkeys(rows.rows["image"]))
    order = np.random.default_rng(seed).permutation(len(images))
    back = {images[i] for i in order[: round(held_out * len(images))]}
    if held_out and not back:
        raise ValueError(
            f"held_out {held_out} of {counted(len(images), 'image')} is none: increase it, or set "
            "it to 0"
        )
    named = rows.rows["image"]
    measured = [i for i, image in enumerate(named) if image in back]
    trained = [i for i, image in enumerate(named) if image not in back]
    if samples is not None:
        if not 1 <= samples <= len(trained):
            raise ValueError(f"samples must be 1 to {len(trained)}, the number of labels")
        trained = [trained[i] for i in np.random.default_rng(seed).permutation(len(trained))]
        trained = sorted(trained[:samples])
    return Subset(rows, trained), Subset(rows, measured) if back else None  # type: ignore[arg-type]
