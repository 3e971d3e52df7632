"""A record of the authors' code: their tiny random model as a Llava15 and an RPN, and its outputs.

`SDRPN_PARITY=DIR` names another record of the same layout (`data/parity/README.md`); the shipped
one is the default. Nothing here, and no parity test, depends on what one record holds: numbers of
cases, image sizes, thresholds, or which policies zoom.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import AddedToken, CLIPImageProcessor

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import ZoomConfig
from sdrpn.convert.base import read_base
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.prefix import Prefix
from sdrpn.roi.postprocess import components
from sdrpn.roi.proposers import Proposal
from sdrpn.rpn.checkpoint import RPN

SHIPPED = Path(__file__).parents[1] / "data" / "parity"
DATA = Path(os.environ.get("SDRPN_PARITY") or SHIPPED).expanduser()
POLICIES = ("mask", "bbox")
SMALLEST_WHOLE = 4
"""Cells of a component whose box is not grown."""
HEAD_IDS = list(range(100, 135))
IMAGE_TOKEN_ID = 200


class IdTokenizer:
    """Stands for the tokenizer the record lacks: questions are written as token ids."""

    bos_token_id = None
    eos_token_id = 2
    pad_token_id = 0
    added_tokens_decoder: ClassVar = {IMAGE_TOKEN_ID: AddedToken("<image>")}

    def __call__(self, part: str, **_: Any) -> dict[str, list[int]]:
        """A part of a prompt: the one before the image has words, the one behind it ids."""
        before = HEAD_IDS if "USER:" in part else []
        return {"input_ids": [*before, *map(int, re.findall(r"\d+", part))]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class IdProcessor:
    tokenizer = IdTokenizer()

    def __init__(self, folder: Path) -> None:
        self.image_processor = CLIPImageProcessor.from_pretrained(folder)


def question(case_ids: list[int]) -> str:
    return " ".join(map(str, case_ids))


@dataclass(frozen=True)
class Record:
    """One record's files, read on demand."""

    folder: Path

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "cases.json").read_text())

    @cached_property
    def outputs(self) -> Any:
        return np.load(self.folder / "outputs.npz")

    @cached_property
    def pseudo_labels(self) -> Any:
        return np.load(self.folder / "pseudo_labels.npz")

    @cached_property
    def label_cases(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self.pseudo_labels.files})

    @cached_property
    def keys(self) -> list[str]:
        """What each case's outputs are filed under: its image's number, else its own."""
        filed = {name.split("/")[0] for name in self.outputs.files}
        stems = [Path(case["image"]).stem for case in self.cases]
        return [one if one in filed else f"{n:02d}" for n, one in enumerate(stems)]

    def thresholds(self, key: str) -> list[float]:
        return [float(value) for value in self.outputs[f"{key}/thresholds"]]

    def image(self, name: str) -> Image.Image:
        return Image.open(self.folder / "images" / name).convert("RGB")

    def load_llava(self) -> Llava15:
        """The base, through the converter; its vocabulary stays as it was recorded."""
        model = read_base(str(self.folder))
        model.config.image_token_index = IMAGE_TOKEN_ID
        processor: Any = IdProcessor(self.folder / "vision_tower")
        return Llava15(model, processor, system_prompt="", name="parity")

    def load_rpn(self) -> RPN:
        """The RPN, out of the authors' checkpoint as it is."""
        return RPN.from_pretrained(str(self.folder))

    def look(self, engine: ZoomModel) -> dict[str, Case]:
        """Every case, prefilled and looked at under each policy at its own threshold."""
        found = [self._look(engine, *one) for one in zip(self.keys, self.cases, strict=True)]
        return {case.key: case for case in found}

    def _look(self, engine: ZoomModel, key: str, case: dict[str, Any]) -> Case:
        image = self.image(case["image"])
        (prefix,) = engine.prefill([image])
        text = question(case["question_ids"])
        words = tuple(engine.backbone.prompt_ids(text).after)
        one = Case(key, case["threshold"], image, prefix, words)
        for policy in POLICIES:
            asked = Question(text, (image,), zoom=one.zoom(policy))
            (one.proposals[policy],) = engine.look([asked], [prefix], [words])
        return one


@dataclass
class Case:
    """A recorded case at its own threshold, on our side."""

    key: str
    threshold: float
    image: Any
    prefix: Prefix
    words: tuple[int, ...]
    proposals: dict[str, Proposal] = field(default_factory=dict)

    def zoom(self, policy: str) -> ZoomConfig:
        return ZoomConfig(threshold=self.threshold, policy=policy)

    def has_grown_box(self, policy: str) -> bool:
        """Whether a box that is cropped here or there is that of a component of two or three cells.

        Boxes in the padding count: grown otherwise, they may reach into the picture.
        """
        proposal, zoom = self.proposals[policy], self.zoom(policy)
        assert proposal.roi_map is not None
        found = components(proposal.roi_map > zoom.threshold, zoom)
        one_box_around_all = policy == "mask" and len(found) > 1
        return not one_box_around_all and any(
            cells.sum() < SMALLEST_WHOLE for _, cells in found if len(found) <= 2
        )
