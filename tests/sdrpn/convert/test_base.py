"""LLaVA-1.5 in its authors' layout, LoRA fine-tunes too -> the Hugging Face layout, in small."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from sdrpn.backbones.llava15 import Llava15, square_grid
from sdrpn.cli import app
from sdrpn.config import VICUNA_SYSTEM_PROMPT
from sdrpn.convert.base import _main_dtype, _tower_tensors, convert_base, grow_vocabulary, read_base
from sdrpn.convert.original_layout import read_config
from sdrpn.convert.tokenizer import read_tokenizer
from sdrpn.engine import ZoomModel
from sdrpn.io.checkpoint_files import Source
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import QUESTIONS, make_llava
from tests.helpers import original_layout as original
from tests.helpers.llama_tokenizers import train, write_settings
from tests.sdrpn.backbones.test_prompt import FIRST, hub_tokenizer

runner = CliRunner()
WORDS = " ".join([VICUNA_SYSTEM_PROMPT, "USER: ASSISTANT:", *QUESTIONS])
TOWER = "tower"


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with what Vicuna's has, and without tokens for images or padding."""
    splitter = pre_tokenizers.Whitespace()
    words = [word for word, _ in splitter.pre_tokenize_str(WORDS)]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)
    return made


def write_tower(folder: Path, vision: Any, weights: Any = None) -> None:
    """A CLIP as it is published: with a text tower that LLaVA does not use."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "vocab_size": 9, "projection_dim": vision.projection_dim}
    config = CLIPConfig(
        text_config=text, vision_config=vision.to_dict(), projection_dim=vision.projection_dim
    )
    if weights is None:
        config.save_pretrained(folder)
    else:
        clip: Any = CLIPModel(config)
        clip.vision_model.load_state_dict(weights)
        clip.save_pretrained(folder)
    square = {"height": vision.image_size, "width": vision.image_size}
    CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=square).save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Llava15:
    """What the checkpoint holds, as a model that no converter has touched.

    As in LLaVA's own layout its vocabulary ends where the tokenizer's does.
    """
    llava = make_llava()
    words = len(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    llava.model.resize_token_embeddings(words, mean_resizing=False)
    return llava


@pytest.fixture
def tensors(random: Llava15) -> original.Tensors:
    return original.base_tensors(random.model)


@pytest.fixture
def folder(tmp_path: Path, random: Llava15, tensors: original.Tensors) -> Path:
    path = tmp_path / "original"
    original.write_config(path, original.config_of(random, mm_vision_tower=TOWER))
    original.one_safetensors(path, tensors)
    write_tokenizer(path)
    write_tower(path / TOWER, random.model.config.vision_config)
    return path


def embeds(random: Llava15, before: list[int], image: Any, after: list[int]) -> Tensor:
    """A prompt put together by hand: words, the image's tokens, words. [1, tokens, C]"""
    image_tokens = torch.stack(random.encode(random.preprocess([image])))
    return torch.cat([random.embed([before]), image_tokens, random.embed([after])], dim=1)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# --- a whole model -------------------------------------------------------------------------------


