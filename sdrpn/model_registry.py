"""Short names of models that installed packages bring, by the entry-point group `sdrpn.models`.

An entry point names a function without arguments that returns (model folder, RPN folder).
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "sdrpn.models"

LLAVA_7B = "llava-hf/llava-1.5-7b-hf"
LLAVA_13B = "llava-hf/llava-1.5-13b-hf"
QWEN_7B = "Qwen/Qwen2.5-VL-7B-Instruct"
PUBLISHED_RPN = {
    LLAVA_7B: "YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled",
    LLAVA_13B: "YuhengSSS/llava-v1.5-13b-roi-K15T3-152k-v1bf16Mheads-twiginit",
    QWEN_7B: "YuhengSSS/qwen2_5vl-7b-roi-K16T3-152k-v1bf16Mheads-twiginit-filled",
}
"""The RPNs the paper's authors published, by base model."""


def resolve(model: str, rpn: str | None) -> tuple[str, str | None]:
    """Where a model and its RPN are; anything else than a short name stays as it is, but for `~`.

    Raises ValueError for a path without a folder, which would be looked for on the hub.
    """
    # A shell leaves `--model=~/x` as it is.
    model = os.path.expanduser(model)
    rpn = None if rpn is None else os.path.expanduser(rpn)
    for point in entry_points(group=GROUP, name=model):
        folder, own_rpn = point.load()()
        return folder, rpn or own_rpn
    path = Path(model)
    is_path = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2
    if is_path and not os.path.isdir(model):  # Path.is_dir raises for names that are too long
        raise ValueError(f"there is no folder {model}, and no model of the hub is called so")
    return model, rpn


def known() -> list[str]:
    """The short names at hand."""
    return sorted(point.name for point in entry_points(group=GROUP))
