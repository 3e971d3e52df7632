"""The model families, by the `model_type` of their config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sdrpn.backbones.base import Backbone
from sdrpn.backbones.llava15 import ARCHITECTURE as LLAVA15
from sdrpn.backbones.llava15 import Llava15
from sdrpn.backbones.loading import WeightsUnavailable
from sdrpn.backbones.qwen25_vl import ARCHITECTURE as QWEN25_VL
from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.io.checkpoint_files import CONFIG_FILE, Source

ADAPTER_FILE = "adapter_config.json"

FAMILIES: dict[str, type[Backbone]] = {one.model_type: one for one in (Llava15, Qwen25VL)}


COUSINS = {
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen_vl": "Qwen-VL",
    "llava_onevision": "LLaVA-OneVision",
}
"""Relatives that are told from the known families by name."""


def family(model_type: str) -> type[Backbone]:
    """The class of a family. Raises ValueError for one that is not known."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"unknown backbone {model_type!r}; this version knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def load_backbone(pretrained: str, revision: str | None = None, **options: Any) -> Backbone:
    """Load a frozen model of any known family from a folder or a Hub id.

    Args:
        pretrained: A folder or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        options: Of `loading.load_model`, and the family's own; see its `load`.

    Raises:
        ValueError: A model of another family, named, or one that is broken.
        WeightsUnavailable: There is nothing to load, with the cause and its remedy.
    """
    kind = str(_config(pretrained, revision).get("model_type"))
    if kind in COUSINS:
        raise ValueError(
            f"{pretrained} is a {COUSINS[kind]} (model_type {kind!r}), which has no published "
            f"region proposals; give a Qwen2.5-VL, such as {QWEN25_VL.example}, or a LLaVA-1.5, "
            f"such as {LLAVA15.example}"
        )
    # What is neither is refused by LLaVA-1.5's own check, which knows its relatives by name.
    chosen = FAMILIES.get(kind, Llava15)
    return chosen.load(pretrained, revision=revision, **_known(chosen, pretrained, options))


def _known(chosen: type[Backbone], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that are None; ValueError for one that only another family has."""
    given = {key: value for key, value in options.items() if value is not None}
    others = frozenset().union(*(one.load_options for one in FAMILIES.values()))
    wrong = sorted(given.keys() & (others - chosen.load_options))
    if wrong:
        raise ValueError(
            f"{name} is a {chosen.model_type} model, which has no {', '.join(wrong)}: omit it"
        )
    return given


def family_of(pretrained: str, revision: str | None = None) -> tuple[type[Backbone], int]:
    """A model's family and the published branch layer of its RPN, from its config.json."""
    values = _config(pretrained, revision)
    chosen = FAMILIES.get(str(values.get("model_type")), Llava15)
    return chosen, chosen.published_branch(values)


def _config(pretrained: str, revision: str | None) -> dict[str, Any]:
    """A model's config.json; empty where it cannot be read, which loading tells."""
    try:
        return Source(pretrained, revision=revision).config("a model")
    except (OSError, ValueError):
        return {}


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
