"""The authors' tiny random model (original layout, RPN inside) as a Llava and an RPN of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import AddedToken, CLIPImageProcessor

from sdrpn.convert.base import read_base
from sdrpn.llava import Llava
from sdrpn.rpn import RPN

DATA = Path(__file__).parent / "data" / "parity"
HEAD_IDS = list(range(100, 135))
IMAGE_TOKEN_ID = 200


class IdTokenizer:
    """Stands for the tokenizer the record lacks: questions are written as token ids."""

    eos_token_id = 2
    pad_token_id = 0
    added_tokens_decoder: ClassVar = {IMAGE_TOKEN_ID: AddedToken("<image>")}

    def __call__(self, prompt: str, **_: Any) -> dict[str, list[int]]:
        words = re.sub(r"<image[^>]*>", "", prompt)
        return {"input_ids": [*HEAD_IDS, IMAGE_TOKEN_ID, *map(int, re.findall(r"\d+", words))]}

    def add_tokens(self, token: AddedToken) -> None:
        """The mark of an image; `__call__` puts its id where it always is."""

    def convert_tokens_to_ids(self, token: str) -> int:
        return IMAGE_TOKEN_ID

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


def load_llava() -> Llava:
    """The base, through the converter; its vocabulary stays as it was recorded."""
    model = read_base(str(DATA))
    model.config.image_token_index = IMAGE_TOKEN_ID
    processor: Any = IdProcessor(DATA / "vision_tower")
    return Llava(model, processor, system_prompt="", name="parity")


def load_rpn() -> RPN:
    """The RPN, out of the authors' checkpoint as it is."""
    return RPN.from_pretrained(str(DATA))
