"""Short names of models, which installed packages register in the entry-point group `sdrpn.models`.

An entry point is a function without arguments that returns (model folder, RPN folder). One of the
same name in the group `sdrpn.examples` returns questions to try the model with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "sdrpn.models"
EXAMPLES = "sdrpn.examples"

LLAVA_7B = "llava-hf/llava-1.5-7b-hf"
LLAVA_13B = "llava-hf/llava-1.5-13b-hf"
QWEN_7B = "Qwen/Qwen2.5-VL-7B-Instruct"
PUBLISHED_RPN = {
    LLAVA_7B: "YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled",
    LLAVA_13B: "YuhengSSS/llava-v1.5-13b-roi-K15T3-152k-v1bf16Mheads-twiginit",
    QWEN_7B: "YuhengSSS/qwen2_5vl-7b-roi-K16T3-152k-v1bf16Mheads-twiginit-filled",
}
"""RPNs published by the paper's authors, by base model."""


def resolve(model: str, rpn: str | None) -> tuple[str, str | None]:
    """Resolve the short name of a model to its folders; other names are returned with `~` expanded.

    Args:
        model: Short name, folder or Hub id.
        rpn: Folder or Hub id; None for the RPN of the short name, if any.

    Returns:
        (model, RPN or None), each a folder or Hub id.

    Raises:
        ValueError: If `model` is a path, but there is no such folder.
    """
    # A shell does not expand `--model=~/x`.
    model = os.path.expanduser(model)
    rpn = None if rpn is None else os.path.expanduser(rpn)
    for point in entry_points(group=GROUP, name=model):
        folder, own_rpn = point.load()()
        return folder, rpn or own_rpn
    path = Path(model)
    is_path = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2
    if is_path and not os.path.isdir(model):  # Path.is_dir raises for overlong names
        raise ValueError(f"there is no folder {model}, and it is not a Hub id")
    return model, rpn


def known() -> list[str]:
    """Return the registered short names."""
    return sorted(point.name for point in entry_points(group=GROUP))


@dataclass(frozen=True)
class Example:
    """A question to try a model with.

    Args:
        name: File name of the image.
        image: Content of the image file.
        question: Text of the question.
    """

    name: str
    image: bytes
    question: str


def examples(model: str) -> Sequence[Example]:
    """Return the registered examples of a short name; none for other names."""
    for point in entry_points(group=EXAMPLES, name=model):
        return point.load()()
    return ()
