"""Model cards: README.md of a checkpoint, with metadata that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sdrpn.io.atomic import atomic_write

CARD_FILE = "README.md"


def new_card(data: ModelCardData, text: str) -> ModelCard:
    """Build a card from its metadata and its Markdown."""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def with_results(
    card: ModelCard, name: str, results: Sequence[EvalResult], section: str
) -> ModelCard:
    """Return a card with evaluation results, which replace those that it has.

    Args:
        card: A card.
        name: Name of the model, for its metadata.
        results: Results for the metadata (`model-index`).
        section: Markdown that begins with a heading of the second level; it replaces the section of
            the same heading, or comes last.
    """
    data = ModelCardData(**card.data.to_dict(), ignore_metadata_errors=True)
    data.model_name, data.eval_results = name, list(results)
    heading = section.splitlines()[0]
    old = re.compile(rf"^{re.escape(heading)}$.*?(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)
    kept = old.sub("", card.text).rstrip()
    return new_card(data, f"{kept}\n\n{section.strip()}\n")


def save_card(card: ModelCard, folder: Path) -> Path:
    """Write a card as README.md of a folder, which is made; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CARD_FILE) as part:
        card.save(part)
    return folder / CARD_FILE