@pytest.mark.parametrize("write", original.WRITERS)
def test_every_layout_gives_the_model(
    folder: Path, random: Llava15, tensors: original.Tensors, write: Callable[..., None]
) -> None:
    (folder / "model.safetensors").unlink()
    write(folder, tensors)
    found, expected = read_base(str(folder)).state_dict(), random.model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_written_loads_and_answers(
    folder: Path, random: Llava15, tmp_path: Path, images: list[Any]
) -> None:
    out = tmp_path / "converted"
    convert_base(str(folder), out)
    llava = Llava15.load(str(out), dtype="float32", device="cpu")
    before = random.text_config.vocab_size
    assert (llava.side, llava.image_tokens) == (112, 64)
    assert llava.model.config.vision_feature_layer == -2
    rows = llava.model.get_input_embeddings().weight
    assert rows.shape[0] == llava.text_config.vocab_size == 64 * -(-before // 64) > before
    assert torch.equal(rows[:before], random.model.get_input_embeddings().weight)

    assert torch.equal(llava.pixels(images[:1]), random.pixels(images[:1]))
    prompt = embeds(random, [1, 9, 12], images[0], [5, 20, 7])
    with torch.no_grad():
        expected = random.model(inputs_embeds=prompt).logits
        found = llava.model(inputs_embeds=prompt).logits
    assert (found[..., :before] - expected).abs().max() < 1e-5
    assert (found.argmax(-1) == expected.argmax(-1)).all(), "an added token is never the answer"


def test_what_is_written_can_be_read_by_others(folder: Path, tmp_path: Path) -> None:
    """safetensors writes 0600 whatever the umask allows; and folders above it may be missing."""
    before = os.umask(0o022)
    try:
        convert_base(str(folder), tmp_path / "above" / "converted")
    finally:
        os.umask(before)
    files = list((tmp_path / "above" / "converted").iterdir())
    assert {path.suffix for path in files} >= {".safetensors", ".json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_its_answers_are_those_of_the_source(
    folder: Path, random: Llava15, tmp_path: Path, images: list[Any]
) -> None:
    convert_base(str(folder), tmp_path / "converted")
    llava = Llava15.load(str(tmp_path / "converted"), dtype="float32", device="cpu")
    answers = []
    for question in QUESTIONS:
        before, after = llava.prompt_ids(question)
        prompt = embeds(random, before, images[1], after)
        ids = random.model.generate(
            inputs_embeds=prompt, max_new_tokens=6, do_sample=False, eos_token_id=2
        )[0]
        expected = llava.tokenizer.decode(ids, skip_special_tokens=True).strip()
        answer = ZoomModel(llava, proposer="none").ask(images[1], question, max_new_tokens=6)
        assert answer.text == expected
        answers.append(answer.text)
    assert len(set(answers)) > 1


def test_the_tokenizer_gains_two_tokens(folder: Path, tmp_path: Path) -> None:
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    (tmp_path / "converted").mkdir()  # what is there already is written into
    convert_base(str(folder), tmp_path / "converted")
    llava = Llava15.load(str(tmp_path / "converted"), device="cpu")
    assert llava.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [
        len(plain),
        len(plain) + 1,
    ]
    assert llava.image_token_id == len(plain)
    assert llava.tokenizer.pad_token_id == llava.text_config.pad_token_id == len(plain) + 1
    assert llava.model.generation_config.pad_token_id == len(plain) + 1
    assert (llava.tokenizer.bos_token_id, llava.eos_token_id) == (1, 2)
    head, rest = map(list, llava.prompt_ids(QUESTIONS[0]))
    assert head == plain(f"{VICUNA_SYSTEM_PROMPT} USER:")["input_ids"]
    assert rest == plain(f"{QUESTIONS[0]} ASSISTANT:")["input_ids"][1:]


def test_precision_stays(folder: Path, tensors: original.Tensors, tmp_path: Path) -> None:
    """float16, though the projector was trained in float32."""
    half = {
        name: tensor if "mm_projector" in name else tensor.half()
        for name, tensor in tensors.items()
    }
    original.one_safetensors(folder, half)
    convert_base(str(folder), tmp_path / "converted")
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_big_models_are_written_in_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random: Llava15
) -> None:
    monkeypatch.setattr("sdrpn.convert.base.SHARD", "1MB")
    convert_base(str(folder), tmp_path / "converted")
    assert len(list((tmp_path / "converted").glob("model-*.safetensors"))) > 3
    loaded = Llava15.load(str(tmp_path / "converted"), dtype="float32", device="cpu")
    name = "model.language_model.layers.5.mlp.up_proj.weight"
    assert torch.equal(loaded.model.state_dict()[name], random.model.state_dict()[name])


