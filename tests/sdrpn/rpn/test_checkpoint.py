"""RPNs copied from a backbone, attached to one, saved and loaded: what each must hold and say."""

from __future__ import annotations

import inspect
import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import LABELS_7B, ZoomConfig
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import make_llava, make_rpn

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "image_tokens": 64,
    "branch_layer": 2,
    "depth": 3,
}


@pytest.fixture
def saved(tmp_path: Path, perturbed_rpn: RPN) -> Path:
    perturbed_rpn.save_pretrained(tmp_path / "rpn")
    return tmp_path / "rpn"


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# --- copies --------------------------------------------------------------------------------------


def test_a_copy_has_the_weights_of_the_layers_it_replaces(llava: Llava15) -> None:
    """B = 1 and R = 4: own layers 1, 2 and 3, and the map head of layer 4."""
    rpn = RPN.from_backbone(llava, 1, 4)
    theirs: Any = [layer for _, layer in llava.layers]
    assert len(rpn.layers) == 3
    for own, layer in zip(rpn.layers, theirs[1:4], strict=True):
        expected = layer.state_dict()
        assert own.state_dict().keys() == expected.keys()
        for name, weight in own.state_dict().items():
            assert torch.equal(weight, expected[name]), name
            assert weight.data_ptr() != expected[name].data_ptr()
    assert torch.equal(rpn.norm.weight, llava.decoder.norm.weight)
    assert torch.equal(rpn.map_norm.weight, theirs[4].input_layernorm.weight)
    assert torch.equal(rpn.q_proj.weight, theirs[4].self_attn.q_proj.weight)
    assert torch.equal(rpn.k_proj.weight, theirs[4].self_attn.k_proj.weight)
    assert rpn.facts == {}


def test_a_copy_knows_its_base_and_what_it_is_for(llava: Llava15) -> None:
    zoom = ZoomConfig(threshold=0.3)
    config = RPN.from_backbone(llava, 2, 3, zoom=zoom, labels=LABELS_7B).config
    assert {name: getattr(config, name) for name in SIZES} == SIZES
    assert (config.zoom, config.labels) == (zoom, LABELS_7B)
    assert (config.base_model, config.padding) == (llava.name, "pad")
    assert re.fullmatch("[0-9a-f]{16}", config.base_hash)
    plain = RPN.from_backbone(llava, 2, 3).config
    assert (plain.zoom, plain.labels) == (ZoomConfig(), None)
    # Another branch layer reads more of the base.
    assert RPN.from_backbone(llava, 3, 3).config.base_hash != config.base_hash
    cropping = Llava15(llava.model, llava.processor, padding="crop")
    assert RPN.from_backbone(cropping, 2, 3).config.padding == "crop"


def test_the_published_depths_are_the_defaults() -> None:
    parameters = inspect.signature(RPN.from_backbone).parameters
    assert (parameters["branch_layer"].default, parameters["depth"].default) == (15, 3)


def test_a_copy_needs_as_many_layers_as_it_replaces(llava: Llava15) -> None:
    assert RPN.from_backbone(llava, 3, 3).config.depth == 3
    with pytest.raises(
        ValueError, match=r"branch_layer 4 \+ depth 3 must be .*the backbone's 6 layers"
    ):
        RPN.from_backbone(llava, 4, 3)


def test_a_copy_is_of_its_backbone_s_type_and_attention() -> None:
    llava = make_llava()
    llava.model.half()
    llava.model.set_attn_implementation("eager")
    rpn = RPN.from_backbone(llava, 2, 3)
    assert {p.dtype for p in rpn.parameters()} == {torch.float16}
    layers: Any = rpn.layers
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}


def test_attention_is_sdpa_unless_told(perturbed_rpn: RPN) -> None:
    for words, expected in (((), "sdpa"), (("eager",), "eager")):
        layers: Any = RPN(perturbed_rpn.config, *words).layers
        assert {layer.self_attn.config._attn_implementation for layer in layers} == {expected}


