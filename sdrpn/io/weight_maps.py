"""Weight maps from tensor names of the original LLaVA layout to ours; None for dropped tensors.

The tables list full names instead of patterns, so an unknown name is an error.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdrpn.io.plurals import counted

LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The weights of a LLaMA decoder layer."""

BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Of a Qwen2 decoder layer, which has the same weights, those with a bias."""

INV_FREQ = "self_attn.rotary_emb.inv_freq"
"""A constant that transformers saved in checkpoints up to version 4.31."""

MAP_HEAD = {
    "input_layernorm": "map_norm.weight",
    "self_attn.q_proj": "q_proj.weight",
    "self_attn.k_proj": "k_proj.weight",
}
"""Weights of the last RPN layer that the map head uses."""

TOWER_LAYER = (
    "layer_norm1",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
)
TOWER_REST = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    *(
        f"{norm}.{kind}"
        for norm in ("pre_layrnorm", "post_layernorm")
        for kind in ("weight", "bias")
    ),
)

Names = dict[str, str | None]


def rpn_names(depth: int, *, biases: bool = False, norm: bool = True) -> Names:
    """Map the RPN tensors of published checkpoints to the state dict of `RPN`.

    biases: query, key and value projections have them. norm: the RPN's own norm is used.
    """
    names: Names = {"model.twig_norm.weight": "norm.weight" if norm else None}
    for i in range(depth):
        layer = f"model.twig_layers.{i}"
        for part in LAYER:
            last = i == depth - 1
            ours = MAP_HEAD.get(part) if last else f"layers.{i}.{part}.weight"
            names[f"{layer}.{part}.weight"] = ours
            if biases and part in BIASED:
                bias = None if ours is None else ours.replace(".weight", ".bias")
                names[f"{layer}.{part}.bias"] = bias
        names[f"{layer}.{INV_FREQ}"] = None
    # An unused copy of the language-model head.
    return names | {"twig_head.weight": None, "model.twig_head.weight": None}


def base_names(layers: int, tower_layers: int, rpn_depth: int = 0) -> Names:
    """Map the tensors of an original LLaVA-1.5 to the state dict of transformers' LLaVA.

    Args:
        layers: Decoder layers.
        tower_layers: Layers of the vision tower.
        rpn_depth: Layers of an RPN in the same checkpoint, which are dropped.
    """
    names: Names = {
        "lm_head.weight": "lm_head.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.norm.weight": "model.language_model.norm.weight",
    }
    for i in range(layers):
        theirs, ours = f"model.layers.{i}", f"model.language_model.layers.{i}"
        names |= {f"{theirs}.{part}.weight": f"{ours}.{part}.weight" for part in LAYER}
        names[f"{theirs}.{INV_FREQ}"] = None
    for number, linear in (("0", "linear_1"), ("2", "linear_2")):
        for kind in ("weight", "bias"):
            ours = f"model.multi_modal_projector.{linear}.{kind}"
            names[f"model.mm_projector.{number}.{kind}"] = ours
    dropped = dict.fromkeys(rpn_names(rpn_depth)) if rpn_depth else {}
    return names | tower_names(tower_layers) | dropped


def tower_names(
    layers: int, prefix: str = "model.vision_tower.vision_tower.vision_model."
) -> Names:
    """Map the CLIP tensors of an original LLaVA-1.5 to those of transformers' LLaVA."""
    parts = list(TOWER_REST)
    for i in range(layers):
        for part in TOWER_LAYER:
            parts += [f"encoder.layers.{i}.{part}.{kind}" for kind in ("weight", "bias")]
    names: Names = {prefix + part: f"model.vision_tower.{part}" for part in parts}
    # An index range that transformers saved in checkpoints up to version 4.31.
    return names | {f"{prefix}embeddings.position_ids": None}


def rename(found: Iterable[str], names: Names, where: str) -> dict[str, str]:
    """Map the tensor names of a checkpoint to ours, leaving out dropped tensors.

    Raises:
        ValueError: If a name is not in the weight map.
    """
    found = list(found)
    unknown = [name for name in found if name not in names]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ValueError(f"{where} holds a tensor {unknown[0]}{more}, which is not in its layout")
    return {name: ours for name in found if (ours := names[name]) is not None}


def require(found: Iterable[str], expected: Iterable[str], where: str, hint: str = "") -> None:
    """Check that a checkpoint holds all expected tensors.

    Raises:
        ValueError: If a tensor is missing; `hint` ends the message.
    """
    held = set(found)
    missing = [name for name in expected if name not in held]
    if missing:
        more = f" and {counted(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else ""
        raise ValueError(f"{where} lacks {missing[0]}{more}{hint}")
