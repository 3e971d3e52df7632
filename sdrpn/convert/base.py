"""Convert a LLaVA-1.5, or a LoRA fine-tune of one, from the original to the Hugging Face layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from sdrpn.config import ASPECT_RATIO, IMAGE_TOKEN
from sdrpn.convert import lora
from sdrpn.convert.original_layout import PROJECTOR, check_parts, read_config
from sdrpn.convert.tokenizer import read_tokenizer
from sdrpn.io import hub
from sdrpn.io.atomic import apply_umask
from sdrpn.io.checkpoint_files import (
    Source,
    Weights,
    first_line,
    read_all,
)
from sdrpn.io.checkpoints import check_finite, explain_load_errors
from sdrpn.io.weight_maps import Names, base_names, rename, require
from sdrpn.rpn.published import tower_of

SHARD = "5GB"
VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, as in published conversions: 32000 -> 32064."""

TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
"""Keys of the language model in config.json, which are the same in transformers."""

TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
"""Prefix of the CLIP tensors in the original layout."""


def convert_base(
    source: str, out: Path, *, base: str | None = None, vision_tower: str | None = None
) -> None:
    """Write model, tokenizer and image processor for transformers and `Llava15.load`.

    Args:
        source: Folder or Hub id of the checkpoint.
        out: Folder to write.
        base: Folder or Hub id of the model that a LoRA fine-tune or projector was trained on.
        vision_tower: Folder or Hub id of the CLIP; by default the one that config.json names.

    Raises:
        ValueError: If the checkpoint is of another kind or a tensor does not match.
        FileNotFoundError: If a file is missing.
    """
    folder = Source(source)
    # Everything that can be missing is checked before the weights are read.
    check_parts(folder, base)
    config = read_config(folder, base)
    tokenizer = read_tokenizer(folder, base)
    tower = vision_tower or tower_of(config, folder)
    images = _from_tower(CLIPImageProcessor, tower)
    model = read_base(source, base=base, vision_tower=vision_tower)
    grow_vocabulary(model, tokenizer)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, max_shard_size=SHARD)
    for path in out.glob("*.safetensors"):
        apply_umask(path)
    processor.save_pretrained(out)


def read_base(source: str, *, base: str | None = None, vision_tower: str | None = None) -> Any:
    """Load the model with its original vocabulary; arguments and errors as in `convert_base`.

    Returns:
        A LlavaForConditionalGeneration on the CPU, in the dtype of the checkpoint.
    """
    folder = Source(source)
    check_parts(folder, base)
    own = read_config(folder, base)
    tower = vision_tower or tower_of(own, folder)
    vision = _from_tower(CLIPVisionConfig, tower)
    with explain_load_errors(source):
        config: Any = _model_config(own, vision)
    layers = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
    names = base_names(*layers, rpn_depth=own.get("twig_T") or 0)
    tensors = _tensors(folder, base, names, tower)
    ours = {to: tensors[name] for name, to in rename(tensors, names, source).items()}
    with init_empty_weights(), explain_load_errors(source):
        model = LlavaForConditionalGeneration(config)
    _check(ours, model.state_dict(), names, source)
    check_finite(ours.items(), source)
    dtype = _main_dtype(ours)
    model.load_state_dict({k: t.to(dtype) for k, t in ours.items()}, assign=True)
    model.config.dtype = dtype
    return model.eval()


def _model_config(own: Mapping[str, Any], vision: Any) -> LlavaConfig:
    text = {key: own[key] for key in TEXT_KEYS if own.get(key) is not None}
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        vision_feature_layer=own.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        # The vocabulary has no image token yet, so an id beyond its end.
        image_token_index=text["vocab_size"],
        # Under its original name, which `Llava15` reads to preprocess images as in training.
        **{ASPECT_RATIO: own[ASPECT_RATIO]},
    )


def _tensors(folder: Source, base: str | None, names: Names, tower: str) -> dict[str, Tensor]:
    """Load the tensors under their original names: a partial checkpoint merged into its base, and
    the weights of the CLIP if the checkpoint has no vision tower."""
    weights = Weights(Source(base) if base is not None else folder)
    tensors = weights.load(rename(weights.names, names, weights.source.name))
    tuned = base is not None and lora.is_lora(folder)
    if tuned:
        tensors |= lora.non_lora_tensors(folder)
    elif base is not None:
        tensors |= read_all(folder.fetch(PROJECTOR))
    if not any(name.startswith(TOWER_PREFIX) for name in tensors):
        # Before the merge, since the adapter may change the tower.
        tensors |= _tower_tensors(tower)
    return lora.merge(tensors, folder) if tuned else tensors


def _tower_tensors(tower: str) -> dict[str, Tensor]:
    """Weights of a CLIP under the names of the vision tower in the original layout."""
    model = _from_tower(CLIPVisionModel, tower)
    state = {name.removeprefix("vision_model."): t for name, t in model.state_dict().items()}
    return {f"{TOWER_PREFIX}{name}": tensor for name, tensor in state.items()}


def _from_tower(kind: Any, tower: str) -> Any:
    try:
        with explain_load_errors(tower):
            return kind.from_pretrained(tower)
    except OSError as error:
        cause = hub.explain(error, tower) or first_line(error)
        raise FileNotFoundError(
            f"cannot load the vision tower {tower} ({cause}); give its folder or Hub id with "
            "--vision-tower"
        ) from None


def _check(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Names, source: str
) -> None:
    """Check names and shapes against the model; errors use the names in the checkpoint."""
    theirs = {to: name for name, to in names.items() if to is not None}
    held = {theirs.get(name, name) for name in ours}
    hint = "; a pruned model cannot be a base: convert the full one"
    require(held, (theirs.get(name, name) for name in expected), source, hint)
    for name, tensor in ours.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source}: {theirs.get(name, name)} has the shape {list(tensor.shape)}, but "
                f"config.json asks for {list(expected[name].shape)}"
            )


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most weights, so a float32 projector does not upcast the whole model."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def grow_vocabulary(model: Any, tokenizer: Any) -> None:
    """Add embeddings for the image and padding tokens, as published conversions do.

    The new rows are the mean of the others, so their logits are never the largest and greedy
    decoding never produces them.

    Args:
        model: LlavaForConditionalGeneration, changed in place.
        tokenizer: Tokenizer that has these tokens.
    """
    before = model.config.text_config.vocab_size
    size = max(before, len(tokenizer))
    model.resize_token_embeddings(size, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = table.weight.data
        rows[before:] = rows[:before].float().mean(0).to(rows.dtype)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for config in (model.config, model.config.text_config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