# --- on a backbone -------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_named(llava: Llava15, perturbed_rpn: RPN) -> None:
    perturbed_rpn.check_fits(llava)
    odd = replace(perturbed_rpn.config, hidden_size=64, image_tokens=9, base_model="a base")
    with torch.device("meta"):
        wide, deep = RPN(odd), RPN(replace(perturbed_rpn.config, branch_layer=4, base_model=""))
    with pytest.raises(ValueError, match="does not fit") as error:
        wide.check_fits(llava)
    assert str(error.value) == (
        f"this RPN was made for a base and does not fit {llava.name}: it has hidden_size 64 (the "
        "model has 128), image_tokens 9 (the model has 64)"
    )
    with pytest.raises(ValueError, match="does not fit") as error:
        deep.check_fits(llava)
    assert str(error.value) == (
        f"this RPN was made for an unnamed base model and does not fit {llava.name}: it has 4 + 3 "
        "layers (the model has 6)"
    )
    with pytest.raises(ValueError, match="does not fit"):
        deep.attach(llava)
    with torch.device("meta"):
        RPN(replace(perturbed_rpn.config, branch_layer=3)).check_fits(llava)  # just fits


def test_it_takes_the_backbone_s_type_and_attention(llava: Llava15) -> None:
    base = make_llava()
    base.model.set_attn_implementation("eager")
    rpn = make_rpn(llava, perturbed=True)
    layers: Any = rpn.layers
    shared = [layer.self_attn.config for layer in layers]
    rpn.to(torch.float16)
    assert rpn.attach(base) is rpn
    assert {p.dtype for p in rpn.parameters()} == {torch.float32}
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}
    # In a configuration of its own: others may share the one it had.
    assert {config._attn_implementation for config in shared} == {"sdpa"}
    assert rpn.attach(base, torch.bfloat16).q_proj.weight.dtype == torch.bfloat16


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sdrpn.rpn.checkpoint"]


def test_another_padding_is_told_of(llava: Llava15, caplog: pytest.LogCaptureFixture) -> None:
    cropping = Llava15(llava.model, llava.processor, padding="crop", name="a base")
    rpn = make_rpn(llava, perturbed=False)
    with caplog.at_level(logging.WARNING):
        rpn.attach(llava)
        assert warnings_of(caplog) == []
        rpn.attach(cropping)
    assert warnings_of(caplog) == [
        "this RPN was trained with padding=pad and a base is loaded with padding=crop: its maps "
        "may be off; load it with padding=pad"
    ]
    caplog.clear()
    rpn.config = replace(rpn.config, padding="")  # not known
    with caplog.at_level(logging.WARNING):
        rpn.attach(cropping)
    assert warnings_of(caplog) == []