def test_the_tower_comes_from_its_clip(
    folder: Path, tensors: original.Tensors, random: Llava15, tmp_path: Path
) -> None:
    weights = random.model.model.vision_tower.state_dict()
    own = {name: t for name, t in tensors.items() if "vision_tower" not in name}
    assert len(own) < len(tensors)
    original.one_safetensors(folder, own)
    clip = tmp_path / "clip"
    write_tower(clip, random.model.config.vision_config, weights)
    edit(folder, mm_vision_tower="/home/authors/clip-vit")
    found = read_base(str(folder), vision_tower=str(clip)).state_dict()
    expected = random.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_tower_s_folder_is_taken_from_the_command_line(
    folder: Path, tensors: original.Tensors, random: Llava15, tmp_path: Path, images: list[Any]
) -> None:
    """And what is written beside the weights counts image tokens as transformers does."""
    own = {name: t for name, t in tensors.items() if "vision_tower" not in name}
    original.one_safetensors(folder, own)
    clip, out = tmp_path / "clip", tmp_path / "converted"
    tower = random.model.model.vision_tower.state_dict()
    write_tower(clip, random.model.config.vision_config, tower)
    edit(folder, mm_vision_tower="/home/authors/clip-vit")
    done = runner.invoke(
        app, ["convert", "base", str(folder), "--vision-tower", str(clip), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    processor = AutoProcessor.from_pretrained(out)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert processor.vision_feature_select_strategy == "default"
    assert processor.image_token == "<image>"
    inputs = processor(images=images[0], text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 64
    name = "model.vision_tower.pre_layrnorm.weight"
    found = Llava15.load(str(out), dtype="float32", device="cpu").model.state_dict()[name]
    assert torch.equal(found, random.model.state_dict()[name])


def test_tensors_of_a_clip_have_the_names_of_either_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Older versions of transformers keep "vision_model." before the names."""
    held = {"vision_model.embeddings.a": torch.ones(1), "encoder.vision_model.b": torch.ones(1)}
    model = SimpleNamespace(state_dict=lambda: held)
    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", lambda _: model)
    stem = "model.vision_tower.vision_tower.vision_model"
    assert set(_tower_tensors("clip")) == {
        f"{stem}.embeddings.a",
        f"{stem}.encoder.vision_model.b",
    }


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError("cannot be read\nand more"), "cannot be read"),
        (
            PermissionError(13, "Permission denied", "/cache/blob"),
            "cannot fetch org/clip: /cache/blob cannot be written (Permission denied); "
            "set HF_HOME to another one",
        ),
    ],
)
def test_a_vision_tower_that_cannot_be_loaded_is_told(
    monkeypatch: pytest.MonkeyPatch, error: OSError, cause: str
) -> None:
    def refused(_: str) -> None:
        raise error

    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", refused)
    with pytest.raises(FileNotFoundError) as told:
        _tower_tensors("org/clip")
    assert str(told.value) == (
        f"cannot load the vision tower org/clip ({cause}); give its folder or Hub id with "
        "--vision-tower"
    )


def test_an_rpn_inside_is_left_out(
    folder: Path, tensors: original.Tensors, perturbed_rpn: RPN, random: Llava15
) -> None:
    constants = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(6)}
    tower = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    more = constants | {tower: torch.ones(1, 65)} | original.rpn_tensors(perturbed_rpn)
    original.one_safetensors(folder, tensors | more)
    edit(folder, twig_K=2, twig_T=3, roi_multi_head=True)
    found = read_base(str(folder)).state_dict()
    assert set(found) == set(random.model.state_dict())


def test_the_language_model_s_settings_are_the_checkpoint_s(folder: Path) -> None:
    """Those that change no shape, and so would go unnoticed."""
    edit(
        folder,
        hidden_act="gelu",
        max_position_embeddings=777,
        initializer_range=0.5,
        rms_norm_eps=0.001,
        rope_theta=500000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
        mm_vision_select_layer=-1,
        bos_token_id=5,
        eos_token_id=6,
        pad_token_id=7,
    )
    model = read_base(str(folder))
    text = model.config.text_config
    assert (text.hidden_act, text.max_position_embeddings) == ("gelu", 777)
    assert (text.initializer_range, text.rms_norm_eps) == (0.5, 0.001)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (5, 6, 7)
    assert text.tie_word_embeddings is False
    rope = text.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (500000.0, "linear", 2.0)
    assert model.config.vision_feature_layer == -1
    assert model.config.vision_feature_select_strategy == "default"
    assert model.config.image_seq_length == 64


def test_settings_that_a_checkpoint_leaves_out_are_llava_1_5_s(folder: Path) -> None:
    edit(
        folder,
        mm_projector_type=None,
        mm_vision_select_feature=None,
        mm_use_im_start_end=None,
        tie_word_embeddings=None,
        mm_vision_select_layer=None,
        twig_T=None,
    )
    config = read_base(str(folder)).config
    assert config.vision_feature_layer == -2
    assert config.image_token_index == config.text_config.vocab_size
    assert (config.image_seq_length, type(config.image_seq_length)) == (64, int)


class Words:
    """A tokenizer as far as a vocabulary is grown for it: so many words, the last two added."""

    bos_token_id, eos_token_id = 3, 4

    def __init__(self, count: int) -> None:
        self.count, self.pad_token_id = count, count - 1

    def __len__(self) -> int:
        return self.count

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<image>": self.count - 2}[token]


@pytest.mark.parametrize(
    ("before", "words", "after"), [(64, 66, 128), (64, 64, 64), (100, 66, 128), (129, 131, 192)]
)
def test_a_vocabulary_grows_to_a_multiple_of_64_for_new_words(
    before: int, words: int, after: int
) -> None:
    """The new rows are the mean of the others; LLaVA-1.5's 32000 words are a multiple already."""
    model = make_llava().model
    model.resize_token_embeddings(before, mean_resizing=False)
    tables = model.get_input_embeddings, model.get_output_embeddings
    rows = [table().weight.data.clone() for table in tables]
    grow_vocabulary(model, Words(words))
    assert model.config.text_config.vocab_size == after
    for table, old in zip(tables, rows, strict=True):
        new = table().weight.data
        assert new.shape[0] == after
        assert torch.equal(new[:before], old)
        assert torch.allclose(new[before:], old.mean(0).expand(after - before, -1), atol=1e-6)
    assert model.config.image_token_index == words - 2
    noted = [model.config, model.config.text_config, model.generation_config]
    assert [one.pad_token_id for one in noted] == [words - 1] * 3
    assert (noted[2].bos_token_id, noted[2].eos_token_id) == (3, 4)


def test_a_model_has_the_dtype_of_most_of_its_numbers() -> None:
    """Not of most tensors, nor of the largest."""
    full, half = torch.float32, torch.float16
    many = {name: torch.zeros(3, dtype=half) for name in "abc"}
    assert _main_dtype(many | {"d": torch.zeros(10, dtype=full)}) == full
    assert _main_dtype({"d": torch.zeros(8, dtype=full)} | many) == half


@pytest.mark.parametrize("key", ["num_hidden_layers", "twig_T"])
def test_counts_of_layers_are_bounded(folder: Path, key: str) -> None:
    for count in (0, 1000):
        edit(folder, **{key: count})
        assert read_config(Source(str(folder)))[key] == count
    for count in (-1, 1001, 2.0, True, "6"):
        edit(folder, **{key: count})
        told = re.escape(f"{folder}: {key} must be up to 1000, got {count!r}")
        with pytest.raises(ValueError, match=f"^{told}$"):
            read_config(Source(str(folder)))


def test_query_heads_may_share_keys(tmp_path: Path) -> None:
    llava = make_llava(key_value_heads=2)
    words = len(write_tokenizer(tmp_path))
    llava.model.resize_token_embeddings(words, mean_resizing=False)
    original.write_config(tmp_path, original.config_of(llava, mm_vision_tower=TOWER))
    original.one_safetensors(tmp_path, original.base_tensors(llava.model))
    write_tower(tmp_path / TOWER, llava.model.config.vision_config)
    model = read_base(str(tmp_path))
    assert model.config.text_config.num_key_value_heads == 2
    assert all(torch.equal(model.state_dict()[n], t) for n, t in llava.model.state_dict().items())


# --- how its images are made square --------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "noted", "padding"),
    [("pad", "pad", "pad"), ("square", "square", "crop"), (None, "square", "crop")],
)
def test_the_aspect_ratio_of_training_is_noted_and_followed(
    folder: Path,
    random: Llava15,
    tmp_path: Path,
    images: list[Any],
    ratio: str | None,
    noted: str,
    padding: str,
) -> None:
    """LLaVA's own code pads for `pad` only; without a value it crops."""
    edit(folder, image_aspect_ratio=ratio)
    out = tmp_path / "converted"
    convert_base(str(folder), out)
    config = json.loads((out / "config.json").read_text())
    assert config["image_aspect_ratio"] == noted
    llava = Llava15.load(str(out), dtype="float32", device="cpu")
    assert llava.padding == padding
    expected_grid = square_grid(images[1].size, llava.grid, llava.side, padding)
    assert llava.image_grid(images[1]) == expected_grid
    expected = Llava15(random.model, random.processor, padding=padding).pixels(images[1:2])
    assert torch.equal(llava.pixels(images[1:2]), expected)
    # What is asked for goes before the note.
    for asked in ("pad", "crop"):
        assert Llava15.load(str(out), device="cpu", padding=asked).padding == asked


@pytest.mark.parametrize("value", ["keep", "Pad", 1, ["pad"]])
def test_another_aspect_ratio_is_refused(folder: Path, tmp_path: Path, value: Any) -> None:
    edit(folder, image_aspect_ratio=value)
    told = said(str(folder), "--out", str(tmp_path / "out"))
    assert f"image_aspect_ratio in config.json must be pad or square, got {value!r}" in told


# --- which tokenizer -----------------------------------------------------------------------------


def test_a_tokenizer_json_keeps_spaces_behind_images(folder: Path, tmp_path: Path) -> None:
    """A fine-tune's own tokenizer.json of LLaMA's kind, whatever transformers makes of it."""
    for path in folder.glob("token*"):
        path.unlink()
    made = hub_tokenizer(normalizer=None, pre_tokenizer=FIRST)
    made.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(Source(str(folder)))
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llava"}')
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = one("a:<image>\nthe")["input_ids"]
        assert ids == [1, 263, 29901, 32000, 29871, 13, 29873, 354]
        assert one("a:<image> the")["input_ids"] == [1, 263, 29901, 32000, 259, 29873, 354]


# --- a sentencepiece tokenizer -------------------------------------------------------------------


def test_prompts_are_cut_as_llava_cuts_them(folder: Path, tmp_path: Path) -> None:
    """LLaVA's code encodes what stands before and behind the image each for itself, in pieces."""
    pieces: Any = pytest.importorskip("sentencepiece")
    for path in folder.glob("token*"):
        path.unlink()
    text = tmp_path / "text.txt"
    text.write_text("\n".join([WORDS, *QUESTIONS] * 20))
    pieces.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(Source(str(folder)))
    plain = pieces.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [330, 331]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for question in (*QUESTIONS, "Where  are 3 naïve\n猫 ?"):
        head, rest = f"{VICUNA_SYSTEM_PROMPT} USER: ", f"\n{question} ASSISTANT:"
        expected = [1, *plain.encode(head), 330, *plain.encode(rest)]
        for one in (tokenizer, again):
            assert one(f"{head}<image>{rest}")["input_ids"] == expected
        assert again.decode(expected[len(plain.encode(head)) + 2 :]).strip() == rest.strip()


# --- LoRA ----------------------------------------------------------------------------------------

TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
RANK, ALPHA = 4, 10


def lora_weights(random: Llava15) -> original.Tensors:
    """A and B for some matrices of every layer, under PEFT's names over LLaVA's."""
    weights = {}
    for i, layer in random.layers:
        for part in TARGETS:
            out, into = layer.get_submodule(part).weight.shape
            stem = f"base_model.model.model.layers.{i}.{part}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, into)
            weights[f"{stem}.lora_B.weight"] = torch.randn(out, RANK)
    return weights


def write_lora(folder: Path, random: Llava15, binary: bool = False, **settings: Any) -> None:
    torch.manual_seed(3)
    original.write_config(folder, original.config_of(random, mm_vision_tower=TOWER))
    write_tower(folder / TOWER, random.model.config.vision_config)
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    weights = lora_weights(random)
    if binary:
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors")
    projector = random.model.model.multi_modal_projector.linear_1
    trained = {
        "base_model.model.model.mm_projector.0.weight": projector.weight + 1,
        "base_model.model.model.mm_projector.0.bias": projector.bias + 2,
    }
    torch.save(trained, folder / "non_lora_trainables.bin")


def load_lora(folder: Path) -> original.Tensors:
    path = folder / "adapter_model.safetensors"
    return load_file(path) if path.exists() else torch.load(folder / "adapter_model.bin")


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_fine_tune_is_merged(
    folder: Path, tmp_path: Path, random: Llava15, binary: bool, rslora: bool
) -> None:
    tuned = tmp_path / "tuned"
    write_lora(tuned, random, binary, use_rslora=rslora)
    found = read_base(str(tuned), base=str(folder)).state_dict()
    expected = {name: tensor.clone() for name, tensor in random.model.state_dict().items()}
    weights = load_lora(tuned)
    scale = ALPHA / RANK**0.5 if rslora else ALPHA / RANK
    for i in range(6):
        for part in TARGETS:
            stem = f"base_model.model.model.layers.{i}.{part}"
            change = weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
            expected[f"model.language_model.layers.{i}.{part}.weight"] += scale * change
    expected["model.multi_modal_projector.linear_1.weight"] += 1
    expected["model.multi_modal_projector.linear_1.bias"] += 2
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-4), name


def test_a_lora_fine_tune_of_vicuna(
    folder: Path, tmp_path: Path, random: Llava15, tensors: original.Tensors
) -> None:
    """A base without projector or tower: those are the fine-tune's and the CLIP's."""
    vicuna, tuned = tmp_path / "vicuna", tmp_path / "tuned"
    vicuna.mkdir()
    words = {n: t for n, t in tensors.items() if "mm_projector" not in n and "vision" not in n}
    original.one_bin(vicuna, words)
    write_tokenizer(vicuna)
    write_lora(tuned, random)
    tower = random.model.model.vision_tower.state_dict()
    write_tower(tuned / TOWER, random.model.config.vision_config, tower)
    with pytest.raises(ValueError, match=r"lacks model.mm_projector.2.weight"):
        read_base(str(tuned), base=str(vicuna))
    projector = {n: t + 3 for n, t in tensors.items() if "mm_projector" in n}
    whole = {f"base_model.model.{name}": tensor for name, tensor in projector.items()}
    torch.save(whole, tuned / "non_lora_trainables.bin")
    out = tmp_path / "converted"
    done = runner.invoke(
        app, ["convert", "base", str(tuned), "--base", str(vicuna), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    found = Llava15.load(str(out), dtype="float32", device="cpu").model.state_dict()
    name = "model.multi_modal_projector.linear_2.bias"
    assert torch.equal(found[name], random.model.state_dict()[name] + 3)
    name = "model.vision_tower.pre_layrnorm.weight"
    assert torch.equal(found[name], random.model.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": None}, "adapter_config.json needs r and lora_alpha, got 4, None"),
        ({"use_dora": True}, "adapter_config.json has use_dora True; only plain LoRA"),
        ({"rank_pattern": {"q": 8}}, "has rank_pattern"),
        ({"alpha_pattern": {"q": 8}}, "has alpha_pattern"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out True"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\]"),
        ({"r": "4"}, "needs r and lora_alpha, got 4, 10"),
        ({"r": 0}, "needs r and lora_alpha, got 0, 10"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
    ],
)
def test_other_adapters_are_refused(
    folder: Path, tmp_path: Path, random: Llava15, change: dict[str, Any], message: str
) -> None:
    write_lora(tmp_path / "tuned", random, **change)
    with pytest.raises(ValueError, match=message):
        read_base(str(tmp_path / "tuned"), base=str(folder))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.9.self_attn.q_proj.lora_A.weight", torch.zeros(4, 128), "changes model.lay"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", None, "lacks its lora_A.weight"),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", torch.zeros(128, 5), "do not fit"),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", torch.zeros(127, 4), "do not fit"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 127), "do not fit"),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", None, "lacks its lora_B.weight"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(128), "q_proj.bias, which is no LoRA"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", torch.zeros(5), "is no LoRA we"),
        ("model.embed_tokens.lora_embedding_A", torch.zeros(5), "lacks its|changes|is no LoRA we"),
    ],
)
def test_adapters_that_do_not_fit(
    folder: Path, tmp_path: Path, random: Llava15, name: str, tensor: Tensor | None, message: str
) -> None:
    tuned = tmp_path / "tuned"
    write_lora(tuned, random)
    weights = load_lora(tuned)
    weights.pop(f"base_model.model.{name}", None)
    if tensor is not None:
        weights[f"base_model.model.{name}"] = tensor
    save_file(weights, tuned / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_base(str(tuned), base=str(folder))


def test_a_base_is_for_lora_only(folder: Path, tmp_path: Path, random: Llava15) -> None:
    write_lora(tmp_path / "tuned", random)
    with pytest.raises(ValueError, match=r"is a LoRA fine-tune .* set --base to the model"):
        read_base(str(tmp_path / "tuned"))
    with pytest.raises(ValueError, match="not a LoRA fine-tune: omit --base"):
        read_base(str(folder), base=str(folder))


def test_a_lora_fine_tune_names_its_base(folder: Path, tmp_path: Path, random: Llava15) -> None:
    """Before anything else that it lacks, such as a tokenizer."""
    tuned, out = tmp_path / "tuned", str(tmp_path / "out")
    write_lora(tuned, random)
    told = said(str(tuned), "--out", out)
    assert (
        f"{tuned} is a LoRA fine-tune (it has adapter_config.json): set --base to the model it was "
        "trained on, such as liuhaotian/llava-v1.5-7b" in told
    )
    write_lora(tuned, random, base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    told = said(str(tuned), "--out", out)
    assert "the model it was trained on (adapter_config.json names 'lmsys/vicuna-7b-v1.5')" in told
    (tuned / "config.json").unlink()
    assert "set --base to the model it was trained on" in said(str(tuned), "--out", out)


@pytest.mark.parametrize("named", ["", 3, None])
def test_a_base_without_a_name_is_not_named(tmp_path: Path, random: Llava15, named: Any) -> None:
    write_lora(tmp_path / "tuned", random, base_model_name_or_path=named)
    with pytest.raises(ValueError, match=r"trained on, such as liuhaotian/llava-v1\.5-7b$"):
        read_base(str(tmp_path / "tuned"))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_rank_one_is_merged_at_its_full_alpha(
    folder: Path, tmp_path: Path, random: Llava15, rslora: bool
) -> None:
    tuned = tmp_path / "tuned"
    write_lora(tuned, random, r=1, use_rslora=rslora)
    weights = load_lora(tuned)
    stem = "base_model.model.model.layers.2.mlp.down_proj"
    change = weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
    name = "model.language_model.layers.2.mlp.down_proj.weight"
    expected = random.model.state_dict()[name] + 10 * change
    found = read_base(str(tuned), base=str(folder)).state_dict()[name]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_a_lora_without_a_config_has_its_base_s(
    folder: Path, tmp_path: Path, random: Llava15
) -> None:
    """As a training run's own checkpoints, which hold the adapter alone."""
    tuned = tmp_path / "tuned"
    write_lora(tuned, random)
    expected = read_base(str(tuned), base=str(folder)).state_dict()
    (tuned / "config.json").unlink()
    found = read_base(str(tuned), base=str(folder), vision_tower=str(folder / TOWER)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_base_in_the_other_layout_is_told(folder: Path, tmp_path: Path, random: Llava15) -> None:
    tuned, base = tmp_path / "tuned", tmp_path / "hugging-face"
    write_lora(tuned, random)
    random.model.save_pretrained(base)
    out = str(tmp_path / "out")
    told = said(str(tuned), "--base", str(base), "--out", out)
    assert (
        f"--base {base} is in the Hugging Face layout, {tuned} in the original one: give the base "
        "in the original layout, such as liuhaotian/llava-v1.5-7b; an adapter trained on the "
        "Hugging Face model needs no conversion, pass it as peft=" in told
    )
    told = said(str(tuned), "--base", str(tuned), "--out", out)
    assert f"--base {tuned} is a LoRA fine-tune itself: convert it first" in told
    told = said(str(base), "--out", out)
    assert f"{base} is already in the Hugging Face layout: use it without conversion" in told
    told = said(str(folder), "--base", str(folder), "--out", out)
    assert f"{folder} is a full model, not a LoRA fine-tune: omit --base" in told


@pytest.mark.parametrize(
    "target", ["language_model.layers.0.self_attn.q_proj", "multi_modal_projector.linear_1"]
)
def test_an_adapter_of_the_other_layout_is_told(
    folder: Path, tmp_path: Path, random: Llava15, target: str
) -> None:
    tuned = tmp_path / "tuned"
    write_lora(tuned, random)
    stem = f"base_model.model.model.{target}"
    pair = {f"{stem}.lora_A.weight": torch.zeros(4, 128)}
    pair |= {f"{stem}.lora_B.weight": torch.zeros(128, 4)}
    save_file(pair, tuned / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"needs no conversion: pass it as peft=$") as error:
        read_base(str(tuned), base=str(folder))
    assert str(error.value).startswith(
        f"{tuned} is an adapter of a model in the Hugging Face layout (it changes "
        f"model.{target}.weight)"
    )


@pytest.mark.parametrize("inside", [True, False])
def test_a_lora_on_the_tower_is_merged(
    folder: Path, tmp_path: Path, random: Llava15, tensors: original.Tensors, inside: bool
) -> None:
    """Whether the base holds a vision tower, or the CLIP that config.json names does."""
    tuned = tmp_path / "tuned"
    write_lora(tuned, random)
    stem = "vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj"
    a, b = torch.randn(RANK, 128), torch.randn(128, RANK)
    name = f"base_model.model.model.{stem}"
    pair = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(load_lora(tuned) | pair, tuned / "adapter_model.safetensors")
    tower = random.model.model.vision_tower.state_dict()
    write_tower(tuned / TOWER, random.model.config.vision_config, tower)
    if not inside:
        words = {n: t for n, t in tensors.items() if "vision_tower" not in n}
        original.one_safetensors(folder, words)
    found = read_base(str(tuned), base=str(folder)).state_dict()
    ours = "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight"
    expected = random.model.state_dict()[ours] + 2.5 * (b @ a)
    assert torch.allclose(found[ours], expected, rtol=1e-5, atol=1e-4)
    other = "model.vision_tower.encoder.layers.1.self_attn.k_proj.weight"
    assert torch.equal(found[other], random.model.state_dict()[other])


def test_a_tower_trained_as_it_is_needs_no_clip(
    folder: Path, tmp_path: Path, random: Llava15, tensors: original.Tensors
) -> None:
    tuned = tmp_path / "tuned"
    write_lora(tuned, random)
    own = {n: t for n, t in tensors.items() if "vision_tower" not in n}
    original.one_safetensors(folder, own)
    trained = {f"base_model.model.{n}": t + 1 for n, t in tensors.items() if "vision_tower" in n}
    torch.save(trained, tuned / "non_lora_trainables.bin")
    found = read_base(str(tuned), base=str(folder)).state_dict()
    name = "model.vision_tower.pre_layrnorm.weight"
    assert torch.equal(found[name], random.model.state_dict()[name] + 1)


def write_projector(folder: Path, random: Llava15, tensors: original.Tensors) -> None:
    original.write_config(folder, original.config_of(random, mm_vision_tower=TOWER))
    tower = random.model.model.vision_tower.state_dict()
    write_tower(folder / TOWER, random.model.config.vision_config, tower)
    own = {name: t for name, t in tensors.items() if "mm_projector" in name}
    torch.save(own, folder / "mm_projector.bin")


def test_a_projector_alone_needs_its_language_model(
    tmp_path: Path, random: Llava15, tensors: original.Tensors
) -> None:
    alone, vicuna = tmp_path / "alone", tmp_path / "vicuna"
    write_projector(alone, random, tensors)
    told = said(str(alone), "--out", str(tmp_path / "out"))
    assert (
        f"{alone} is a pretrained projector without a model (mm_projector.bin): set "
        "--base to the model it was trained on, such as lmsys/vicuna-7b-v1.5" in told
    )
    vicuna.mkdir()
    words = {n: t for n, t in tensors.items() if "mm_projector" not in n and "vision" not in n}
    original.one_bin(vicuna, words)
    write_tokenizer(vicuna)
    (vicuna / "config.json").write_text('{"model_type": "llama"}')
    found = read_base(str(alone), base=str(vicuna)).state_dict()
    expected = random.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    convert_base(str(alone), tmp_path / "converted", base=str(vicuna))
    assert Llava15.load(str(tmp_path / "converted"), device="cpu").padding == "pad"


def test_a_whole_model_beside_its_projector_is_whole(
    folder: Path, random: Llava15, tensors: original.Tensors
) -> None:
    torch.save({}, folder / "mm_projector.bin")
    found = read_base(str(folder)).state_dict()
    assert all(torch.equal(found[n], t) for n, t in random.model.state_dict().items())


# --- what is refused -----------------------------------------------------------------------------


def said(*words: str) -> str:
    """The one sentence with which `sdrpn convert base` ends."""
    done = runner.invoke(app, ["convert", "base", *words])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mm_vision_tower": None},
            "its config.json has model_type 'llava_llama' without mm_vision_tower",
        ),
        (
            {"model_type": "mistral"},
            "not a LLaVA in the original layout: its config.json has model_type 'mistral';",
        ),
        ({"vision_config": {}, "mm_vision_tower": None}, "is already in the Hugging Face layout"),
        ({"text_config": {}, "mm_vision_tower": None}, "is already in the Hugging Face layout"),
        (
            {"mm_projector_type": "linear"},
            "not a LLaVA-1.5: mm_projector_type is 'linear', not 'ml",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, not False"),
        ({"mm_use_im_start_end": True}, "not a LLaVA-1.5: mm_use_im_start_end is True, not False"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        (
            {"mm_vision_tower": "no/clip"},
            "cannot load the vision tower no/clip (",
        ),
        (
            {"mm_vision_tower": "no/clip"},
            "); give its folder or Hub id with --vision-tower",
        ),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        (
            {"num_hidden_layers": 7},
            "original lacks model.layers.6.self_attn.q_proj.weight and 8 more tensors",
        ),
        ({"num_hidden_layers": 5}, "holds a tensor model.layers.5.input_layernorm.weight (and 8"),
        (
            {"intermediate_size": 300},
            "original: model.layers.0.mlp.down_proj.weight has the shape [128, 345], but "
            "config.json asks for [128, 300]",
        ),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit(folder, **changes)
    told = said(str(folder), "--out", str(tmp_path / "out"))
    assert message in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"model_type": "llava_mistral"}, "model_type is 'llava_mistral'"),
    ],
)
def test_a_llava_1_6_is_told(
    folder: Path, tmp_path: Path, changes: dict[str, Any], sign: str
) -> None:
    edit(folder, **changes)
    sentence = (
        f"{folder} is not a LLaVA-1.5 model but a LLaVA-1.6 ({sign} in config.json), which reads "
        "an image in tiles; use a LLaVA-1.5, such as llava-hf/llava-1.5-7b-hf or "
        "liuhaotian/llava-v1.5-7b"
    )
    assert sentence in said(str(folder), "--out", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"LLaVA-1\.6") as error:
        Llava15.load(str(folder), device="cpu")
    assert str(error.value) == sentence


