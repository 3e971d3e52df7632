"""Recognise checkpoints in the original LLaVA layout: full models, LoRA fine-tunes, projectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdrpn.backbones.llava15 import check_is_llava15, check_not_llava16, noted_padding
from sdrpn.config import ASPECT_RATIO
from sdrpn.convert import lora
from sdrpn.io.atomic import read_object
from sdrpn.io.checkpoint_files import CONFIG_FILE, INDEXES, SINGLE_FILES, Source
from sdrpn.io.checkpoints import MAX_LAYERS
from sdrpn.rpn.published import LLAVA_TYPES

LLAVA15_SETTINGS: Mapping[str, Any] = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "tie_word_embeddings": False,
}
"""Values in config.json that distinguish LLaVA-1.5 from its relatives."""

PROJECTOR = "mm_projector.bin"
"""File that LLaVA's pretraining saves: the projector alone, without its language model."""


def check_parts(folder: Source, base: str | None) -> None:
    """Check that a partial checkpoint comes with its base, and a full model without one.

    Args:
        folder: Full model, LoRA fine-tune or projector.
        base: Folder or Hub id of the base model.

    Raises:
        ValueError: If `base` is missing, superfluous, or in another layout.
    """
    part = _part_of(folder)
    if part is None:
        if base is not None:
            raise ValueError(f"{folder.name} is a full model, not a LoRA fine-tune: omit --base")
        return
    kind, example = part
    if base is None:
        named = lora.base_of(folder)
        hint = f" ({lora.CONFIG_FILE} names {named!r})" if named else f", such as {example}"
        raise ValueError(
            f"{folder.name} is a {kind}: set --base to the model it was trained on{hint}"
        )
    base_source = Source(base)
    if lora.is_lora(base_source):
        raise ValueError(
            f"--base {base} is a LoRA fine-tune itself: convert it first, or give the full model "
            "it was trained on"
        )
    if _is_hugging_face(_config_of(base_source)):
        raise ValueError(
            f"--base {base} is in the Hugging Face layout, {folder.name} in the original one: give "
            f"the base in the original layout, such as {example}; an adapter trained on the "
            "Hugging Face model needs no conversion, pass it as peft="
        )


def _part_of(folder: Source) -> tuple[str, str] | None:
    """(description, example of a base) of a partial checkpoint; None for a full model."""
    if lora.is_lora(folder):
        return f"LoRA fine-tune (it has {lora.CONFIG_FILE})", "liuhaotian/llava-v1.5-7b"
    if folder.find(PROJECTOR) and not any(map(folder.find, (*INDEXES, *SINGLE_FILES))):
        return f"pretrained projector without a model ({PROJECTOR})", "lmsys/vicuna-7b-v1.5"
    return None


def _config_of(source: Source) -> dict[str, Any]:
    """config.json, or an empty dictionary if there is none."""
    path = source.find(CONFIG_FILE)
    return read_object(path) if path is not None else {}


def _is_hugging_face(config: Mapping[str, Any]) -> bool:
    return "vision_config" in config or "text_config" in config


def read_config(folder: Source, base: str | None = None) -> dict[str, Any]:
    """Read config.json of a LLaVA-1.5 in the original layout.

    Args:
        folder: Full or partial checkpoint.
        base: Folder or Hub id whose config.json is read if `folder` has none.

    Raises:
        ValueError: If it describes another model or layout.
    """
    if base is not None and folder.find(CONFIG_FILE) is None:
        folder = Source(base)
    config = folder.config("a LLaVA in the original layout")
    check_not_llava16(config, folder.name)
    if _is_hugging_face(config) and config.get("model_type") not in LLAVA_TYPES:
        check_is_llava15(config, folder.name)
    if "mm_vision_tower" not in config or config.get("model_type") not in LLAVA_TYPES:
        if _is_hugging_face(config):
            raise ValueError(
                f"{folder.name} is already in the Hugging Face layout: use it without conversion"
            )
        lacks = "" if "mm_vision_tower" in config else " without mm_vision_tower"
        raise ValueError(
            f"{folder.name} is not a LLaVA in the original layout: its config.json has model_type "
            f"{config.get('model_type')!r}{lacks}; give a LLaVA-1.5 such as "
            "liuhaotian/llava-v1.5-7b"
        )
    for key, value in LLAVA15_SETTINGS.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{folder.name} is not a LLaVA-1.5: {key} is {config[key]!r}, not {value!r}"
            )
    missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers") if k not in config]
    if missing:
        raise ValueError(f"{folder.name}: config.json has no {missing[0]}")
    for key in ("num_hidden_layers", "twig_T"):
        count = config.get(key, 0)
        if type(count) is not int or not 0 <= count <= MAX_LAYERS:
            raise ValueError(f"{folder.name}: {key} must be up to {MAX_LAYERS}, got {count!r:.80}")
    # LLaVA's own code pads only if the config says so.
    config[ASPECT_RATIO] = config.get(ASPECT_RATIO) or "square"
    noted_padding(config, folder.name)
    return config
