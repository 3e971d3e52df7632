"""A LLaVA-1.5 in its authors' layout, or a LoRA fine-tune of one, -> the Hugging Face layout."""

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

from sdrpn.backbones.llava15 import check_is_llava15, check_not_llava16, noted_padding
from sdrpn.config import ASPECT_RATIO, IMAGE_TOKEN
from sdrpn.convert import lora
from sdrpn.convert.tokenizer import read_tokenizer
from sdrpn.io import hub
from sdrpn.io.atomic import apply_umask, read_object
from sdrpn.io.checkpoint_files import (
    CONFIG_FILE,
    INDEXES,
    SINGLE_FILES,
    Source,
    Weights,
    first_line,
    read_all,
)
from sdrpn.io.checkpoints import MAX_LAYERS, check_finite, explain_load_errors
from sdrpn.io.weight_maps import Names, base_names, rename, require
from sdrpn.rpn.published import LLAVA_TYPES, tower_of

SHARD = "5GB"
VOCABULARY_MULTIPLE = 64
"""The vocabulary grows to a multiple of this, as in the published conversions: 32000 -> 32064."""

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
"""What config.json says of the language model, under the names that transformers still uses."""

LIKE_LLAVA15: Mapping[str, Any] = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "tie_word_embeddings": False,
}
"""Settings that make a LLaVA a 1.5; one with others computes something else."""

TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
"""What original LLaVA puts before the names of its CLIP."""

PROJECTOR = "mm_projector.bin"
"""What LLaVA's pretraining leaves: the projector, for any folder with its language model."""


def convert_base(
    source: str, out: Path, *, base: str | None = None, vision_tower: str | None = None
) -> None:
    """Write a folder that transformers and `Llava15.load` read: model, tokenizer, image processor.

    source: folder or hub id. base: for a LoRA fine-tune, what it was trained on. vision_tower: the
    CLIP's folder or hub id, where config.json names one that is not to be had. Raises ValueError
    or FileNotFoundError that names what is missing or does not fit.
    """
    folder = Source(source)
    # The dear part last: everything that can be missing is asked for first.
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
    """The model, weights and all, with the vocabulary it came with; arguments as in convert_base.

    Returns a LlavaForConditionalGeneration on the CPU, in the checkpoint's own precision.
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


def check_parts(folder: Source, base: str | None) -> None:
    """Refuse a part of a model without the base it belongs to, and a base that fits no part.

    folder: a whole model, a LoRA fine-tune, or a projector alone. Raises ValueError that names what
    it is and what to do.
    """
    part = _part_of(folder)
    if part is None:
        if base is not None:
            raise ValueError(
                f"{folder.name} is a whole model: it is no LoRA fine-tune, leave --base out"
            )
        return
    kind, example = part
    if base is None:
        named = lora.base_of(folder)
        hint = f" ({lora.CONFIG_FILE} names {named!r})" if named else f", such as {example}"
        raise ValueError(f"{folder.name} is a {kind}: say with --base what it was trained on{hint}")
    below = Source(base)
    if lora.is_lora(below):
        raise ValueError(
            f"--base {base} is a LoRA fine-tune itself: convert that one first, or give the whole "
            "model it was trained on"
        )
    if _is_hugging_face(_config_of(below)):
        raise ValueError(
            f"--base {base} is in the Hugging Face layout, {folder.name} in the original one: give "
            f"the base in the original layout, such as {example}; an adapter trained on the "
            "Hugging Face model needs no conversion, give it as peft="
        )


def _part_of(folder: Source) -> tuple[str, str] | None:
    """(what a folder is, a base for it); None where it is no part of a model."""
    if lora.is_lora(folder):
        return f"LoRA fine-tune ({lora.CONFIG_FILE} is there)", "liuhaotian/llava-v1.5-7b"
    if folder.find(PROJECTOR) and not any(map(folder.find, (*INDEXES, *SINGLE_FILES))):
        return f"projector alone ({PROJECTOR}), as pretraining leaves it", "lmsys/vicuna-7b-v1.5"
    return None


def _config_of(source: Source) -> dict[str, Any]:
    """config.json, empty where there is none."""
    path = source.find(CONFIG_FILE)
    return read_object(path) if path is not None else {}


def _is_hugging_face(config: Mapping[str, Any]) -> bool:
    return "vision_config" in config or "text_config" in config


def read_config(folder: Source, base: str | None = None) -> dict[str, Any]:
    """config.json of an original-layout LLaVA-1.5, or its base's where a part brings none.

    Raises ValueError that says what else it is.
    """
    if base is not None and folder.find(CONFIG_FILE) is None:
        folder = Source(base)
    config = folder.config("a LLaVA in the original layout")
    check_not_llava16(config, folder.name)
    if _is_hugging_face(config) and config.get("model_type") not in LLAVA_TYPES:
        check_is_llava15(config, folder.name)
    if "mm_vision_tower" not in config or config.get("model_type") not in LLAVA_TYPES:
        there = (
            "is already in the Hugging Face layout: use it as it is"
            if _is_hugging_face(config)
            else (
                f"is no LLaVA in the original layout but {config.get('model_type')!r}"
                + ("" if "mm_vision_tower" in config else ", without mm_vision_tower")
                + " in its config.json; give a LLaVA-1.5 such as liuhaotian/llava-v1.5-7b"
            )
        )
        raise ValueError(f"{folder.name} {there}")
    for key, value in LIKE_LLAVA15.items():
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
    # LLaVA's own code pads only where it is told to.
    config[ASPECT_RATIO] = config.get(ASPECT_RATIO) or "square"
    noted_padding(config, folder.name)
    return config


def _model_config(own: Mapping[str, Any], vision: Any) -> LlavaConfig:
    text = {key: own[key] for key in TEXT_KEYS if own.get(key) is not None}
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        vision_feature_layer=own.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        # Until the vocabulary has one: behind its end, where no text has a token.
        image_token_index=text["vocab_size"],
        # Under the original's name, so that `Llava15` shows images as they were shown in training.
        **{ASPECT_RATIO: own[ASPECT_RATIO]},
    )


def _tensors(folder: Source, base: str | None, names: Names, tower: str) -> dict[str, Tensor]:
    """The model's tensors under the checkpoint's names: a part's merged into its base's, and the
    CLIP's own where no vision tower is among them."""
    weights = Weights(Source(base) if base is not None else folder)
    tensors = weights.load(rename(weights.names, names, weights.source.name))
    tuned = base is not None and lora.is_lora(folder)
    if tuned:
        tensors |= lora.trained_whole(folder)
    elif base is not None:
        tensors |= read_all(folder.fetch(PROJECTOR))
    if not any(name.startswith(TOWER_PREFIX) for name in tensors):
        # Before the merge, which may change them.
        tensors |= _tower_tensors(tower)
    return lora.merge(tensors, folder) if tuned else tensors