def test_a_llava_1_6_in_the_other_layout_is_told(folder: Path, tmp_path: Path) -> None:
    edit(folder, model_type="llava_next", vision_config={}, mm_vision_tower=None)
    told = said(str(folder), "--out", str(tmp_path / "out"))
    assert f"{folder} is not a LLaVA-1.5 model but llava_next; sdrpn needs a LLaMA" in told


def test_a_flat_merge_type_is_llava_1_5_s(folder: Path, random: Llava15) -> None:
    edit(folder, mm_patch_merge_type="flat")
    assert set(read_base(str(folder)).state_dict()) == set(random.model.state_dict())


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_read_over(
    folder: Path, tmp_path: Path, random: Llava15, file: str
) -> None:
    """As editors on Windows write it."""
    for path in folder.glob("token*"):
        path.unlink()
    train(folder / "tokenizer.model")
    write_settings(folder, model_max_length=77)
    path = folder / file
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_tokenizer(Source(str(folder))).model_max_length == 77
    assert set(read_base(str(folder)).state_dict()) == set(random.model.state_dict())


def test_a_file_is_no_folder(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    told = said(str(file), "--out", str(tmp_path / "out"))
    assert f"{file} is a file; give the folder that it is in" in told


def test_loading_it_as_it_is_names_the_command(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"`sdrpn convert base {folder} --out FOLDER`"):
        Llava15.load(str(folder), device="cpu")


def test_tensors_that_do_not_fit(folder: Path, tensors: original.Tensors, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    original.one_safetensors(folder, tensors | {"model.image_newline": torch.zeros(3)})
    told = said(str(folder), "--out", out)
    assert f"{folder} holds a tensor model.image_newline, which is not" in told
    lacking = dict(tensors)
    del lacking["model.mm_projector.2.bias"]
    original.one_safetensors(folder, lacking)
    told = said(str(folder), "--out", out)
    assert (
        f"{folder} lacks model.mm_projector.2.bias; a pruned model cannot be a base: convert the "
        "full one" in told
    )


def test_values_that_are_not_finite_are_named(
    folder: Path, tensors: original.Tensors, tmp_path: Path
) -> None:
    tensors["model.norm.weight"][3] = float("nan")
    original.one_safetensors(folder, tensors)
    told = said(str(folder), "--out", str(tmp_path / "out"))
    assert f"{folder}: model.language_model.norm.weight holds values that are not finite" in told


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert "is not empty" in said(str(folder), "--out", str(folder))
    assert "there is no folder /no/llava" in said("/no/llava", "--out", out)
    for path in folder.glob("token*"):
        path.unlink()
    told = said(str(folder), "--out", out)
    assert (
        f"{folder} holds no tokenizer: put tokenizer.json or tokenizer.model, with its "
        "tokenizer_config.json, there; LLaVA-1.5's is Vicuna's" in told
    )
    with pytest.raises(FileNotFoundError, match="holds no tokenizer, and neither does --base "):
        read_tokenizer(Source(str(folder)), str(folder / TOWER))
    (folder / "tokenizer.model").write_text("not a model")
    assert "cannot be read as a sentencepiece model" in said(str(folder), "--out", out)
    (folder / "config.json").unlink()
    told = said(str(folder), "--out", out)
    assert f"{folder} holds no config.json: it is not a LLaVA in the original layout" in told
