"""The authors' Qwen2.5-VL checkpoints: a whole model with the RPN inside, or a pruned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdrpn.backbones import qwen25_vl_published as qwen_published
from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.backbones.registry import load_backbone
from sdrpn.config import ZoomConfig
from sdrpn.engine import ZoomModel
from sdrpn.io.checkpoint_files import Source
from sdrpn.rpn.checkpoint import RPN
from sdrpn.rpn.published import read_config
from tests.conftest import make_llava
from tests.helpers.qwen_tiny import authors_tensors, make_qwen, make_rpn, write_checkpoint

KEYS = {
    "enable_twig": True,
    "twig_K": 2,
    "twig_T": 3,
    "roi_branch": True,
    "roi_source": "qk",
    "roi_loss": "bce",
    "roi_super_type": "v1",
    "roi_multi_head": True,
}


@pytest.fixture(scope="module")
def qwen() -> Qwen25VL:
    return make_qwen()


@pytest.fixture(scope="module")
def rpn(qwen: Qwen25VL) -> RPN:
    return make_rpn(qwen, perturbed=True)


@pytest.fixture
def filled(qwen: Qwen25VL, rpn: RPN, tmp_path: Path) -> Path:
    more = authors_tensors(rpn, qwen.model.lm_head.weight)
    return write_checkpoint(qwen, tmp_path / "filled", more=more, **KEYS)


def prune(folder: Path, first: int) -> None:
    """Take the layers from `first` on, the norm and the head out; config.json stays."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = {f"model.layers.{i}." for i in range(first, 6)} | {"model.norm.", "lm_head."}
    for file in sorted(folder.glob("*.safetensors")):
        kept = {n: t for n, t in load_file(file).items() if not n.startswith(tuple(gone))}
        save_file(kept, file, metadata={"format": "pt"})
    where = {n: f for n, f in index["weight_map"].items() if not n.startswith(tuple(gone))}
    path.write_text(json.dumps(index | {"weight_map": where}))


def same_weights(found: RPN, expected: RPN) -> None:
    theirs = expected.state_dict()
    assert set(found.state_dict()) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("layout", ["filled", "pruned"])
def test_an_rpn_is_read_as_it_is(rpn: RPN, qwen: Qwen25VL, filled: Path, layout: str) -> None:
    if layout == "pruned":
        prune(filled, 5)
    found = RPN.from_pretrained(filled)
    same_weights(found, rpn)
    assert (found.config.branch_layer, found.config.depth) == (2, 3)
    assert (found.config.backbone, found.config.zoom.threshold) == ("qwen2_5_vl", 0.1)
    ZoomModel(qwen, found)


def test_sizes_in_an_object_of_their_own(rpn: RPN, filled: Path) -> None:
    """As transformers 5 writes config.json."""
    path = filled / "config.json"
    values = json.loads(path.read_text())
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names += ("rms_norm_eps", "num_hidden_layers")
    values["text_config"] = {name: values.pop(name) for name in names}
    path.write_text(json.dumps(values))
    same_weights(RPN.from_pretrained(filled), rpn)


def test_only_shards_with_the_rpn_are_read(
    rpn: RPN, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((filled / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if "twig_layers" in name}
    # One shard that holds no RPN is taken away, as if it had never been fetched.
    tensors = {n: t for file in needed for n, t in load_file(filled / file).items()}
    own = {n: t for n, t in tensors.items() if "twig" in n}
    for file in filled.glob("*.safetensors"):
        file.unlink()
    save_file(own, filled / "only.safetensors", metadata={"format": "pt"})
    where = {n: "only.safetensors" if n in own else "gone.safetensors" for n in index}
    (filled / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    same_weights(RPN.from_pretrained(filled), rpn)


def test_a_whole_model_with_an_rpn_is_a_base_too(qwen: Qwen25VL, filled: Path) -> None:
    loaded = load_backbone(str(filled), dtype="float32")
    ours = qwen.model.state_dict()
    assert all(torch.equal(tensor, ours[n]) for n, tensor in loaded.model.state_dict().items())


def test_a_pruned_model_is_no_base(filled: Path) -> None:
    prune(filled, 5)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight and 13 more tensors"):
        load_backbone(str(filled), dtype="float32")


def test_a_model_without_an_rpn_is_told_so(qwen: Qwen25VL, tmp_path: Path) -> None:
    folder = write_checkpoint(qwen, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"is a Qwen2\.5-VL without an RPN"):
        RPN.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"roi_source": "hidden"}, "roi_source is 'hidden'"),
        ({"twig_K": 0}, "twig_K in config.json must be 1 to"),
        ({"roi_multi_head": None}, "roi_multi_head in config.json must be a bool"),
        ({"hidden_size": 128}, "has the shape"),
    ],
)
def test_configs_that_do_not_fit(filled: Path, change: dict[str, Any], told: str) -> None:
    path = filled / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=told):
        RPN.from_pretrained(filled)


@pytest.mark.parametrize("hidden", [2048, 3584])
def test_published_sizes_know_their_base_and_heads(filled: Path, hidden: int) -> None:
    path = filled / "config.json"
    heads = {2048: 16, 3584: 28}[hidden]
    values = json.loads(path.read_text()) | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
    }
    config = read_config(values, Source(str(filled)))
    size = qwen_published.size_of(hidden)
    assert size is not None
    assert config.base_model == f"Qwen/Qwen2.5-VL-{'3B' if hidden == 2048 else '7B'}-Instruct"
    assert config.labels == size.labels


def test_a_size_that_nobody_published_has_no_base_and_no_heads(filled: Path) -> None:
    values = json.loads((filled / "config.json").read_text())
    config = read_config(values, Source(str(filled)))
    assert (config.backbone, config.image_tokens, config.padding) == ("qwen2_5_vl", None, "")
    assert (config.base_model, config.labels) == ("", None)
    assert config.zoom == ZoomConfig(threshold=0.1, policy="mask")
    assert (config.head_bias, config.rotary_head, config.final_norm) == (True, True, False)


def test_an_rpn_on_a_base_of_another_size(qwen: Qwen25VL, rpn: RPN) -> None:
    wide = make_qwen()
    wide.text_config.intermediate_size = 112
    with pytest.raises(ValueError, match=r"random-qwen-7 and does not fit .*intermediate_size 96"):
        ZoomModel(wide, rpn)


def test_an_rpn_on_a_base_of_another_family(rpn: RPN) -> None:
    llava = make_llava()
    with pytest.raises(
        ValueError, match=r"does not fit .*backbone qwen2_5_vl \(the model has llava"
    ):
        ZoomModel(llava, rpn)


def test_llavas_rpn_on_qwen(qwen: Qwen25VL) -> None:
    llava = make_llava()
    with pytest.raises(
        ValueError, match=r"does not fit .*backbone llava \(the model has qwen2_5_vl"
    ):
        ZoomModel(qwen, RPN.from_backbone(llava, 2, 3))
