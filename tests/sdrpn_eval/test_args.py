"""`--model_args` of llava_sdrpn: values, defaults, presets, and what is refused."""

from __future__ import annotations

from pathlib import Path
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
    assert (values.crop_tokens, values.proposer) == (64, "rpn")


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
        ("threshold", "peak", "peak"),
        ("gate", 0.9, 0.9),
        ("gate", "none", None),
        ("learned_gate", "none", None),
        ("tiles", 4, 4),
        ("threshold", None, None),
        ("threshold", "None", None),
        ("threshold", "none", None),
        ("policy", "None", None),
        ("keep_tokens", "none", None),
        ("peft", "None", None),
        ("device", "none", None),
        ("resume", "None", True),
        ("batch_size", "none", 1),
        ("rpn", "None", None),
        ("token_budget", "None", None),
        ("skip_above", "None", None),
        ("crop_tokens", "none", None),
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
    [
        ("threshold", 1.5),
        ("threshold", True),
        ("threshold", "top"),
        ("batch_size", 0),
        ("token_budget", 0),
        ("gate", 0),
        ("gate", 1),
        ("learned_gate", 2),
        ("crop_tokens", 0),
        ("keep_tokens", 0.5),
        ("tiles", 3),
    ],
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


def test_fastest_asks_one_rule_of_all_benchmarks() -> None:
    values = LlavaArguments.of({"preset": "fastest"})
    assert (values.threshold, values.keep_tokens, values.crop_tokens) == ("peak", 128, 64)
    stock = LlavaArguments.of({"preset": "fastest", "proposer": "attention"})
    assert (stock.threshold, stock.keep_tokens) == ("peak", None)


@pytest.mark.parametrize("name", ["keep_tokens", "learned_gate"])
def test_what_only_the_rpn_can_serve(name: str) -> None:
    value = 8 if name == "keep_tokens" else 0.5
    with pytest.raises(ValueError, match=f"{name} must be left out with proposer=vicrop"):
        LlavaArguments.of({name: value, "proposer": "vicrop"})


def test_a_file_of_zoom_settings(tmp_path: Path) -> None:
    file = tmp_path / "zoom.json"
    file.write_text('{"zoom": {"threshold": "peak", "gate": 0.9, "crop_tokens": 64}}')
    values = LlavaArguments.of({"zoom": str(file), "crop_tokens": 100, "preset": "fast"})
    assert (values.threshold, values.gate, values.crop_tokens) == ("peak", 0.9, 100)
    assert values.skip_above == 0.7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "zoom=.*zoom.json cannot be read: No such file or directory"),
        ("{", "zoom=.*zoom.json holds no zoom settings; give a file that"),
        ('{"gate": 0.9}', "holds no zoom settings"),
        ("[1]", "holds no zoom settings"),
        ('{"zoom": {"zooms": 1}}', "unknown setting zooms; known: threshold, policy, "),
        ('{"zoom": {"gate": 7}}', "gate must be"),
    ],
)
def test_broken_files_of_zoom_settings(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "zoom.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=words):
        LlavaArguments.of({"zoom": str(file)})


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
