"""A LoRA merged by hand: matrices of a few numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdrpn.convert import lora
from sdrpn.io.checkpoint_files import Source

A = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
B = torch.tensor([[1.0, 0.0], [2.0, -1.0]])
PREFIX = "base_model.model."


def adapter(folder: Path, **settings: Any) -> Source:
    """A fine-tune of one matrix, of rank 2 and alpha 3."""
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | settings
    (folder / "adapter_config.json").write_text(json.dumps(values))
    pair = {f"{PREFIX}q.lora_A.weight": A, f"{PREFIX}q.lora_B.weight": B}
    save_file(pair, folder / "adapter_model.safetensors")
    return Source(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_change_is_b_times_a_at_its_scale(tmp_path: Path, dtype: torch.dtype) -> None:
    """W + 3/2 B A, in the base's own precision; the base and its other tensors stay."""
    base = {"q.weight": torch.ones(2, 3, dtype=dtype), "k.weight": torch.zeros(1)}
    merged = lora.merge(base, adapter(tmp_path))
    assert merged["q.weight"].tolist() == [[2.5, 4.0, 5.5], [4.0, 5.5, 10.0]]
    assert merged["q.weight"].dtype == dtype
    assert merged["k.weight"] is base["k.weight"]
    assert base["q.weight"].tolist() == [[1.0] * 3] * 2
    assert merged.keys() == base.keys()


def test_small_changes_are_added_in_float32(tmp_path: Path) -> None:
    """In float16 the products would be 0."""
    source = adapter(tmp_path, lora_alpha=1 << 13)
    pair = {f"{PREFIX}q.lora_A.weight": A.half() * 2**-12, f"{PREFIX}q.lora_B.weight": B.half()}
    pair[f"{PREFIX}q.lora_B.weight"] *= 2**-13
    save_file(pair, tmp_path / "adapter_model.safetensors")
    merged = lora.merge({"q.weight": torch.zeros(2, 3, dtype=torch.float16)}, source)
    assert (merged["q.weight"] * 2**13).tolist() == [[1, 2, 3], [2, 3, 6]]


def test_a_fine_tune_may_have_trained_nothing_whole(tmp_path: Path) -> None:
    source = adapter(tmp_path)
    assert lora.non_lora_tensors(source) == {}
    whole = {f"{PREFIX}model.mm_projector.0.bias": torch.ones(2), "bare": torch.zeros(1)}
    torch.save(whole, tmp_path / "non_lora_trainables.bin")
    found = lora.non_lora_tensors(source)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "model.mm_projector.0.bias": [1, 1],
        "bare": [0],
    }


def test_what_is_no_fine_tune_has_no_base(tmp_path: Path) -> None:
    source = Source(str(tmp_path))
    assert not lora.is_lora(source)
    assert lora.base_of(source) is None
    assert lora.is_lora(adapter(tmp_path))
    assert lora.base_of(source) is None
    for named, base in (("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"), ("", None), (3, None)):
        assert lora.base_of(adapter(tmp_path, base_model_name_or_path=named)) == base


@pytest.mark.parametrize("alpha", [3, 3.0])
@pytest.mark.parametrize(("rslora", "factor"), [(None, 1.5), (False, 1.5), (True, 2.12132)])
def test_alpha_is_shared_by_the_rank_or_its_root(
    tmp_path: Path, alpha: float, rslora: bool | None, factor: float
) -> None:
    source = adapter(tmp_path, lora_alpha=alpha, use_rslora=rslora)
    merged = lora.merge({"q.weight": torch.zeros(2, 3)}, source)
    assert torch.allclose(merged["q.weight"], factor * (B @ A), atol=1e-4)


@pytest.mark.parametrize("peft", [None, "LORA"])
def test_a_kind_that_is_not_said_is_lora(tmp_path: Path, peft: str | None) -> None:
    source = adapter(tmp_path)
    config = {"r": 2, "lora_alpha": 3} | ({"peft_type": peft} if peft else {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert lora.merge({"q.weight": torch.zeros(2, 3)}, source)["q.weight"][0, 0] == 1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json has peft_type 'IA3'; only plain LoRA can be m"),
        ({"rank_pattern": {"q": 8}}, "adapter_config.json has rank_pattern {'q': 8}; only plain L"),
        ({"r": 0}, "adapter_config.json needs r and lora_alpha, got 0, 3"),
        ({"r": 2.0}, "adapter_config.json needs r and lora_alpha, got 2.0, 3"),
        ({"lora_alpha": "3"}, "adapter_config.json needs r and lora_alpha, got 2, 3"),
    ],
)
def test_settings_that_the_formula_does_not_cover(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="adapter_config") as error:
        lora.merge({"q.weight": torch.zeros(2, 3)}, adapter(tmp_path, **settings))
    assert str(error.value).startswith(f"{tmp_path}: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q.lora_A.weight": None}, ": base_model.model.q lacks its lora_A.weight"),
        ({"q.lora_B.weight": None}, ": base_model.model.q lacks its lora_B.weight"),
        (
            {"q.lora_A.weight": torch.zeros(2, 4)},
            ": base_model.model.q has the shapes [2, 2] and [2, 4], which do not fit [2, 3]",
        ),
        (
            {"q.lora_A.weight": torch.zeros(3, 3)},
            ": base_model.model.q has the shapes [2, 2] and [3, 3], which do not fit [2, 3]",
        ),
        ({"v.lora_A.weight": A.clone()}, " changes v.weight, which its base does not have"),
        ({"q.bias": A.clone()}, " holds a tensor base_model.model.q.bias, which is no LoRA weight"),
    ],
)
def test_pairs_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = adapter(tmp_path)
    pair = {"q.lora_A.weight": A, "q.lora_B.weight": B} | changes
    kept = {f"{PREFIX}{name}": tensor for name, tensor in pair.items() if tensor is not None}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"base_model|changes") as error:
        lora.merge({"q.weight": torch.zeros(2, 3)}, source)
    assert str(error.value) == f"{tmp_path}{message}"
