"""Checked arguments -> a ZoomModel, with errors that say what to do when weights are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from loguru import logger

from sdrpn.config import ZoomConfig
from sdrpn.engine import ZoomModel
from sdrpn.model_registry import PUBLISHED_RPN, resolve
from sdrpn_eval.arguments import PRESETS

TINY = "tiny"

_LOADING = ("revision", "rpn", "rpn_revision", "padding", "system_prompt", "dtype")
_LOADING += ("attn_implementation", "device", "device_map", "prefix_cache", "peft", "load_in_4bit")

ZOOM_ARGUMENTS = ("policy", "token_budget", "max_crop_tokens", "skip_above", "relative")


def load_engine(
    values: Mapping[str, Any], given: Mapping[str, Any], device: torch.device
) -> ZoomModel:
    """The engine that answers: the one in memory where `pretrained` is one, else loaded.

    values: all arguments, checked; given: those the user wrote.
    Raises ValueError that names the arguments to change.
    """
    pretrained = values["pretrained"]
    if not isinstance(pretrained, str):
        return _in_memory(pretrained, values, given)
    return _load(pretrained, values, given, device)


def zoom_settings(
    engine: ZoomModel, values: Mapping[str, Any], given: Mapping[str, Any]
) -> ZoomConfig:
    """The engine's own ZoomConfig with what the user or the preset changed, but the threshold."""
    chosen = {*given, *PRESETS.get(values["preset"], {})} & set(ZOOM_ARGUMENTS)
    return replace(engine.zoom, **{name: values[name] for name in chosen})


def _in_memory(model: Any, values: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    if not hasattr(model, "ask_batch"):
        raise ValueError(
            "pretrained must be a folder, a hub id, tiny or a ZoomModel, got a "
            f"{type(model).__name__}"
        )
    late = [name for name in given if name in _LOADING]
    if "proposer" in given and values["proposer"] not in ("box", model.proposer):
        late.append("proposer")
    if late:
        raise ValueError(f"{', '.join(late)}: set when the ZoomModel was made; leave it out here")
    return model


def _load(
    pretrained: str, values: Mapping[str, Any], given: Mapping[str, Any], device: torch.device
) -> ZoomModel:
    places = sources(values)
    rpn = places["rpn"]
    if pretrained == TINY:
        logger.info("pretrained=tiny: the embedded model, made for the task tiny_vstar")
    elif rpn and values["rpn"] is None:
        logger.info(f"rpn={rpn}, as published by the paper's authors")
    # The embedded model's answers are promised in float32, on every device.
    dtype = "float32" if pretrained == TINY and values["dtype"] == "auto" else values["dtype"]
    names = ("attn_implementation", "device_map", "padding", "prefix_cache", "revision", "peft")
    names += ("load_in_4bit", "system_prompt", "rpn_revision")
    options = {n: values[n] for n in names if values[n] is not None}
    if "padding" not in {*given, *PRESETS.get(values["preset"], {})}:
        del options["padding"]  # the model's own, where its config.json notes one
    # With given boxes nobody is asked where to look.
    proposer = "none" if values["proposer"] == "box" else values["proposer"]
    try:
        return ZoomModel.from_pretrained(
            places["pretrained"] or pretrained,
            rpn,
            proposer=proposer,
            dtype=dtype,
            device=device,
            **options,
        )
    except OSError as error:
        raise ValueError(
            f"pretrained={pretrained}{f' with rpn={rpn}' if rpn else ''} cannot be loaded: {error}"
            "\nGive folders with the weights, or pretrained=tiny (the embedded model) for a first "
            "try."
        ) from error


def sources(values: Mapping[str, Any]) -> dict[str, str | None]:
    """Where the weights are, by what they are for: `pretrained`, `rpn`, `peft`; all None for a
    model in memory, `rpn` None for a proposer that needs none. Raises ValueError where no RPN is
    known for the base, or `pretrained` is a path without a folder."""
    pretrained, rpn, peft = values["pretrained"], values["rpn"], values["peft"]
    if not isinstance(pretrained, str):
        return {"pretrained": None, "rpn": None, "peft": None}
    try:
        folder, rpn = resolve(pretrained, rpn)
    except ValueError as error:
        raise ValueError(
            f"{error}; pretrained=tiny (the embedded model) is for a first try"
        ) from None
    if values["proposer"] == "rpn" and rpn is None:
        rpn = PUBLISHED_RPN.get(pretrained)
        if rpn is None:
            raise ValueError(
                f"no RPN is known for pretrained={pretrained}. Give rpn=FOLDER of one trained with "
                "`sdrpn train`, proposer=attention (needs no training) or proposer=none (stock "
                "LLaVA); or pretrained=tiny (the embedded model) for a first try."
            )
    return {"pretrained": folder, "rpn": rpn, "peft": peft}


def revisions(values: Mapping[str, Any]) -> dict[str, str | None]:
    """Branch, tag or commit of what `sources` names, where it is of the Hub."""
    return {"pretrained": values["revision"], "rpn": values["rpn_revision"]}
