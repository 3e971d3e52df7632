"""Attention backends: every one that is installed gives the same maps, regions and answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import is_flash_attn_2_available

from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from tests.conftest import QUESTIONS, THRESHOLD, make_llava, make_rpn


def answers(
    backend: str, images: list[Image.Image], device: str, dtype: torch.dtype
) -> list[Answer]:
    """The same weights on another backend, questions of several lengths on two images."""
    llava = make_llava()
    rpn = make_rpn(llava, perturbed=True)
    llava.model.to(device=device, dtype=dtype)
    llava.model.set_attn_implementation(backend)
    assert llava.text_config._attn_implementation == backend
    zoom = ZoomModel(llava, rpn, zoom=ZoomConfig(threshold=THRESHOLD, policy="mask"))
    asked = [Question(text, (images[i % 2],)) for i, text in enumerate(QUESTIONS)]
    return zoom.ask_batch(asked, {"max_new_tokens": 6})


def same(found: list[Answer], expected: list[Answer], tolerance: float) -> None:
    assert any(answer.regions for answer in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.roi_map is not None
        assert other.roi_map is not None
        np.testing.assert_allclose(one.roi_map, other.roi_map, atol=tolerance)
        assert (one.text, one.regions) == (other.text, other.regions)


def test_eager_answers_as_sdpa(images: list[Image.Image]) -> None:
    every = [answers(backend, images, "cpu", torch.float32) for backend in ("sdpa", "eager")]
    same(every[1], every[0], 1e-5)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and is_flash_attn_2_available()),
    reason="flash_attention_2 needs a GPU and the package flash-attn",
)
def test_flash_attention_answers_as_sdpa(images: list[Image.Image]) -> None:
    """In half precision, which the kernel asks for; maps agree to its rounding."""
    every = [
        answers(backend, images, "cuda", torch.float16) for backend in ("sdpa", "flash_attention_2")
    ]
    same(every[1], every[0], 2e-2)
