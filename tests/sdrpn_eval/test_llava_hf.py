"""Stock here is llava_hf's stock: with its preprocessing and prompt, the answers are the same."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import CLIPImageProcessor

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import VICUNA_SYSTEM_PROMPT
from sdrpn.engine import ZoomModel
from sdrpn_eval.model import LlavaSdrpn

HUB_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The hub's template for plain text messages: it leaves the system sentence out."""

QUESTIONS = ("what pattern is on the red disc ?", "the blue disc ?", "what is on the pink disc ?")


@pytest.fixture(scope="module")
def checkpoint(llava: Llava15, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model as the hub lays LLaVA-1.5 out: an image processor that crops the centre."""
    folder = tmp_path_factory.mktemp("hub")
    llava.model.save_pretrained(folder)
    own = llava.processor.image_processor
    llava.processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": llava.side},
        crop_size={"height": llava.side, "width": llava.side},
        image_mean=own.image_mean,
        image_std=own.image_std,
    )
    try:
        llava.processor.save_pretrained(folder)
    finally:
        llava.processor.image_processor = own
    return folder


def requests() -> list[Any]:
    kwargs = {"max_new_tokens": 6, "temperature": 0}
    instances = []
    for i in range(6):
        arguments = (QUESTIONS[i % 3], kwargs | {}, lambda doc: [doc["image"]], i, "t", "test")
        metadata = {"task": "t", "doc_id": i, "repeats": 1}
        instances.append(Instance("generate_until", arguments, 0, metadata))  # type: ignore[arg-type]
    return instances


def documents(images: list[Image.Image]) -> dict[str, Any]:
    return {"t": {"test": [{"image": images[i % len(images)]} for i in range(6)]}}


def llava_hf_answers(
    folder: Path, docs: Any, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> list[str]:
    decord = types.ModuleType("decord")  # for videos; lmms-eval does not install it
    monkeypatch.setattr(decord, "VideoReader", None, raising=False)
    monkeypatch.setattr(decord, "cpu", None, raising=False)
    monkeypatch.setitem(sys.modules, "decord", decord)
    from lmms_eval.models.simple.llava_hf import LlavaHf

    theirs = LlavaHf(pretrained=str(folder), device="cpu", device_map="cpu", chat_template=template)
    theirs.task_dict = docs
    return theirs.generate_until(requests())


@pytest.mark.parametrize(
    ("template", "system_prompt"), [(HUB_TEMPLATE, ""), (None, VICUNA_SYSTEM_PROMPT)]
)
def test_cropping_and_its_prompt_give_the_answers_of_llava_hf(
    checkpoint: Path,
    images: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    system_prompt: str,
) -> None:
    docs = documents(images)
    theirs = llava_hf_answers(checkpoint, docs, monkeypatch, template)
    engine = ZoomModel.from_pretrained(
        str(checkpoint),
        proposer="none",
        padding="crop",
        system_prompt=system_prompt,
        dtype="float32",
    )
    ours = LlavaSdrpn(pretrained=engine, batch_size=4, record="none")
    ours.task_dict = docs
    answers = [result.text for result in ours.generate_until(requests())]
    assert answers == [text.strip() for text in theirs]
    assert len(set(answers)) > 3


def test_padding_shows_the_model_another_picture(
    checkpoint: Path, images: list[Image.Image]
) -> None:
    """So that the test above cannot pass by chance: on a wide image the two views differ."""
    padded = Llava15.load(str(checkpoint), dtype="float32")
    cropped = Llava15.load(str(checkpoint), dtype="float32", padding="crop")
    wide = [image for image in images if image.width != image.height]
    for image in wide:
        a, b = padded.pixels([image]), cropped.pixels([image])
        assert np.abs(np.asarray(a) - np.asarray(b)).max() > 0.1
