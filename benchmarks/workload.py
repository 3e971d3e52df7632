"""Inputs of the benchmarks: machine facts, models, and questions on images."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers

from benchmarks.shapes import SHAPES, images, question, random_llava, random_rpn
from sdrpn.backbones.base import Backbone
from sdrpn.backbones.llava15 import Llava15
from sdrpn.backbones.loading import pick_dtype
from sdrpn.engine import Question
from sdrpn.rpn.checkpoint import RPN

MIXES = {
    "textvqa": (2, 1, 2, 1, 2),
    "docvqa": (4, 4, 4, 4, 5),
    "pope": (18,),
}
"""Questions per image, for a cycle of images with the benchmark's mean: 1.6, 4.2, 18."""

BRANCH_SHARE = 15 / 32
"""B for shapes with fewer layers, as a share of the layers of 7B."""


@dataclass(frozen=True)
class Cell:
    """A column of the table: questions for each image, and the name of the mix."""

    counts: tuple[int, ...]
    mix: str | None = None

    @property
    def mean(self) -> float:
        return round(fmean(self.counts), 3)

    def enough(self, questions: int) -> tuple[int, ...]:
        """Repeat the counts until there are at least `questions` questions."""
        times = -(-questions // sum(self.counts))
        return self.counts * times


def load(
    shape: str,
    *,
    layers: int | None = None,
    pretrained: str | None = None,
    rpn: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    attention: str | None = None,
) -> tuple[Llava15, RPN]:
    """Load a LLaVA and an RPN with random weights of a named shape, or with real weights.

    layers: number of decoder layers of a random shape. rpn: by default a copy of the backbone's
    layers, which has the same cost. attention: name of transformers' attention backend.
    """
    if pretrained is not None:
        llava = Llava15.load(pretrained, dtype=dtype, device=device, attn_implementation=attention)
        return llava, RPN.from_pretrained(rpn) if rpn else random_rpn(llava)
    branch = 15
    if layers is not None:
        branch = max(1, min(round(layers * BRANCH_SHARE), layers - 3))
        name, shape = shape, f"{shape}, {layers} layers"
        SHAPES[shape] = replace(SHAPES[name], layers=layers)
    llava = random_llava(shape, pick_dtype(dtype, torch.device(device)), device)
    if attention is not None:
        llava.model.set_attn_implementation(attention)
    return llava, random_rpn(llava, branch)


def describe_shape(backbone: Backbone, rpn: RPN, image_tokens: int) -> dict[str, Any]:
    """Return the sizes that are needed to interpret the results."""
    text: Any = backbone.text_config
    return {
        "family": backbone.model_type,
        "name": backbone.name,
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "branch_layer": rpn.config.branch_layer,
        "rpn_depth": rpn.config.depth,
        "text_before_image_tokens": backbone.prefix_length(0),
        "image_tokens": image_tokens,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "attention": text._attn_implementation,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, threads and versions."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _fitting(backbone: Backbone, tokens: int, seed: int) -> str:
    """Build a question of a number of tokens after the image, including the end of the turn."""
    for words in range(tokens, 0, -1):
        text = question(words, seed)
        if len(backbone.prompt_ids(text).after) <= tokens:
            return text
    raise ValueError(f"a question of {tokens} tokens is too short for the prompt's own words")


def questions(
    backbone: Backbone, counts: Sequence[int], tokens: int, size: tuple[int, int]
) -> list[Question]:
    """Build questions of equal length, grouped by image as the plugin batches them.

    Equal length favours stock, whose left-padded batches then contain no padding.
    """
    pictures = images(len(counts), *size)
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    return [
        Question(_fitting(backbone, tokens, seed), (pictures[i],)) for seed, i in enumerate(owners)
    ]


class Clock:
    """Wall time of work in seconds, including all GPU kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int | None:
        """Peak bytes of GPU memory since `reset_memory`; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def achievable(backbone: Backbone, tries: int = 5) -> float:
    """Best operations per second of a few large matrix products in the model's dtype."""
    side = 8192 if backbone.device.type == "cuda" else 1536
    left, right = (
        torch.randn(side, side, dtype=backbone.dtype, device=backbone.device) for _ in "ab"
    )
    clock = Clock(backbone.device)
    best = 0.0
    for _ in range(tries + 1):
        started = clock.now()
        torch.mm(left, right)
        best = max(best, 2 * side**3 / (clock.now() - started))
    return best


def settings_of(values: Any) -> dict[str, Any]:
    """Convert a dataclass of settings to JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(values).items()}
