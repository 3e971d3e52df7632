"""The embedded demonstration: a tiny LLaVA, its RPN and its benchmark, and `make demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdrpn.model_registry import Example

HERE = Path(__file__).parent
BENCHMARK = HERE / "data" / "tiny_vstar.parquet"


def tiny_path() -> Path:
    """Folder of the embedded model, with its RPN in `rpn`. Raises FileNotFoundError."""
    folder = HERE / "tiny"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model is missing from {folder}: reinstall sdrpn")
    return folder


def embedded_model() -> tuple[str, str]:
    """Folders of the embedded model and of its RPN; the entry point behind `--model tiny`."""
    return str(tiny_path()), str(tiny_path() / "rpn")


def embedded_examples() -> Sequence[Example]:
    """Questions of the embedded benchmark, each on another image, as `sdrpn app` offers them."""
    # An extra; imported here so that the model is found without it.
    from pyarrow import parquet

    rows = parquet.read_table(BENCHMARK, columns=["image_id", "image", "question", "category"])
    chosen: dict[str, Example] = {}
    for row in rows.slice(0, 64).to_pylist():
        if row["category"] == "fine":
            example = Example(row["image"]["path"], row["image"]["bytes"], row["question"])
            chosen.setdefault(row["image_id"], example)
    return [*chosen.values()][:4]
