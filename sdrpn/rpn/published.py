"""Reading RPN checkpoints in the layouts of the paper's authors (docs/method.md).

A checkpoint is a full model with an RPN ("filled"), or one without the upper layers. Only
config.json, the index and the shards with RPN tensors are fetched.
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
"""Values of `model_type` in the original LLaVA layout."""

BASES = {
    4096: ("llava-hf/llava-1.5-7b-hf", 32),
    5120: ("llava-hf/llava-1.5-13b-hf", 40),
}
"""Base model and its number of layers, by hidden size; num_hidden_layers of a pruned checkpoint may
count only the remaining layers."""

MAX_SIZE = 1 << 20
"""Upper limit for sizes in a config.json."""

LLAVA15_IMAGE_TOKENS = 576
"""Image tokens of CLIP ViT-L/14 at 336 px, LLaVA-1.5's vision tower."""


def is_published(values: Mapping[str, Any]) -> bool:
    """Return whether a config.json is in a layout of the authors, with or without an RPN."""
    known = (*LLAVA_TYPES, Qwen25VL.model_type)
    return values.get("model_type") in known or any(key.startswith("twig_") for key in values)


def read_config(values: Mapping[str, Any], source: Source) -> RPNConfig:
    """Convert the config.json of a published checkpoint.

    Args:
        values: Values of config.json.
        source: The checkpoint.

    Raises:
        ValueError: If a key is missing or invalid.
    """
    is_qwen = values.get("model_type") == Qwen25VL.model_type
    if "twig_K" not in values and "twig_T" not in values:
        what = "Qwen2.5-VL" if is_qwen else "LLaVA"
        raise ValueError(
            f"{source.name} is a {what} without an RPN: its {CONFIG_FILE} has no twig_K and twig_T"
        )
    # transformers 5 writes the sizes of Qwen's language model to text_config.
    values = {**values, **(values.get("text_config") or {})} if is_qwen else values
    roi_source = values.get("roi_source", "qk")
    if roi_source != "qk":
        raise ValueError(
            f"{source.name}: roi_source is {roi_source!r} in {CONFIG_FILE}; only 'qk' (products "
            "of queries and keys) is supported"
        )
    heads = _integer(values, "num_attention_heads", source)
    hidden = _integer(values, "hidden_size", source)
    if hidden % heads:
        raise ValueError(f"{source.name}: hidden_size {hidden} is not a multiple of {heads} heads")
    family = _qwen25_vl(hidden) if is_qwen else _llava15(hidden, values, source)
    return RPNConfig(
        hidden_size=hidden,
        intermediate_size=_integer(values, "intermediate_size", source),
        num_attention_heads=heads,
        # Models without grouped-query attention may omit it.
        num_key_value_heads=_integer(
            {"num_key_value_heads": heads} | dict(values), "num_key_value_heads", source
        ),
        rms_norm_eps=_value(values, "rms_norm_eps", float, source),
        branch_layer=_integer(values, "twig_K", source, MAX_LAYERS),
        depth=_integer(values, "twig_T", source, MAX_LAYERS),
        multi_head=_value(values, "roi_multi_head", bool, source),
        **family,
    )


def _llava15(hidden: int, values: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return the config fields specific to LLaVA-1.5."""
    base, layers = BASES.get(hidden, ("", 0))
    return {
        "image_tokens": image_tokens(values, source),
        "base_model": base,
        "zoom": ZoomConfig(threshold=0.15, policy="mask"),
        "labels": published_labels(layers, hidden),
        "padding": NOTED_PADDINGS.get(str(values.get(ASPECT_RATIO)), ""),
    }


def _qwen25_vl(hidden: int) -> dict[str, Any]:
    """Return the config fields specific to Qwen2.5-VL."""
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
    """Read the RPN's tensors and rename them.

    Args:
        source: The checkpoint.
        config: Config of the RPN.
        shapes: Expected shapes, by our names.

    Returns:
        Tensors by our names.

    Raises:
        ValueError: If a tensor is unknown, missing or of another shape; names it as in the
            checkpoint.
        FileNotFoundError: If a file is missing.
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
    """Return the vision tower of a published checkpoint.

    Args:
        values: Values of config.json.
        source: The checkpoint.

    Returns:
        A folder, which may be in the checkpoint, or a Hub id.

    Raises:
        ValueError: If config.json has no vision tower.
    """
    tower = _value(values, "mm_vision_tower", str, source)
    inside = source.folder / tower if source.folder else None
    return str(inside) if inside is not None and inside.is_dir() else tower


def image_tokens(values: Mapping[str, Any], source: Source) -> int:
    """Compute the number of image tokens from the vision tower's config or name.

    Args:
        values: Values of config.json.
        source: The checkpoint.

    Returns:
        Image tokens; 576 if neither the tower's config nor its name has sizes.
    """
    tower = values.get("mm_vision_tower") and tower_of(values, source)
    if not tower:
        return LLAVA15_IMAGE_TOKENS
    config = Path(tower) / CONFIG_FILE
    if config.is_file():
        read = read_object(config)
        read = read.get("vision_config", read)
        side, patch = read.get("image_size"), read.get("patch_size")
    else:
        # Such as clip-vit-large-patch14-336, a Hub id or the end of a path.
        match = re.search(r"patch(\d+)-(\d+)", tower)
        patch, side = map(int, match.groups()) if match else (None, None)
    if not isinstance(side, int) or not isinstance(patch, int) or patch < 1:
        return LLAVA15_IMAGE_TOKENS
    return (side // patch) ** 2


def _value(values: Mapping[str, Any], key: str, kind: type, source: Source) -> Any:
    """Read a value of a type from config.json; raise ValueError if it is missing or another."""
    if key not in values:
        raise ValueError(f"{source.name}: {CONFIG_FILE} has no {key}")
    value = values[key]
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise ValueError(
            f"{source.name}: {key} in {CONFIG_FILE} must be a {kind.__name__}, got {value!r}"
        )
    return value


def _integer(values: Mapping[str, Any], key: str, source: Source, limit: int = MAX_SIZE) -> int:
    value = _value(values, key, int, source)
    if not 1 <= value <= limit:
        raise ValueError(f"{source.name}: {key} in {CONFIG_FILE} must be 1 to {limit}, got {value}")
    return value
