"""Optional ways to load a base: a PEFT adapter, 4 bits. What they need may be missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrpn.backbones.fingerprint import base_hash
from sdrpn.backbones.llava15 import Llava15
from sdrpn.io.extras import MissingExtra
from sdrpn_eval import loading
from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.model import LlavaSdrpn
from tests.conftest import make_llava


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llava = make_llava()
    llava.model.save_pretrained(tmp_path / "base")
    llava.processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_adapter(folder: Path, targets: str, **settings: Any) -> dict[str, torch.Tensor]:
    """A LoRA adapter that changes something; returns what it adds to each weight."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **settings)
    model = peft.get_peft_model(make_llava().model, config)
    changes = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_B") and module.lora_B:
            torch.nn.init.normal_(module.lora_B["default"].weight)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            changes[f"{name}.weight"] = (1.5 * b @ a).detach()
    model.save_pretrained(folder)
    return changes


def test_an_adapter_is_merged_into_the_base(base: Path, tmp_path: Path) -> None:
    changes = write_adapter(tmp_path / "adapter", r".*language_model.*(q_proj|down_proj)")
    plain = Llava15.load(str(base), dtype="float32", device="cpu")
    changed = Llava15.load(str(base), peft=str(tmp_path / "adapter"), dtype="float32", device="cpu")
    before, after = plain.model.state_dict(), changed.model.state_dict()
    assert len(changes) == 12
    assert set(before) == set(after)
    for name, weight in before.items():
        expected = weight + changes[name] if name in changes else weight
        assert torch.allclose(after[name], expected, atol=1e-5), name
    assert type(changed.model) is type(plain.model)
    assert not any(weight.requires_grad for weight in changed.model.parameters())
    assert base_hash(changed, 2) != base_hash(plain, 2)


def test_the_plugin_passes_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        loading.ZoomModel, "from_pretrained", lambda *names, **options: asked.append(options)
    )
    given = {"proposer": "none", "peft": "my/adapter", "load_in_4bit": True}
    loading.load_engine(LlavaArguments.of(given), torch.device("cpu"))
    loading.load_engine(LlavaArguments.of({"proposer": "none"}), torch.device("cpu"))
    assert (asked[0]["peft"], asked[0]["load_in_4bit"]) == ("my/adapter", True)
    assert ("peft" in asked[1], asked[1]["load_in_4bit"]) == (False, False)


def test_they_are_set_when_an_engine_is_made() -> None:
    from tests.helpers.fake_engine import FakeEngine

    with pytest.raises(ValueError, match="peft, load_in_4bit: set when the ZoomModel was made"):
        LlavaSdrpn(pretrained=FakeEngine(), peft="my/adapter", load_in_4bit=True)


def test_values_of_the_wrong_type() -> None:
    with pytest.raises(ValueError, match="load_in_4bit must be True or False, got 'nf4'"):
        LlavaArguments.of({"load_in_4bit": "nf4"})
    with pytest.raises(ValueError, match=r"peft must be text, .*got True"):
        LlavaArguments.of({"peft": True})


# --- what may be missing -------------------------------------------------------------------------


def test_without_peft_it_says_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        MissingExtra, match=r"peft=my/adapter needs peft: pip install 'sdrpn\[peft\]'"
    ):
        Llava15.load(str(base), peft="my/adapter", device="cpu")


def test_without_bitsandbytes_it_says_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"load_in_4bit needs .*: pip install 'sdrpn\[4bit\]'"):
        Llava15.load(str(base), load_in_4bit=True, device="cpu")


def test_an_adapter_that_is_not_there(base: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"adapter_config.json of no/adapter: it is not in the cache"
    ):
        Llava15.load(str(base), peft="no/adapter", device="cpu")


def test_an_adapter_for_other_names(base: Path, tmp_path: Path) -> None:
    """PEFT would warn and go on with an adapter that changes nothing."""
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path / "adapter", r".*language_model.*q_proj")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {n.replace("language_model.", "decoder."): t for n, t in load_file(path).items()}
    save_file(renamed, path)
    with pytest.raises(
        ValueError, match=r"cannot be applied to the base model: .*missing"
    ) as error:
        Llava15.load(str(base), peft=str(tmp_path / "adapter"), device="cpu")
    assert "sdrpn convert base FOLDER --base BASE" in str(error.value)


def test_an_adapter_of_another_size(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", r".*language_model.*q_proj")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))
    with pytest.raises(ValueError, match=r"applied to the base model: Error\(s\) in loading"):
        Llava15.load(str(base), peft=str(tmp_path / "adapter"), device="cpu")


def test_an_adapter_that_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"num_layers": 6, "token_dim": 128, "num_attention_heads": 4}
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(make_llava().model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, which cannot be merged"):
        Llava15.load(str(base), peft=str(tmp_path / "adapter"), device="cpu")


def test_four_bits(base: Path) -> None:
    """Of the language model only: the projector and the tower stay as they are."""
    pytest.importorskip("bitsandbytes")
    llava = Llava15.load(str(base), load_in_4bit=True, dtype="float32", device="cpu")
    types = {name: weight.dtype for name, weight in llava.model.named_parameters()}
    packed = {name for name, kind in types.items() if kind == torch.uint8}
    assert len(packed) == 6 * 7
    assert all(".language_model.layers." in name for name in packed)
    assert set(types.values()) == {torch.uint8, torch.float32}
    assert llava.dtype == torch.float32
    assert base_hash(llava, 2) == ""
