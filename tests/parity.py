"""The authors' tiny random model (original layout, RPN inside) as a Llava and an RPN of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from sdrpn.config import RPNConfig
from sdrpn.llava import Llava
from sdrpn.rpn import RPN

DATA = Path(__file__).parent / "data" / "parity"
HEAD_IDS = list(range(100, 135))
IMAGE_TOKEN_ID = 200


class IdTokenizer:
    """Stands for the tokenizer the record lacks: questions are written as token ids."""

    eos_token_id = 2
    pad_token_id = 0

    def __call__(self, prompt: str) -> dict[str, list[int]]:
        return {"input_ids": [*HEAD_IDS, IMAGE_TOKEN_ID, *map(int, re.findall(r"\d+", prompt))]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class IdProcessor:
    tokenizer = IdTokenizer()

    def __init__(self, folder: Path) -> None:
        self.image_processor = CLIPImageProcessor.from_pretrained(folder)


def cases() -> list[dict[str, Any]]:
    return json.loads((DATA / "cases.json").read_text())


def image(name: str) -> Image.Image:
    return Image.open(DATA / "images" / name).convert("RGB")


def question(case_ids: list[int]) -> str:
    return " ".join(map(str, case_ids))


def recorded() -> Any:
    return np.load(DATA / "outputs.npz")


LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def load_llava() -> Llava:
    own = json.loads((DATA / "config.json").read_text())
    vision = CLIPVisionConfig(**json.loads((DATA / "vision_tower" / "config.json").read_text()))
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{name: own[name] for name in LLAMA_FIELDS}),
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=own["mm_vision_select_layer"],
    )
    model = LlavaForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(backbone_tensors(), strict=False)
    assert not unexpected, unexpected
    assert not [m for m in missing if "position_ids" not in m], missing
    processor: Any = IdProcessor(DATA / "vision_tower")
    return Llava(model, processor, system_prompt="", name="parity")


RENAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
)


def backbone_tensors() -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in load_file(DATA / "model.safetensors").items():
        if "twig" in name:
            continue
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        tensors[name] = tensor
    return tensors


def load_rpn() -> RPN:
    own = json.loads((DATA / "config.json").read_text())
    config = RPNConfig(
        hidden_size=own["hidden_size"],
        intermediate_size=own["intermediate_size"],
        num_attention_heads=own["num_attention_heads"],
        num_key_value_heads=own["num_key_value_heads"],
        rms_norm_eps=own["rms_norm_eps"],
        image_tokens=576,
        branch_layer=own["twig_K"],
        depth=own["twig_T"],
    )
    last = config.depth - 1
    mapped = {"model.twig_norm.weight": "norm.weight"}
    mapped |= {
        f"model.twig_layers.{last}.input_layernorm.weight": "map_norm.weight",
        f"model.twig_layers.{last}.self_attn.q_proj.weight": "q_proj.weight",
        f"model.twig_layers.{last}.self_attn.k_proj.weight": "k_proj.weight",
    }
    tensors = {}
    for name, tensor in load_file(DATA / "model.safetensors").items():
        layer = re.match(r"model\.twig_layers\.(\d+)\.(.*)", name)
        if name in mapped:
            tensors[mapped[name]] = tensor
        elif layer and int(layer[1]) < last:
            tensors[f"layers.{layer[1]}.{layer[2]}"] = tensor
    rpn = RPN(config)
    rpn.load_state_dict(tensors)
    return rpn
