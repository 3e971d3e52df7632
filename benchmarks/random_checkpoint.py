"""Write full-size checkpoints of random weights, one file at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.shapes import SHAPES, random_llava
from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import RPNConfig
from sdrpn.rpn.checkpoint import RPN

DEVIATION = 0.02
"""Standard deviation of the random weights, as in LLaMA's initialisation."""


def meta_llava(name: str, dtype: torch.dtype, layers: int | None = None) -> Llava15:
    """Build a LLaVA of a shape on the meta device."""
    if layers is not None:
        SHAPES[f"{name}-{layers}"] = replace(SHAPES[name], layers=layers)
        name = f"{name}-{layers}"
    return random_llava(name, dtype, "meta")


def rpn_config(llava: Llava15) -> RPNConfig:
    """The published B = 15 and R = 3; a shape with fewer layers branches off earlier."""
    return RPNConfig(
        **llava.rpn_shape(),
        branch_layer=min(15, llava.num_layers - 3),
        depth=3,
        base_model=llava.name,
    )


def meta_rpn(llava: Llava15, dtype: torch.dtype) -> RPN:
    """Build the RPN of a shape on the meta device."""
    with torch.device("meta"):
        return RPN(rpn_config(llava)).to(dtype)


def _groups(names: list[str]) -> dict[str, list[str]]:
    """Weight names by file: one file per decoder layer, and one for the rest."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"model\.language_model\.layers\.\d+\.", name)
        part = ".".join(name.split(".")[:2])
        groups.setdefault(layer[0] if layer else part, []).append(name)
    return groups


def _fill(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    made = torch.empty(like.shape, dtype=like.dtype)
    if name.endswith("bias"):
        return made.zero_()
    if "norm" in name or "layrnorm" in name:
        return made.fill_(1)
    return made.normal_(0, DEVIATION, generator=generator)


def _files(shapes: dict[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    groups = list(_groups(list(shapes)).values())
    for number, names in enumerate(groups, start=1):
        yield f"model-{number:05d}-of-{len(groups):05d}.safetensors", names


def build(folder: Path, shape: str, dtype: torch.dtype, layers: int | None = None) -> None:
    """Write a sharded checkpoint of a shape, its processor, and an RPN in folder/rpn.

    Only the weights of one file are in memory at a time. config.json is written last, so a folder
    without it is incomplete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    llava = meta_llava(shape, dtype, layers)
    shapes = llava.model.state_dict()
    generator, where = torch.Generator().manual_seed(0), {}
    for file, names in tqdm(list(_files(shapes)), desc="Writing", unit="file"):
        tensors = {name: _fill(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    size = sum(t.numel() * t.element_size() for t in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    _build_rpn(folder / "rpn", llava, dtype, generator)
    llava.processor.save_pretrained(folder)
    llava.model.generation_config.save_pretrained(folder)
    llava.model.config.dtype = dtype
    llava.model.config.architectures = [type(llava.model).__name__]
    llava.model.config.save_pretrained(folder)


def _build_rpn(
    folder: Path, llava: Llava15, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rpn = meta_rpn(llava, dtype)
    filled = {name: _fill(name, t, generator) for name, t in rpn.state_dict().items()}
    rpn.load_state_dict(filled, assign=True)
    rpn.save_pretrained(folder)
