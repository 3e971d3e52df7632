"""Merge a LoRA fine-tune of the original LLaVA code into its base (W + alpha / r * B A)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdrpn.io.atomic import read_object
from sdrpn.io.checkpoint_files import Source, Weights, read_all

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"
"""The projector and other modules that were trained without LoRA."""

PREFIX = "base_model.model."
"""Prefix that PEFT adds to every name."""

UNSUPPORTED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
"""LoRA settings that LLaVA's code never sets and the plain formula does not cover."""


def is_lora(source: Source) -> bool:
    """Whether a checkpoint is a LoRA adapter."""
    return source.find(CONFIG_FILE) is not None


def base_of(source: Source) -> str | None:
    """Return the base model that adapter_config.json names, or None."""
    path = source.find(CONFIG_FILE)
    named = read_object(path).get("base_model_name_or_path") if path is not None else None
    return named if isinstance(named, str) and named else None


def non_lora_tensors(source: Source) -> dict[str, Tensor]:
    """Load the tensors that were trained without LoRA, under the names of the base."""
    path = source.find(NON_LORA_FILE)
    return {_plain(n): t for n, t in read_all(path).items()} if path else {}


def merge(tensors: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Add the low-rank updates of a fine-tune to the tensors of its base.

    Args:
        tensors: Tensors of the base, overridden by `non_lora_tensors`.
        source: The fine-tune.

    Returns:
        The merged tensors, under the names and in the dtypes of the base.

    Raises:
        ValueError: If a setting is unsupported, or a tensor is unknown, unpaired or of another
            shape.
    """
    scale = _scale(read_object(source.fetch(CONFIG_FILE, "a LoRA fine-tune")), source)
    merged = dict(tensors)
    weights = Weights(source, ADAPTER_FILES)
    changes = weights.load(weights.names)
    for stem in sorted({name.rpartition(".lora_")[0] for name in changes if ".lora_" in name}):
        target = f"{_plain(stem)}.weight"
        if "language_model." in target or "multi_modal_projector." in target:
            raise ValueError(
                f"{source.name} is an adapter of a model in the Hugging Face layout (it changes "
                f"{target}) and needs no conversion: pass it as peft="
            )
        if target not in merged:
            raise ValueError(f"{source.name} changes {target}, which its base does not have")
        a, b = (changes.pop(f"{stem}.lora_{x}.weight", None) for x in "AB")
        merged[target] = _added(merged[target], a, b, scale, f"{source.name}: {stem}")
    if changes:
        raise ValueError(
            f"{source.name} holds a tensor {next(iter(changes))}, which is no LoRA weight"
        )
    return merged


def _added(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, where: str) -> Tensor:
    """weight [out, in] + scale * b [out, r] @ a [r, in], computed in float32."""
    if a is None or b is None:
        raise ValueError(f"{where} lacks its lora_{'A' if a is None else 'B'}.weight")
    if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{where} has the shapes {list(b.shape)} and {list(a.shape)}, which do not fit "
            f"{list(weight.shape)}"
        )
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def _scale(config: Mapping[str, Any], source: Source) -> float:
    found = [key for key in UNSUPPORTED if config.get(key)]
    if found or config.get("peft_type", "LORA") != "LORA":
        key = found[0] if found else "peft_type"
        what = f"{key} {config[key]!r}"
        raise ValueError(f"{source.name}: {CONFIG_FILE} has {what}; only plain LoRA can be merged")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(
            f"{source.name}: {CONFIG_FILE} needs r and lora_alpha, got {rank}, {alpha}"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _plain(name: str) -> str:
    """The name in the base, without PEFT's prefix."""
    return name.removeprefix(PREFIX)