def _tower_tensors(tower: str) -> dict[str, Tensor]:
    """A CLIP's own weights, where a checkpoint brings none, under the names of LLaVA's tower."""
    model = _from_tower(CLIPVisionModel, tower)
    state = {name.removeprefix("vision_model."): t for name, t in model.state_dict().items()}
    return {f"{TOWER_PREFIX}{name}": tensor for name, tensor in state.items()}


def _from_tower(kind: Any, tower: str) -> Any:
    try:
        with explain_load_errors(tower):
            return kind.from_pretrained(tower)
    except OSError as error:
        told = hub.explain(error, tower) or first_line(error)
        raise FileNotFoundError(
            f"the vision tower {tower} cannot be had; give its folder or hub id with "
            f"--vision-tower ({told})"
        ) from None


def _check(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Names, source: str
) -> None:
    """Compare with the model's own names and shapes; errors name what the checkpoint calls it."""
    theirs = {to: name for name, to in names.items() if to is not None}
    held = {theirs.get(name, name) for name in ours}
    mend = "; a pruned model is no base: convert the one it was cut from"
    require(held, (theirs.get(name, name) for name in expected), source, mend)
    for name, tensor in ours.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source}: {theirs.get(name, name)} has the shape {list(tensor.shape)}, but "
                f"config.json asks for {list(expected[name].shape)}"
            )


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The type of most weights: a projector trained in another one is no reason to grow."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def grow_vocabulary(model: Any, tokenizer: Any) -> None:
    """Make room for the tokenizer's image and padding token, as the published conversions do.

    The new rows are the mean of the others, which as a logit is never the largest: no added token
    is ever the greedy answer.
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