def test_another_base_is_named(llava: Llava15, caplog: pytest.LogCaptureFixture) -> None:
    rpn, other = make_rpn(llava, perturbed=False), make_llava(seed=8)
    rpn.config = replace(rpn.config, base_hash="0123", base_model="")
    with caplog.at_level(logging.WARNING):
        rpn.attach(other)
    (told,) = warnings_of(caplog)
    start = "this RPN was trained on an unnamed base model (weights 0123) and now reads "
    assert told.startswith(f"{start}{other.name} (weights ")


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_holds_weights_settings_and_a_card(saved: Path, perturbed_rpn: RPN) -> None:
    assert {p.name for p in saved.iterdir()} == {"README.md", "config.json", "rpn.safetensors"}
    stored = load_file(saved / "rpn.safetensors")
    expected = perturbed_rpn.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    with safe_open(saved / "rpn.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it
    config = json.loads((saved / "config.json").read_text())
    assert config["facts"] == {}
    assert {name: config[name] for name in SIZES} == SIZES
    assert config["zoom"] == asdict(perturbed_rpn.config.zoom)


def test_the_card_says_what_it_is_and_how_it_was_trained(llava: Llava15, tmp_path: Path) -> None:
    rpn = make_rpn(llava, perturbed=False)
    rpn.facts = {"samples": 7, "final loss": 0.25}
    rpn.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"\nbase_model: {llava.name}\n" in card
    assert f"# Region proposal network for {llava.name}\n" in card
    count = sum(p.numel() for p in rpn.parameters())
    assert f"output of the backbone's layer 1 and has {count:,} parameters (3\nlayers)" in card
    assert card.rstrip().endswith("## Training facts\n\n- samples: 7\n- final loss: 0.25")
    assert RPN.from_pretrained(tmp_path).facts == rpn.facts
    rpn.facts, rpn.config = {}, replace(rpn.config, base_model="")
    rpn.save_pretrained(tmp_path)  # over it
    card = (tmp_path / "README.md").read_text()
    assert "# Region proposal network for unknown\n" in card
    assert card.rstrip().endswith("Not trained: a copy of the backbone's layers.")


def test_broken_weights_are_named_with_the_folder_they_were_for(
    llava: Llava15, tmp_path: Path
) -> None:
    rpn = make_rpn(llava, perturbed=False)
    rpn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite") as error:
        rpn.save_pretrained(tmp_path / "rpn")
    assert str(error.value) == (
        f"the RPN for {tmp_path / 'rpn'}: k_proj.weight holds values that are not finite; "
        "training diverged: use a lower learning rate"
    )
    assert not (tmp_path / "rpn").exists()


def test_what_is_saved_can_be_published_at_once(
    perturbed_rpn: RPN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the options of huggingface_hub's mixin."""
    pushed: list[dict[str, Any]] = []
    monkeypatch.setattr(RPN, "push_to_hub", lambda _, **options: pushed.append(options))
    perturbed_rpn.save_pretrained(tmp_path)
    assert pushed == []
    perturbed_rpn.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/my-rpn")
    assert [options["repo_id"] for options in pushed] == ["me/my-rpn"]


def test_what_is_loaded_is_frozen_and_in_evaluation(saved: Path, perturbed_rpn: RPN) -> None:
    loaded = RPN.from_pretrained(saved)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config == perturbed_rpn.config
    assert loaded.facts == {}
    edit(saved, facts=None)
    assert RPN.from_pretrained(saved).facts == {}


def test_weights_of_several_types_come_in_the_widest(saved: Path) -> None:
    """float16 and bfloat16 fit into float32 only."""
    stored = load_file(saved / "rpn.safetensors")
    types = [torch.float16, torch.bfloat16]
    mixed = {n: t.to(types[i % 2]) for i, (n, t) in enumerate(stored.items())}
    save_file(mixed, saved / "rpn.safetensors")
    loaded = RPN.from_pretrained(saved)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, mixed[name].float()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": [1]}, r"is not an sdrpn RPN checkpoint: facts must be an object, got \[1\]"),
        ({"depth": 0}, "is not an sdrpn RPN checkpoint: "),
        ({"hidden_size": None}, "is not an sdrpn RPN checkpoint: .*hidden_size"),
        ({"colour": 1}, "is not an sdrpn RPN checkpoint: .*colour"),
        ({"intermediate_size": 300}, "weights and config disagree: .*size mismatch"),
        ({"depth": 2}, "weights and config disagree: .*Unexpected key"),
        ({"depth": 500}, "weights and config disagree: 22 tensors are too few for 500 layers"),
    ],
)
def test_folders_that_make_no_sense_are_named(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message) as error:
        RPN.from_pretrained(saved)
    assert str(error.value).startswith(str(saved))
    assert len(str(error.value)) < len(str(saved)) + 600
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["rpn.safetensors", "config.json"])
def test_a_file_that_is_missing_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(FileNotFoundError) as error:
        RPN.from_pretrained(saved)
    assert str(error.value) == f"{saved} holds no {file}: it is not an RPN checkpoint"
