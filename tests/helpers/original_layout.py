"""Small LLaVA-1.5s in the layout of its authors' code, written file by file as they are published.

The names are written out here once more, by hand and the other way round, so that a mistake in the
converter's tables does not hide behind itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdrpn.backbones.llava15 import Llava15
from sdrpn.rpn.checkpoint import RPN

Tensors = dict[str, Tensor]

BACK = (
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.language_model\.", "model."),
)


def base_tensors(model: Any) -> Tensors:
    """A transformers LLaVA's weights under their original names."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for pattern, theirs in BACK:
            name = re.sub(pattern, theirs, name)
        tensors[name] = tensor.clone()
    return tensors


def rpn_tensors(rpn: RPN) -> Tensors:
    """An RPN's weights under the authors' names, with what their checkpoints hold beside them."""
    last = rpn.config.depth - 1
    c, wide = rpn.config.hidden_size, rpn.config.intermediate_size
    tensors = {}
    for name, tensor in rpn.state_dict().items():
        if name.startswith("layers."):
            theirs = f"model.twig_{name}"
        elif name == "norm.weight":
            theirs = "model.twig_norm.weight"
        elif name == "map_norm.weight":
            theirs = f"model.twig_layers.{last}.input_layernorm.weight"
        else:
            theirs = f"model.twig_layers.{last}.self_attn.{name}"
        tensors[theirs] = tensor.clone()
    unused = {
        "self_attn.v_proj": (rpn.k_proj.weight.shape[0], c),
        "self_attn.o_proj": (c, c),
        "post_attention_layernorm": (c,),
        "mlp.gate_proj": (wide, c),
        "mlp.up_proj": (wide, c),
        "mlp.down_proj": (c, wide),
    }
    for part, shape in unused.items():
        tensors[f"model.twig_layers.{last}.{part}.weight"] = torch.randn(shape)
    return tensors | {"twig_head.weight": torch.randn(7, c)}


def config_of(llava: Llava15, rpn: RPN | None = None, **more: Any) -> dict[str, Any]:
    """config.json as LLaVA-1.5's own code writes it."""
    text, vision = llava.model.config.text_config, llava.model.config.vision_config
    config: dict[str, Any] = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_act": "silu",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"somewhere/clip-vit-tiny-patch14-{vision.image_size}",
    }
    if rpn is not None:
        config |= {"enable_twig": True, "twig_K": rpn.config.branch_layer}
        config |= {"twig_T": rpn.config.depth, "roi_source": "qk", "roi_loss": "bce"}
        config |= {"roi_multi_head": rpn.config.multi_head}
    return config | more


# --- files -------------------------------------------------------------------------------------


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def one_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def one_old_bin(folder: Path, tensors: Tensors) -> None:
    """As torch wrote it before 1.6: no zip archive, which cannot be mapped."""
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded(folder: Path, tensors: Tensors, stem: str, save: Callable[[Any, Path], None]) -> None:
    """Three shards; the RPN's tensors lie in the last two."""
    base = {name: t for name, t in tensors.items() if "twig" not in name}
    rest = [name for name in tensors if "twig" in name]
    half = len(rest) // 2
    parts = [base, *({n: tensors[n] for n in part} for part in (rest[:half], rest[half:]))]
    suffix = "safetensors" if stem == "model" else "bin"
    where = {}
    for number, part in enumerate(parts, start=1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        save(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    name = f"{stem}.{suffix}.index.json"
    (folder / name).write_text(json.dumps(index))


def sharded_safetensors(folder: Path, tensors: Tensors) -> None:
    sharded(folder, tensors, "model", lambda part, path: save_file(part, path))


def sharded_bin(folder: Path, tensors: Tensors) -> None:
    sharded(folder, tensors, "pytorch_model", torch.save)


WRITERS = (one_safetensors, one_bin, one_old_bin, sharded_safetensors, sharded_bin)
