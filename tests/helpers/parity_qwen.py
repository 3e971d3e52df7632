"""A record of the authors' code on Qwen2.5-VL: their tiny random model, and its outputs.

`SDRPN_PARITY_QWEN=DIR` names another record of the same layout (`data/parity_qwen/README.md`); the
shipped one is the default. Nothing here, and no parity test, depends on what one record holds.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AddedToken,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from sdrpn.backbones.base import Segment
from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.config import ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.generation import generate
from sdrpn.inference.prefix import Prefix
from sdrpn.roi.proposers import Proposal
from sdrpn.rpn.checkpoint import RPN

if not hasattr(Qwen2_5_VLRotaryEmbedding, "recomposition_frequencies"):
    pytest.skip("Qwen2.5-VL needs a newer transformers", allow_module_level=True)

SHIPPED = Path(__file__).parents[1] / "data" / "parity_qwen"
DATA = Path(os.environ.get("SDRPN_PARITY_QWEN") or SHIPPED).expanduser()
CELL_PIXELS = 28 * 28
NEW_TOKENS = 6


class IdTokenizer:
    """Stands for the tokenizer the record lacks: everything is written as token ids."""

    bos_token_id = None
    pad_token_id = 0
    added_tokens_decoder: ClassVar[dict[int, AddedToken]] = {}

    def __init__(self, image_token_id: int) -> None:
        self.added_tokens_decoder = {image_token_id: AddedToken("<|image_pad|>")}  # type: ignore[misc]
        self.eos_token_id = -1  # no token: recorded answers are compared to their full length

    def __call__(self, part: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(one) for one in re.findall(r"\d+", part)]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class IdProcessor:
    """Their prompt around a picture and a question, and the image processor."""

    def __init__(self, config: dict[str, Any]) -> None:
        ids = config["ids"]
        self.tokenizer = IdTokenizer(ids["image_token_id"])
        self.image_processor = Qwen2VLImageProcessor()
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
        self._picture = " ".join(str(ids[name]) for name in names)
        self._head, self._tail = (" ".join(map(str, config[n])) for n in ("system_ids", "tail_ids"))

    def apply_chat_template(self, turns: Sequence[dict[str, Any]], **_: Any) -> str:
        content = turns[-1]["content"]
        pictures = [self._picture for one in content if one["type"] == "image"]
        return " ".join([self._head, *pictures, content[-1]["text"], self._tail])


@dataclass(frozen=True)
class Case:
    """A case of `cases.json`. pixels: least and most of a resized picture."""

    key: str
    image: Image.Image
    question: str
    pixels: tuple[int, int]


@dataclass(frozen=True)
class Looked:
    """A case prefilled and looked at."""

    engine: ZoomModel
    prefix: Prefix
    words: tuple[int, ...]
    proposal: Proposal


@dataclass(frozen=True)
class Record:
    """One record's files, read on demand."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def arrays(self, name: str) -> Any:
        return np.load(self.folder / f"{name}.npz")

    @cached_property
    def outputs(self) -> Any:
        return self.arrays("outputs")

    def parts(self, name: str) -> list[str]:
        """What the arrays of a file are filed under."""
        return sorted({key.split("/")[0] for key in self.arrays(name).files})

    @cached_property
    def cases(self) -> dict[str, Case]:
        listed = json.loads((self.folder / "cases.json").read_text())
        return {Path(one["image"]).stem: self._case(one) for one in listed}

    def _case(self, one: dict[str, Any]) -> Case:
        words = " ".join(map(str, one["question_ids"]))
        limits = one["min_tokens"] * CELL_PIXELS, one["max_tokens"] * CELL_PIXELS
        return Case(Path(one["image"]).stem, self.image(one["image"]), words, limits)

    def image(self, name: str) -> Image.Image:
        return Image.open(self.folder / "images" / name).convert("RGB")

    @cached_property
    def sharp(self) -> list[str]:
        """Cases whose first-look tokens were thinned, `sharp06` and its like."""
        return [one for one in self.parts("outputs") if one.startswith("sharp")]

    def thresholds(self, key: str) -> list[float]:
        """Recorded thresholds; none where the reference raised before it came to them."""
        name = f"{key}/thresholds"
        return [float(v) for v in self.outputs[name]] if name in self.outputs.files else []

    def cases_with(self, name: str) -> list[str]:
        """The cases that have this among their outputs."""
        return [key for key in self.cases if f"{key}/{name}" in self.outputs.files]

    def zooms(self, key: str) -> list[int]:
        """The thresholds that answers were recorded at."""
        found = {
            name.split("/")[2] for name in self.outputs.files if name.startswith(f"{key}/zoom/")
        }
        return sorted(map(int, found))

    @cached_property
    def checkpoint(self) -> tempfile.TemporaryDirectory[str]:
        """A folder as the authors lay it out: config.json and their tensor names."""
        folder = tempfile.TemporaryDirectory()
        (Path(folder.name) / "config.json").write_text(json.dumps(self.config["config"]))
        weights = (self.folder / "model.safetensors").resolve()
        (Path(folder.name) / "model.safetensors").symlink_to(weights)
        return folder

    @cached_property
    def model(self) -> Any:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            self.checkpoint.name, dtype=torch.float32
        )
        model.generation_config.eos_token_id = None
        return model

    def rpn(self) -> RPN:
        return RPN.from_pretrained(self.checkpoint.name)

    def backbone(self, pixels: tuple[int, int], *, training: bool = False) -> Qwen25VL:
        return Qwen25VL(
            self.model,
            IdProcessor(self.config),
            min_pixels=pixels[0],
            max_pixels=pixels[1],
            training=training,
            name="parity",
        )

    def engine(self, case: Case, rpn: RPN | None = None) -> ZoomModel:
        return ZoomModel(self.backbone(case.pixels), rpn or self.rpn(), prefix_cache=1 << 30)

    def look(self, case: Case) -> Looked:
        engine = self.engine(case)
        (prefix,) = engine.prefill([case.image])
        words = tuple(engine.backbone.prompt_ids(case.question).after)
        asked = Question(case.question, (case.image,))
        (proposal,) = engine.look([asked], [prefix], [words])
        return Looked(engine, prefix, words, proposal)


def answer(
    engine: ZoomModel, prefix: Prefix, suffix: Segment, new_tokens: int = NEW_TOKENS
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """(tokens, logits [steps, vocabulary], positions of the fed-back tokens) of an answer.

    Positions are those that reach the language model.
    """
    logits: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []

    def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits.append(scores[0].clone())
        return scores

    def note(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        positions.append(named["position_ids"][-3:, 0])

    decoder = engine.backbone.decoder
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    settings = {"max_new_tokens": new_tokens, "logits_processor": LogitsProcessorList([keep])}
    try:
        (tokens,) = generate(engine.backbone, [prefix], [suffix], settings)
    finally:
        handle.remove()
    return tokens, torch.stack(logits).numpy(), torch.cat(positions[1:], dim=1).numpy()


def at(threshold: float, **more: Any) -> ZoomConfig:
    """The published settings at another threshold; from a map in (0, 1), as thresholds are."""
    return replace(ZoomConfig(policy="mask", **more), threshold=threshold)


def strided(values: torch.Tensor) -> np.ndarray:
    """What the record keeps of pixel values."""
    flat = values.flatten()
    return flat[:: max(1, len(flat) // 500)][:500].numpy()
