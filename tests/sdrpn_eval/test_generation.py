"""lmms-eval's generation settings, as ours."""

from __future__ import annotations

from typing import Any

import pytest

from sdrpn_eval import generation
from tests.helpers.asking_by_hand import logged


@pytest.fixture
def log() -> Any:
    with logged() as lines:
        yield lines


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False, "stop": []}),
        (
            {"until": "ASSISTANT:", "max_new_tokens": 16.0, "temperature": 0, "top_p": 1.0},
            {"max_new_tokens": 16, "do_sample": False, "stop": ["ASSISTANT:"]},
        ),
        (
            {"until": ["\n\n", ""], "temperature": 0.7, "top_p": 0.9, "num_beams": 1},
            {
                "max_new_tokens": 1024,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "num_beams": 1,
                "stop": ["\n\n"],
            },
        ),
        (
            {"do_sample": True, "top_p": None, "max_gen_toks": 7, "until": None},
            {"max_new_tokens": 7, "do_sample": True, "stop": []},
        ),
        (
            {"do_sample": True, "temperature": 0.0, "repetition_penalty": 1.2},
            {"max_new_tokens": 1024, "do_sample": False, "repetition_penalty": 1.2, "stop": []},
        ),
    ],
)
def test_generation_kwargs(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation.translate(given) == expected


def test_unknown_generation_kwargs_are_named(log: list[str]) -> None:
    assert "image_aspect_ratio" not in generation.translate({"image_aspect_ratio": "original"})
    assert log[-1].endswith("does not know: image_aspect_ratio")


def test_an_until_that_is_no_string_is_refused() -> None:
    with pytest.raises(ValueError, match="until must be a string or a list"):
        generation.translate({"until": 3})
