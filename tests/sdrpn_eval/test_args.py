"""`--model_args` of llava_sdrpn: values, defaults, presets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdrpn_eval.args import Count, LlavaArguments, ModelArguments


def test_unknown_and_ill_typed_arguments_make_one_error_with_the_list() -> None:
    with pytest.raises(ValueError, match="unknown treshold") as error:
        LlavaArguments.of({"treshold": 0.1, "policy": "box", "batch_size": "many", "padding": 3})
    text = str(error.value)
    assert "policy must be one of mask, bbox, strongest, got 'box'" in text
    assert "batch_size must be a whole number of 1 or more, or auto, got 'many'" in text
    assert "padding must be one of pad, crop, got 3" in text
    for name in LlavaArguments.model_fields:
        assert f"\n  {name}: " in text


def test_the_sentence_stands_last_and_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown treshold") as error:
        LlavaArguments.of({"treshold": 0.1, "policy": "box"})
    assert str(error.value).splitlines()[-1] == (
        "llava_sdrpn: unknown treshold, did you mean threshold?; policy must be one of mask, bbox, "
        "strongest, got 'box'"
    )
    with pytest.raises(ValueError, match="dtype") as error:
        LlavaArguments.of({"dtype": "torch.int8"})
    assert str(error.value) == (
        "llava_sdrpn: dtype must be one of auto, float32, bfloat16, float16, got 'torch.int8'"
    )


def test_none_beside_a_preset() -> None:
    """It switches off what can be off, and of all else says nothing."""
    values = LlavaArguments.of({"preset": "fast", "token_budget": "None", "policy": "None"})
    assert values.token_budget is None
    assert (values.max_crop_tokens, values.proposer) == (64, "rpn")


def test_llava_hf_arguments_are_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"unknown chat_template \(the prompt is LLaVA-1.5's own"):
        LlavaArguments.of({"chat_template": "vicuna"})


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("batch_size", "4", 4),
        ("batch_size", 4, 4),
        ("batch_size", "auto", "auto"),
        ("batch_size", "auto:2", "auto"),
        ("prefix_cache", "4GB", 4 * 2**30),
        ("prefix_cache", "512MiB", 2**29),
        ("prefix_cache", 1000, 1000),
        ("prefix_cache", "none", 0),
        ("token_budget", 2, 2.0),
        ("token_budget", "none", None),
        ("revision", 1234567, "1234567"),
        ("system_prompt", '"Look, then answer."', "Look, then answer."),
        ("system_prompt", "", ""),
        ("threshold", 0.3, 0.3),
        ("threshold", None, None),
        ("threshold", "None", None),
        ("threshold", "none", None),
        ("policy", "None", None),
        ("relative", "none", None),
        ("peft", "None", None),
        ("device", "none", None),
        ("resume", "None", True),
        ("batch_size", "none", 1),
        ("rpn", "None", None),
        ("token_budget", "None", None),
        ("skip_above", "None", None),
        ("max_crop_tokens", "none", None),
        ("proposer", "none", "none"),
        ("dtype", "torch.float16", "float16"),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("dtype", "float32", "float32"),
        ("rpn_revision", 1234567, "1234567"),
    ],
)
def test_values_as_the_command_line_brings_them(name: str, given: Any, value: Any) -> None:
    assert getattr(LlavaArguments.of({name: given}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", 1.5), ("threshold", True), ("batch_size", 0), ("token_budget", 0)],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        LlavaArguments.of({name: value})


def test_defaults_are_the_paper_s_system() -> None:
    values = LlavaArguments.of({})
    assert values.pretrained == "llava-hf/llava-1.5-7b-hf"
    assert (values.proposer, values.padding, values.threshold) == ("rpn", "pad", None)


def test_a_preset_yields_to_what_is_given() -> None:
    assert LlavaArguments.of({"preset": "paper"}).policy == "mask"
    assert LlavaArguments.of({"preset": "paper", "policy": "bbox"}).policy == "bbox"


class Other(ModelArguments):
    """Another family: an argument and a default of its own, no presets."""

    model_name = "other"
    pretrained: Any = "nobody/other"
    max_pixels: Count | None = None
    """pixels of an image"""


def test_a_family_has_arguments_and_defaults_of_its_own() -> None:
    args = Other.of({"max_pixels": 5})
    assert (args.pretrained, args.max_pixels, args.proposer) == ("nobody/other", 5, "rpn")
    assert "\n  max_pixels: pixels of an image" in Other.listing()
    with pytest.raises(ValueError, match="unknown padding") as error:
        Other.of({"padding": "pad", "max_pixels": 0})
    assert str(error.value).splitlines()[-1] == (
        "other: unknown padding; max_pixels must be a whole number of 1 or more, or none, got 0"
    )
