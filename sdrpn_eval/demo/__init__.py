"""The embedded demonstration: a tiny LLaVA, its RPN and its benchmark, and `make demo`."""

from __future__ import annotations

from pathlib import Path

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
