"""Makes a ZoomModel from validated arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from loguru import logger

from sdrpn.config import ZoomConfig
from sdrpn.engine import ZoomModel
from sdrpn.model_registry import PUBLISHED_RPN, resolve
from sdrpn_eval.args import ZOOM_ARGUMENTS, ModelArguments

EMBEDDED = {"tiny": "tiny_vstar", "tiny-trio": "tiny_trio"}
"""The embedded models, and the task that each was made for."""

_OPTIONS = ("attn_implementation", "device_map", "padding", "prefix_cache", "revision", "peft")
_OPTIONS += ("load_in_4bit", "system_prompt", "rpn_revision", "min_pixels", "max_pixels")
"""Arguments that `ZoomModel.from_pretrained` takes under the same name."""

_SET_BEFORE = (*_OPTIONS, "rpn", "dtype", "device")


def load_engine(args: ModelArguments, device: torch.device) -> ZoomModel:
    """Loads the engine, or returns it if `pretrained` is one in memory.

    Raises:
        ValueError: If weights are missing or arguments contradict a model in memory; names the
            arguments to change.
    """
    return _load(args, device) if isinstance(args.pretrained, str) else _in_memory(args)


def zoom_settings(engine: ZoomModel, args: ModelArguments) -> ZoomConfig:
    """The engine's ZoomConfig with the changes by `zoom=FILE`, preset and user.

    The threshold is that of each task, see `SdrpnModel._zoom`.
    """
    chosen = args.model_fields_set & set(ZOOM_ARGUMENTS)
    return replace(engine.zoom, **{name: getattr(args, name) for name in chosen})


def _in_memory(args: ModelArguments) -> Any:
    model = args.pretrained
    if not hasattr(model, "ask_batch"):
        raise ValueError(
            "pretrained must be a folder, a hub id, tiny or a ZoomModel, got a "
            f"{type(model).__name__}"
        )
    late = [n for n in type(args).model_fields if n in args.given and n in _SET_BEFORE]
    if "proposer" in args.given and args.proposer not in ("box", model.proposer):
        late.append("proposer")
    if late:
        raise ValueError(f"{', '.join(late)}: set when the ZoomModel was made; leave it out here")
    return model


def _load(args: ModelArguments, device: torch.device) -> ZoomModel:
    places = sources(args)
    pretrained, rpn = args.pretrained, places["rpn"]
    if pretrained in EMBEDDED:
        logger.info(f"pretrained={pretrained}: embedded, made for the task {EMBEDDED[pretrained]}")
    elif rpn and args.rpn is None:
        logger.info(f"rpn={rpn}, as published by the paper's authors")
    # The documented answers of the embedded models are in float32, on every device.
    dtype = "float32" if pretrained in EMBEDDED and args.dtype == "auto" else args.dtype
    options = {n: v for n in _OPTIONS if (v := getattr(args, n, None)) is not None}
    if "padding" not in args.model_fields_set:
        options.pop("padding", None)  # the model's own, where its config.json notes one
    # With given boxes there is nothing to propose.
    proposer = "none" if args.proposer == "box" else args.proposer
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


def sources(args: ModelArguments) -> dict[str, str | None]:
    """Where the weights are, by what they are for: `pretrained`, `rpn`, `peft`.

    All are None for a model in memory, `rpn` is None for a proposer that needs none.

    Raises:
        ValueError: Where no RPN is known for the base, or `pretrained` is a path without a folder.
    """
    pretrained, rpn = args.pretrained, args.rpn
    if not isinstance(pretrained, str):
        return {"pretrained": None, "rpn": None, "peft": None}
    try:
        folder, rpn = resolve(pretrained, rpn)
    except ValueError as error:
        raise ValueError(
            f"{error}; pretrained=tiny (the embedded model) is for a first try"
        ) from None
    if args.proposer == "rpn" and rpn is None:
        rpn = PUBLISHED_RPN.get(pretrained)
        if rpn is None:
            raise ValueError(
                f"no RPN is known for pretrained={pretrained}. Give rpn=FOLDER of one trained with "
                "`sdrpn train`, proposer=attention (needs no training) or proposer=none (stock); "
                "or pretrained=tiny (the embedded model) for a first try."
            )
    return {"pretrained": folder, "rpn": rpn, "peft": args.peft}


def revisions(args: ModelArguments) -> dict[str, str | None]:
    """Branch, tag or commit of what `sources` names, where it is of the Hub."""
    return {"pretrained": args.revision, "rpn": args.rpn_revision}
