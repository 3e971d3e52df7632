"""Registry of model families, by the `model_type` in config.json."""

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

UNSUPPORTED = {
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen_vl": "Qwen-VL",
    "llava_onevision": "LLaVA-OneVision",
}
"""Names of related families without published RPNs, by `model_type`."""


def family(model_type: str) -> type[Backbone]:
    """Return the class of a family.

    Raises:
        ValueError: If the family is unknown.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"unknown backbone {model_type!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def load_backbone(pretrained: str, revision: str | None = None, **options: Any) -> Backbone:
    """Load a frozen model of any known family.

    Args:
        pretrained: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        options: Arguments of `loading.load_model` and of the family's `load`; None is ignored.

    Raises:
        ValueError: If the model is of an unsupported family, an option is not the family's, or a
            file is broken.
        WeightsUnavailable: If the model cannot be found or downloaded.
    """
    model_type = str(_config(pretrained, revision).get("model_type"))
    if model_type in UNSUPPORTED:
        raise ValueError(
            f"{pretrained} is a {UNSUPPORTED[model_type]} (model_type {model_type!r}), which has "
            f"no published region proposals; use a Qwen2.5-VL, such as {QWEN25_VL.example}, or a "
            f"LLaVA-1.5, such as {LLAVA15.example}"
        )
    # LLaVA-1.5's check rejects all other families, with a message for its own relatives.
    chosen = FAMILIES.get(model_type, Llava15)
    return chosen.load(pretrained, revision=revision, **_checked(chosen, pretrained, options))


def _checked(chosen: type[Backbone], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop options that are None, and raise ValueError for those of other families only."""
    given = {key: value for key, value in options.items() if value is not None}
    others = frozenset().union(*(one.load_options for one in FAMILIES.values()))
    wrong = sorted(given.keys() & (others - chosen.load_options))
    if wrong:
        raise ValueError(
            f"{name} is a {chosen.model_type} model, which has no {', '.join(wrong)}: omit it"
        )
    return given


def family_of(pretrained: str, revision: str | None = None) -> tuple[type[Backbone], int]:
    """Read a model's family and published branch layer from its config.json.

    Args:
        pretrained: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        The family's class and the branch layer B.
    """
    values = _config(pretrained, revision)
    chosen = FAMILIES.get(str(values.get("model_type")), Llava15)
    return chosen, chosen.published_branch(values)


def _config(pretrained: str, revision: str | None) -> dict[str, Any]:
    """Read config.json; empty if that fails, which loading the model reports."""
    try:
        return Source(pretrained, revision=revision).config("a model")
    except (OSError, ValueError):
        return {}


def check_reachable(pretrained: str, revision: str | None = None, peft: str | None = None) -> None:
    """Check access to a base model and its adapter on the Hub, by fetching their config files.

    Args:
        pretrained: Folder or Hub id of the base model.
        revision: Branch, tag or commit of `pretrained`.
        peft: Folder or Hub id of a PEFT adapter.

    Raises:
        WeightsUnavailable: If a file cannot be fetched.
    """
    files = ((pretrained, revision, CONFIG_FILE), (peft, None, ADAPTER_FILE))
    for name, version, file in files:
        if name and not os.path.isdir(name):
            try:
                Source(name, revision=version).fetch(file, "a model or an adapter")
            except OSError as error:
                raise WeightsUnavailable(f"cannot load {name!r}: {error}") from error
