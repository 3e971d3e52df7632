"""The model families, by the `model_type` of their config.json."""

from __future__ import annotations

import os
from typing import Any

from sdrpn.backbones.base import Backbone
from sdrpn.backbones.llava15 import Llava15
from sdrpn.backbones.loading import WeightsUnavailable
from sdrpn.io.checkpoint_files import CONFIG_FILE, Source

ADAPTER_FILE = "adapter_config.json"

FAMILIES: dict[str, type[Backbone]] = {Llava15.model_type: Llava15}


def family(model_type: str) -> type[Backbone]:
    """The class of a family. Raises ValueError for one that is not known."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"unknown backbone {model_type!r}; this version knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def load_backbone(pretrained: str, **options: Any) -> Backbone:
    """Load a frozen model of any known family from a folder or a Hub id.

    Args:
        pretrained: A folder or a Hub id.
        options: The family's own; see `Llava15.load`.
    """
    return Llava15.load(pretrained, **options)


def check_reachable(pretrained: str, revision: str | None = None, peft: str | None = None) -> None:
    """Fetch the small file of a base model and of its adapter, by which a refusal shows.

    Raises WeightsUnavailable, with the cause and its remedy.
    """
    for name, of, file in ((pretrained, revision, CONFIG_FILE), (peft, None, ADAPTER_FILE)):
        if name and not os.path.isdir(name):
            try:
                Source(name, revision=of).fetch(file, "a model or an adapter")
            except OSError as error:
                raise WeightsUnavailable(f"cannot load {name!r}: {error}") from error
