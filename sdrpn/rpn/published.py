"""The RPN checkpoints published by the paper's authors, read as they are (docs/method.md).

A whole model with the RPN inside ("filled"), or one whose upper layers are gone: either way only
config.json, the index and the shards that hold the RPN are fetched and read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from sdrpn.backbones import qwen25_vl_published as qwen
from sdrpn.backbones.qwen25_vl import HEAD, Qwen25VL
from sdrpn.config import (
    ASPECT_RATIO,
    NOTED_PADDINGS,
    RPNConfig,
    ZoomConfig,
    published_labels,
)
from sdrpn.io.atomic import read_object
from sdrpn.io.checkpoint_files import CONFIG_FILE, Source, Weights
from sdrpn.io.checkpoints import MAX_LAYERS
from sdrpn.io.weight_maps import rename, require, rpn_names

LLAVA_TYPES = ("llava", "llava_llama")
"""What original LLaVA calls itself in config.json, over the years."""

BASES = {
    4096: ("llava-hf/llava-1.5-7b-hf", 32),
    5120: ("llava-hf/llava-1.5-13b-hf", 40),
}
"""By hidden size, the base model of a published RPN and its layers: a pruned checkpoint's own
num_hidden_layers may count those that were kept."""

LARGEST = 1 << 20
"""More than any size in a config.json."""

LLAVA15_IMAGE_TOKENS = 576
"""Of CLIP ViT-L/14 at 336 px, LLaVA-1.5's only vision tower."""


def is_published(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of the authors' layouts, RPN inside or not."""
    known = (*LLAVA_TYPES, Qwen25VL.model_type)
    return values.get("model_type") in known or any(key.startswith("twig_") for key in values)


def read_config(values: Mapping[str, Any], source: Source) -> RPNConfig:
    """config.json of a published checkpoint -> ours.

    Raises ValueError that names the key which is missing or does not fit.
    """
    is_qwen = values.get("model_type") == Qwen25VL.model_type
    if "twig_K" not in values and "twig_T" not in values:
        what = "Qwen2.5-VL" if is_qwen else "LLaVA"
        raise ValueError(
            f"{source.name} is a {what} without an RPN: its {CONFIG_FILE} has no twig_K and twig_T"
        )
    # transformers 5 writes the sizes of Qwen's language model into an object of their own.
    values = {**values, **(values.get("text_config") or {})} if is_qwen else values
    source_of_map = values.get("roi_source", "qk")
    if source_of_map != "qk":
        raise ValueError(
            f"{source.name}: roi_source is {source_of_map!r} in {CONFIG_FILE}; only maps made of "
            "queries and keys (qk) are known"
        )
    heads = _number(values, "num_attention_heads", source)
    hidden = _number(values, "hidden_size", source)
    if hidden % heads:
        raise ValueError(f"{source.name}: hidden_size {hidden} is not a multiple of {heads} heads")
    family = _qwen25_vl(hidden) if is_qwen else _llava15(hidden, values, source)
    return RPNConfig(
        hidden_size=hidden,
        intermediate_size=_number(values, "intermediate_size", source),
        num_attention_heads=heads,
        # Left out by models whose heads all have keys of their own.
        num_key_value_heads=_number(
            {"num_key_value_heads": heads} | dict(values), "num_key_value_heads", source
        ),
        rms_norm_eps=_need(values, "rms_norm_eps", float, source),
        branch_layer=_number(values, "twig_K", source, MAX_LAYERS),
        depth=_number(values, "twig_T", source, MAX_LAYERS),
        multi_head=_need(values, "roi_multi_head", bool, source),
        **family,
    )


def _llava15(hidden: int, values: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """What an RPN for LLaVA-1.5 has of its own."""
    base, layers = BASES.get(hidden, ("", 0))
    return {
        "image_tokens": image_tokens(values, source),
        "base_model": base,
        "zoom": ZoomConfig(threshold=0.15, policy="mask"),
        "labels": published_labels(layers, hidden),
        "padding": NOTED_PADDINGS.get(str(values.get(ASPECT_RATIO)), ""),
    }


def _qwen25_vl(hidden: int) -> dict[str, Any]:
    """What an RPN for Qwen2.5-VL has of its own."""
    size = qwen.size_of(hidden)
    return {
        "backbone": Qwen25VL.model_type,
        "image_tokens": None,
        **HEAD,
        "base_model": size.base if size else "",
        "zoom": ZoomConfig(threshold=qwen.THRESHOLD, policy="mask"),
        "labels": size.labels if size else None,
    }


def read_tensors(
    source: Source, config: RPNConfig, shapes: Mapping[str, Size]
) -> dict[str, Tensor]:
    """The RPN's tensors under our names.

    config: of the RPN. shapes: what our RPN of that config holds. Raises ValueError that names, as
    the checkpoint does, a tensor that is unknown, missing or of another shape; FileNotFoundError
    for a missing file.
    """
    weights = Weights(source)
    names = rpn_names(config.depth, biases=config.head_bias, norm=config.final_norm)
    found = rename((n for n in weights.names if "twig" in n), names, source.name)
    require(found, (theirs for theirs, ours in names.items() if ours is not None), source.name)
    tensors = weights.load(found)
    for theirs, ours in found.items():
        if tensors[theirs].shape != shapes[ours]:
            raise ValueError(
                f"{source.name}: {theirs} has the shape {list(tensors[theirs].shape)}, but "
                f"{CONFIG_FILE} asks for {list(shapes[ours])}"
            )
    return {ours: tensors[theirs] for theirs, ours in found.items()}


def tower_of(values: Mapping[str, Any], source: Source) -> str:
    """The CLIP that a config.json names: a folder, also one inside the checkpoint, or a hub id."""
    tower = _need(values, "mm_vision_tower", str, source)
    inside = source.folder / tower if source.folder else None
    return str(inside) if inside is not None and inside.is_dir() else tower


def image_tokens(values: Mapping[str, Any], source: Source) -> int:
    """Image tokens that the vision tower gives, from its folder or else its name; else 576."""
    tower = values.get("mm_vision_tower") and tower_of(values, source)
    if not tower:
        return LLAVA15_IMAGE_TOKENS
    config = Path(tower) / CONFIG_FILE
    if config.is_file():
        read = read_object(config)
        read = read.get("vision_config", read)
        side, patch = read.get("image_size"), read.get("patch_size")
    else:
        # As in clip-vit-large-patch14-336; a path on the authors' machine ends like that too.
        told = re.search(r"patch(\d+)-(\d+)", tower)
        patch, side = map(int, told.groups()) if told else (None, None)
    if not isinstance(side, int) or not isinstance(patch, int) or patch < 1:
        return LLAVA15_IMAGE_TOKENS
    return (side // patch) ** 2


def _need(values: Mapping[str, Any], key: str, kind: type, source: Source) -> Any:
    """A value of config.json, of its kind; ValueError names the key where it is not so."""
    if key not in values:
        raise ValueError(f"{source.name}: {CONFIG_FILE} has no {key}")
    value = values[key]
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise ValueError(
            f"{source.name}: {key} in {CONFIG_FILE} must be a {kind.__name__}, got {value!r}"
        )
    return value


def _number(values: Mapping[str, Any], key: str, source: Source, most: int = LARGEST) -> int:
    value = _need(values, key, int, source)
    if not 1 <= value <= most:
        raise ValueError(f"{source.name}: {key} in {CONFIG_FILE} must be 1 to {most}, got {value}")
    return value
