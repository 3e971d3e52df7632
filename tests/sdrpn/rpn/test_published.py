"""RPN checkpoints as the paper's authors publish them, in small: read as they are, converted."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdrpn.backbones.fingerprint import base_hash
from sdrpn.backbones.llava15 import Llava15
from sdrpn.cli import app
from sdrpn.config import LABELS_7B, LABELS_13B, ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.io import checkpoint_files as checkpoint
from sdrpn.model_registry import PUBLISHED_RPN
from sdrpn.rpn import published
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval import loading
from sdrpn_eval.args import LlavaArguments
from tests.conftest import DEPTH, QUESTIONS, make_llava, make_rpn
from tests.helpers import original_layout as original

runner = CliRunner()

SIZE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SIZE_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
TWIG = {"twig_K": 15, "twig_T": 3, "roi_multi_head": True, "rms_norm_eps": 1e-5}
CLIP = "openai/clip-vit-large-patch14-336"


@pytest.fixture
def tensors(llava: Llava15, perturbed_rpn: RPN) -> original.Tensors:
    """ "Filled": the whole base and the RPN, as of the 7B."""
    return original.base_tensors(llava.model) | original.rpn_tensors(perturbed_rpn)


@pytest.fixture
def folder(tmp_path: Path, llava: Llava15, perturbed_rpn: RPN, tensors: original.Tensors) -> Path:
    path = tmp_path / "published"
    original.write_config(path, original.config_of(llava, perturbed_rpn))
    original.one_safetensors(path, tensors)
    return path


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def same_weights(found: RPN, expected: RPN) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    assert len(ours) == 9 * (DEPTH - 1) + 4
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# --- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("write", original.WRITERS)
def test_every_layout_gives_the_rpn(
    tmp_path: Path,
    llava: Llava15,
    perturbed_rpn: RPN,
    tensors: original.Tensors,
    write: Callable[[Path, original.Tensors], None],
) -> None:
    original.write_config(tmp_path, original.config_of(llava, perturbed_rpn))
    write(tmp_path, tensors)
    found = RPN.from_pretrained(str(tmp_path))
    same_weights(found, perturbed_rpn)
    assert found.config.zoom == ZoomConfig(threshold=0.15, policy="mask")
    own = replace(found.config, base_model=llava.name, base_hash=base_hash(llava, 2))
    assert own == perturbed_rpn.config
    assert not any(weight.requires_grad for weight in found.parameters())


def test_its_maps_are_those_of_the_rpn(
    folder: Path, llava: Llava15, perturbed_rpn: RPN, images: list[Any]
) -> None:
    def maps(rpn: RPN) -> list[Any]:
        questions = [Question(text, (images[i],)) for i, text in enumerate(QUESTIONS)]
        return [answer.roi_map for answer in ZoomModel(llava, rpn).ask_batch(questions)]

    expected = maps(perturbed_rpn)
    found = maps(RPN.from_pretrained(str(folder)))
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    assert len({a.tobytes() for a in expected}) == len(QUESTIONS)


def test_a_pruned_model_is_enough(
    tmp_path: Path, llava: Llava15, perturbed_rpn: RPN, tensors: original.Tensors
) -> None:
    """As the 13B: no layer above B + R, no final norm, no head, and config.json counts so."""
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in ("model.norm.weight", "lm_head.weight")
        and not name.startswith("model.layers.5.")
    }
    assert len(kept) == len(tensors) - 11
    config = original.config_of(llava, perturbed_rpn, num_hidden_layers=5)
    original.write_config(tmp_path, config)
    original.sharded_bin(tmp_path, kept)
    loaded = RPN.from_pretrained(str(tmp_path))
    same_weights(loaded, perturbed_rpn)
    ZoomModel(llava, loaded)


@pytest.mark.parametrize("write", [original.sharded_bin, original.sharded_safetensors])
def test_only_the_rpn_s_shards_are_fetched(
    tmp_path: Path,
    llava: Llava15,
    perturbed_rpn: RPN,
    tensors: original.Tensors,
    write: Callable[[Path, original.Tensors], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original.write_config(tmp_path, original.config_of(llava, perturbed_rpn))
    write(tmp_path, tensors)
    fetched = []

    def download(repo: str, file: str, revision: str | None = None) -> str:
        assert (repo, revision) == ("authors/rpn", "v2")
        if not (tmp_path / file).exists():
            raise LocalEntryNotFoundError("not there")
        fetched.append(file)
        return str(tmp_path / file)

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    same_weights(RPN.from_pretrained("authors/rpn", revision="v2"), perturbed_rpn)
    index = next(tmp_path.glob("*.index.json")).name
    shards = sorted(path.name for path in tmp_path.glob("*-of-00003.*"))
    assert len(shards) == 3
    assert sorted(set(fetched)) == sorted(["config.json", index, *shards[1:]])


def test_base_shards_need_not_be_there(
    tmp_path: Path, llava: Llava15, perturbed_rpn: RPN, tensors: original.Tensors
) -> None:
    original.write_config(tmp_path, original.config_of(llava, perturbed_rpn))
    original.sharded_bin(tmp_path, tensors)
    (tmp_path / "pytorch_model-00001-of-00003.bin").unlink()
    same_weights(RPN.from_pretrained(str(tmp_path)), perturbed_rpn)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no pytorch_model-00002-of-00003.bin"):
        RPN.from_pretrained(str(tmp_path))


def test_a_whole_number_is_a_float_too(folder: Path) -> None:
    edit(folder, rms_norm_eps=1)
    assert RPN.from_pretrained(str(folder)).config.rms_norm_eps == 1


def test_half_precision_stays(folder: Path, perturbed_rpn: RPN, llava: Llava15) -> None:
    stored = load_file(folder / "model.safetensors")
    original.one_safetensors(folder, {n: t.to(torch.bfloat16) for n, t in stored.items()})
    loaded = RPN.from_pretrained(str(folder))
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    half = perturbed_rpn.q_proj.weight.to(torch.bfloat16)
    assert torch.equal(loaded.q_proj.weight, half)
    assert ZoomModel(llava, loaded).rpn is not None


def test_one_dot_product_over_the_width(folder: Path) -> None:
    assert RPN.from_pretrained(str(folder)).config.multi_head
    edit(folder, roi_multi_head=False)
    assert not RPN.from_pretrained(str(folder)).config.multi_head


@pytest.mark.parametrize(
    ("ratio", "padding"),
    [("pad", "pad"), ("square", "crop"), ("anyres", ""), (None, ""), (["pad"], "")],
)
def test_its_padding_is_noted(folder: Path, ratio: Any, padding: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"image_aspect_ratio": ratio}
    (folder / "config.json").write_text(json.dumps(config))
    assert RPN.from_pretrained(str(folder)).config.padding == padding


def test_it_must_still_fit_its_base(folder: Path, gqa_llava: Llava15, llava: Llava15) -> None:
    with pytest.raises(ValueError, match=r"num_key_value_heads 4 \(the model has 2\)"):
        ZoomModel(gqa_llava, RPN.from_pretrained(str(folder)))
    edit(folder, mm_vision_tower=CLIP)
    with pytest.raises(ValueError, match=r"image_tokens 576 \(the model has 64\)"):
        ZoomModel(llava, RPN.from_pretrained(str(folder)))


# --- what config.json says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "layers", "labels", "base"),
    [
        (SIZE_7B, 32, LABELS_7B, "llava-hf/llava-1.5-7b-hf"),
        (SIZE_13B, 40, LABELS_13B, "llava-hf/llava-1.5-13b-hf"),
        (SIZE_13B, 18, LABELS_13B, "llava-hf/llava-1.5-13b-hf"),
    ],
)
def test_published_sizes(
    tmp_path: Path, size: dict[str, int], layers: int, labels: Any, base: str
) -> None:
    values = {**size, **TWIG, "num_hidden_layers": layers, "mm_vision_tower": CLIP}
    config = published.read_config(values, checkpoint.Source(str(tmp_path)))
    assert (config.hidden_size, config.intermediate_size) == tuple(size.values())[:2]
    assert config.num_key_value_heads == config.num_attention_heads == size["num_attention_heads"]
    assert (config.branch_layer, config.depth, config.multi_head) == (15, 3, True)
    assert (config.image_tokens, config.rms_norm_eps) == (576, 1e-5)
    assert (config.labels, config.base_model, config.base_hash) == (labels, base, "")
    assert config.zoom == ZoomConfig(threshold=0.15, policy="mask")


def test_a_size_that_nobody_published(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    config = published.read_config(values, checkpoint.Source(str(folder)))
    assert (config.hidden_size, config.base_model, config.labels) == (128, "", None)
    assert (config.backbone, config.image_tokens) == ("llava", 64)
    assert config.zoom == ZoomConfig(threshold=0.15, policy="mask")


def test_the_smallest_and_the_largest_numbers_of_a_config(tmp_path: Path) -> None:
    values = {**SIZE_7B, **TWIG, "hidden_size": 1 << 20, "num_attention_heads": 1, "twig_K": 1000}
    config = published.read_config(values, checkpoint.Source(str(tmp_path)))
    assert (config.hidden_size, config.branch_layer) == (1048576, 1000)
    assert (config.num_attention_heads, config.num_key_value_heads) == (1, 1)


def test_the_tower_is_a_folder_of_the_checkpoint_or_as_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    source = checkpoint.Source(str(tmp_path))
    found = published.tower_of({"mm_vision_tower": "tower"}, source)
    assert found == str(tmp_path / "tower")
    assert published.tower_of({"mm_vision_tower": CLIP}, source) == CLIP
    with pytest.raises(ValueError, match=r"config\.json has no mm_vision_tower$"):
        published.tower_of({}, source)


@pytest.mark.parametrize(
    ("values", "theirs"),
    [
        ({"model_type": "llava"}, True),
        ({"model_type": "llava_llama"}, True),
        ({"twig_K": 15}, True),
        ({"model_type": "mistral"}, False),
        ({"branch_layer": 15}, False),
    ],
)
def test_whose_config_it_is(values: dict[str, Any], theirs: bool) -> None:
    assert published.is_published(values) is theirs


@pytest.mark.parametrize(
    ("tower", "tokens"),
    [
        (CLIP, 576),
        ("/home/authors/models/clip-vit-large-patch14-336", 576),
        ("clip-vit-small-patch16-224", 196),
        ("a-tower-that-does-not-tell", 576),
        ("tower", 16),
        ("finest", 64),
        (None, 576),
    ],
)
def test_image_tokens(tmp_path: Path, tower: str | None, tokens: int) -> None:
    original.write_config(tmp_path / "tower", {"image_size": 56, "patch_size": 14})
    original.write_config(tmp_path / "finest", {"image_size": 8, "patch_size": 1})
    values = {"mm_vision_tower": tower} if tower else {}
    assert published.image_tokens(values, checkpoint.Source(str(tmp_path))) == tokens


def test_a_whole_clip_has_its_sizes_in_its_vision_config(tmp_path: Path) -> None:
    sizes = {"vision_config": {"image_size": 112, "patch_size": 14}, "image_size": 999}
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(sizes))
    values = {"mm_vision_tower": "tower"}
    assert published.image_tokens(values, checkpoint.Source(str(tmp_path))) == 64


@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": "336", "patch_size": 14},
        {"image_size": 112, "patch_size": "14"},
        {"image_size": 112, "patch_size": 0},
        {"image_size": 112},
        {},
    ],
)
def test_a_tower_that_makes_no_sense_is_taken_for_llava_1_5_s(
    tmp_path: Path, sizes: dict[str, Any]
) -> None:
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps({"vision_config": sizes}))
    values = {"mm_vision_tower": "tower"}
    assert published.image_tokens(values, checkpoint.Source(str(tmp_path))) == 576


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"twig_K": None}, r"config.json has no twig_K$"),
        ({"twig_T": None}, r"config.json has no twig_T$"),
        ({"hidden_size": 1048704}, r"hidden_size in config.json must be 1 to 1048576, got 1048704"),
        ({"twig_K": None, "twig_T": None}, r"is a LLaVA without an RPN: .* no twig_K and twig_T"),
        ({"twig_K": 0}, r"twig_K in config.json must be 1 to 1000, got 0"),
        ({"twig_T": "3"}, r"twig_T in config.json must be a int, got '3'"),
        ({"twig_T": True}, r"twig_T in config.json must be a int, got True"),
        ({"roi_multi_head": None}, r"config.json has no roi_multi_head"),
        ({"roi_multi_head": 1}, r"roi_multi_head in config.json must be a bool, got 1"),
        ({"roi_source": "hidden_states"}, r"roi_source is 'hidden_states'"),
        ({"hidden_size": None}, r"config.json has no hidden_size"),
        (
            {"num_key_value_heads": "4"},
            r"^\S+: num_key_value_heads in config.json must be a int, got '4'$",
        ),
        ({"num_attention_heads": 3}, r"hidden_size 128 is not a multiple of 3 heads"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps in config.json must be a float, got 'small'"),
        ({"twig_T": 2}, r"holds a tensor model.twig_layers.2.\S+ \(and 8 more\)"),
        ({"twig_T": 4}, r"lacks model.twig_layers.2|lacks model.twig_layers.3.input_layernorm"),
        (
            {"intermediate_size": 300},
            r"model.twig_layers.0.mlp.\w+_proj.weight has the shape \[\d+, \d+\], but config.json",
        ),
        ({"num_key_value_heads": 2}, r"self_attn.[kv]_proj.weight has the shape \[128, 128\], but"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    RPN.from_pretrained(str(folder))
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        RPN.from_pretrained(str(folder))
    assert str(folder) in str(error.value)


# --- broken checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.twig_layers.0.mlp.extra.weight",
        "model.twig_layers.3.input_layernorm.weight",
        "model.twig_layers.0.self_attn.q_proj.bias",
        "model.twig_norm.bias",
        "twig_tail.weight",
    ],
)
def test_unknown_names_fail(folder: Path, tensors: original.Tensors, name: str) -> None:
    original.one_safetensors(folder, tensors | {name: torch.zeros(2)})
    with pytest.raises(ValueError, match=f"holds a tensor {name}, which is not in its layout"):
        RPN.from_pretrained(str(folder))


def test_names_beside_the_rpn_s_do_not_matter(
    folder: Path, tensors: original.Tensors, perturbed_rpn: RPN
) -> None:
    more = {"model.image_newline": torch.zeros(2)}
    more["model.twig_layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    original.one_safetensors(folder, tensors | more)
    same_weights(RPN.from_pretrained(str(folder)), perturbed_rpn)


@pytest.mark.parametrize(
    "name",
    [
        "model.twig_norm.weight",
        "model.twig_layers.0.mlp.up_proj.weight",
        "model.twig_layers.2.self_attn.k_proj.weight",
    ],
)
def test_missing_tensors_are_named(folder: Path, tensors: original.Tensors, name: str) -> None:
    del tensors[name]
    original.one_safetensors(folder, tensors)
    with pytest.raises(ValueError, match=f"lacks {name}$"):
        RPN.from_pretrained(str(folder))


def test_unused_tensors_may_be_missing(
    folder: Path, tensors: original.Tensors, perturbed_rpn: RPN
) -> None:
    del tensors["twig_head.weight"], tensors["model.twig_layers.2.mlp.up_proj.weight"]
    original.one_safetensors(folder, tensors)
    same_weights(RPN.from_pretrained(str(folder)), perturbed_rpn)


def test_another_shape_is_named(folder: Path, tensors: original.Tensors) -> None:
    tensors["model.twig_norm.weight"] = torch.zeros(64)
    original.one_safetensors(folder, tensors)
    shown = r"model.twig_norm.weight has the shape \[64\], but config.json asks for \[128\]"
    with pytest.raises(ValueError, match=shown):
        RPN.from_pretrained(str(folder))


def test_weights_that_are_no_numbers_are_named(folder: Path, tensors: original.Tensors) -> None:
    tensors["model.twig_norm.weight"] = torch.full((128,), float("nan"))
    original.one_safetensors(folder, tensors)
    with pytest.raises(ValueError, match=r"norm\.weight holds values that are not f") as error:
        RPN.from_pretrained(str(folder))
    assert str(error.value).startswith(f"{folder}: ")


def test_quantised_weights_are_refused(folder: Path, tensors: original.Tensors) -> None:
    tensors["model.twig_norm.weight"] = torch.zeros(128, dtype=torch.int8)
    original.one_safetensors(folder, tensors)
    with pytest.raises(ValueError, match=r"twig_norm.weight is torch.int8; quantised"):
        RPN.from_pretrained(str(folder))


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_is_not_run(folder: Path, tmp_path: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    state = {"twig_head.weight": Hostile(tmp_path / "run")}
    path = folder / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a file of tensors") as error:
        RPN.from_pretrained(str(folder))
    assert "weights_only" not in str(error.value), "torch's advice is to switch that off"
    assert str(error.value).endswith(
        "is not a file of tensors: it holds a Python object (posix.mkdir), and code in a "
        "checkpoint is never run; get a .safetensors copy, or download the file again if it "
        "should hold tensors only"
    )
    assert not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "run").exists(), "the file would have run code"


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps([1, 2])])
def test_files_of_another_kind_are_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors"):
        RPN.from_pretrained(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a file of tensors"):
        RPN.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, got a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../b.bin"}}', "maps a to '../b.bin'"),
        (
            '{"weight_map": {"model.twig_norm.weight": "b.bin"}}',
            "lacks model.twig_layers.0.input_layernorm.weight and 20 more tensors",
        ),
    ],
)
def test_an_index_that_makes_no_sense(folder: Path, index: str, message: str) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        RPN.from_pretrained(str(folder))


def test_an_index_that_its_shard_belies(
    folder: Path, tensors: original.Tensors, tmp_path: Path
) -> None:
    original.sharded_safetensors(folder, tensors)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.twig_norm.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"00001-of-00003.safetensors lacks model.twig_norm.weight"
    ):
        RPN.from_pretrained(str(folder))


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights .*pytorch_model.bin"):
        RPN.from_pretrained(str(folder))


def test_folders_that_are_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder /no/such/rpn"):
        RPN.from_pretrained("/no/such/rpn")
    with pytest.raises(FileNotFoundError, match=r"authors/unknown is no folder, and config.json"):
        RPN.from_pretrained("authors/unknown")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        RPN.from_pretrained("no hub id")


# --- the command, the plugin -------------------------------------------------------------------


def test_convert_writes_ours(folder: Path, tmp_path: Path, perturbed_rpn: RPN) -> None:
    out = tmp_path / "ours"
    done = runner.invoke(app, ["convert", "rpn", str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "B = 2, R = 3" in done.output
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "rpn.safetensors"}
    again = RPN.from_pretrained(str(out))
    same_weights(again, perturbed_rpn)
    assert again.config == RPN.from_pretrained(str(folder)).config
    assert again.facts == {"converted from": str(folder)}
    assert f"converted from: {folder}" in (out / "README.md").read_text()
    assert "Not trained" not in (out / "README.md").read_text()


def test_convert_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = runner.invoke(app, ["convert", "rpn", *words])
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        return " ".join(done.output.split())

    out = str(tmp_path / "ours")
    assert "is not empty" in said(str(folder), "--out", str(folder))
    assert "there is no folder /no/such/rpn" in said("/no/such/rpn", "--out", out)
    edit(folder, twig_K=None)
    assert "config.json has no twig_K" in said(str(folder), "--out", out)
    assert not (tmp_path / "ours").exists()


def test_help_teaches() -> None:
    lessons = {
        (): ("rpn", "labels", "base"),
        ("rpn",): ("sdrpn convert rpn YuhengSSS/llava-v1.5-7b-roi", "--out rpn-7b/"),
        ("labels",): ("sdrpn convert labels llava_v1_5_7b_pseudo_roi_release.pkl",),
        ("base",): ("sdrpn convert base my-finetune/ --out my-llava/", "--base liuhaotian/llava"),
    }
    for words, expected in lessons.items():
        shown = runner.invoke(app, ["convert", *words, "--help"], env={"COLUMNS": "200"}).output
        for lesson in expected:
            assert lesson in " ".join(shown.split())


@pytest.mark.parametrize("base", list(PUBLISHED_RPN))
def test_the_plugin_s_default_is_the_published_rpn(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        loading.ZoomModel, "from_pretrained", lambda *names, **options: asked.append(names)
    )
    for proposer in ("rpn", "attention", "none"):
        values = LlavaArguments.of({"pretrained": base, "proposer": proposer})
        loading.load_engine(values, torch.device("cpu"))
    assert asked == [(base, PUBLISHED_RPN[base]), (base, None), (base, None)]


# --- an RPN on another base --------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sdrpn.rpn.checkpoint"]


def test_another_base_is_told_of_once(
    llava: Llava15, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_rpn(llava, perturbed=True).save_pretrained(tmp_path)
    other = make_llava(seed=8)
    with caplog.at_level(logging.WARNING):
        ZoomModel(llava, RPN.from_pretrained(str(tmp_path)))
        assert warnings_of(caplog) == []
        ZoomModel(other, RPN.from_pretrained(str(tmp_path)))
    (told,) = warnings_of(caplog)
    for words in (llava.name, other.name, base_hash(llava, 2), base_hash(other, 2)):
        assert words in told
    assert llava.name != other.name


def test_an_rpn_without_a_hash_says_nothing(
    folder: Path, llava: Llava15, caplog: pytest.LogCaptureFixture
) -> None:
    assert RPN.from_pretrained(str(folder)).config.base_hash == ""
    with caplog.at_level(logging.WARNING):
        ZoomModel(llava, RPN.from_pretrained(str(folder)))
    assert warnings_of(caplog) == []


def test_the_hash_does_not_depend_on_precision(tmp_path: Path, llava: Llava15) -> None:
    expected = base_hash(llava, 2)
    assert len(expected) == 16
    llava.model.save_pretrained(tmp_path / "float32")
    llava.processor.save_pretrained(tmp_path / "float32")
    half = make_llava()
    assert base_hash(half, 2) == expected
    half.model.half()
    half.model.save_pretrained(tmp_path / "float16")
    half.processor.save_pretrained(tmp_path / "float16")
    for stored in ("float32", "float16"):
        for dtype in ("float32", "float16", "bfloat16"):
            loaded = Llava15.load(str(tmp_path / stored), dtype=dtype, device="cpu")
            assert loaded.dtype == getattr(torch, dtype)
            assert base_hash(loaded, 2) == expected


@torch.no_grad()
def test_the_hash_knows_what_the_rpn_reads() -> None:
    """Layers below B and the projector; a small step of training is enough to change it."""
    expected = base_hash(make_llava(), 2)

    def moved(change: Callable[[Any], torch.Tensor]) -> bool:
        other = make_llava()
        weight = change(other.model.model)
        weight.add_(torch.randn(weight.shape) * weight.std() * 0.01)
        return base_hash(other, 2) != expected

    assert moved(lambda m: m.language_model.layers[0].self_attn.q_proj.weight)
    assert moved(lambda m: m.language_model.layers[1].mlp.down_proj.weight)
    assert moved(lambda m: m.multi_modal_projector.linear_1.weight)
    assert not moved(lambda m: m.language_model.layers[2].self_attn.q_proj.weight)
    assert not moved(lambda m: m.language_model.embed_tokens.weight)


def test_weights_that_are_no_numbers_have_no_hash() -> None:
    llava = make_llava()
    layer: Any = llava.layers[1][1]
    packed = torch.zeros(10, 1, dtype=torch.uint8)
    layer.mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert base_hash(llava, 2) == ""
    assert base_hash(llava, 1) != ""
