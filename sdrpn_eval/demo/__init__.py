"""The embedded models with their RPNs and benchmarks, and `make demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdrpn.model_registry import Example

HERE = Path(__file__).parent
BENCHMARK = HERE / "data" / "tiny_vstar.parquet"
TRIO_BENCHMARK = HERE / "data" / "tiny_trio.parquet"


def _folder(name: str) -> Path:
    """Folder of an embedded model, with its RPN in `rpn`. Raises FileNotFoundError."""
    folder = HERE / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model is missing from {folder}: reinstall sdrpn")
    return folder


def tiny_path() -> Path:
    """Folder of the model for tests. Raises FileNotFoundError."""
    return _folder("tiny")


def embedded_model() -> tuple[str, str]:
    """Folders of the model for tests and of its RPN; the entry point behind `--model tiny`."""
    return str(tiny_path()), str(tiny_path() / "rpn")


def embedded_trio() -> tuple[str, str]:
    """Folders of the model of the demo and of its RPN; behind `--model tiny-trio`."""
    return str(_folder("trio")), str(_folder("trio") / "rpn")


def embedded_examples() -> Sequence[Example]:
    """Questions of tiny_vstar, as `sdrpn app` offers them."""
    return _examples(BENCHMARK)


def trio_examples() -> Sequence[Example]:
    """Questions of tiny_trio, as `sdrpn app` offers them."""
    return _examples(TRIO_BENCHMARK)


def _examples(benchmark: Path) -> Sequence[Example]:
    """Four fine questions, each on another image."""
    # An extra; imported here so that the model is found without it.
    from pyarrow import parquet

    rows = parquet.read_table(benchmark, columns=["image_id", "image", "question", "category"])
    chosen: dict[str, Example] = {}
    for row in rows.slice(0, 64).to_pylist():
        if row["category"] == "fine":
            example = Example(row["image"]["path"], row["image"]["bytes"], row["question"])
            chosen.setdefault(row["image_id"], example)
    return [*chosen.values()][:4]
