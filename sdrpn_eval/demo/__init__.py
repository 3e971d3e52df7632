"""The embedded demonstration: a tiny LLaVA, its RPN and its benchmark, and `make demo`."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
BENCHMARK = HERE / "data" / "tiny_vstar.parquet"


def tiny_path() -> Path:
    """Folder of the embedded model, its RPN in `rpn`; FileNotFoundError where it is gone."""
    folder = HERE / "tiny"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model is missing from {folder}: reinstall sdrpn")
    return folder


def embedded_model() -> tuple[str, str]:
    """The embedded model and its RPN, as `sdrpn look --model tiny` finds them by entry point."""
    return str(tiny_path()), str(tiny_path() / "rpn")
