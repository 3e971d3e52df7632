"""Loading, refusing, prompting and showing images; the context's end; RPN checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    BertConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaProcessor,
    MistralConfig,
    SiglipVisionConfig,
)

from sdrpn.backbones.llava15 import Llava15, check_is_llava15, tiling
from sdrpn.backbones.loading import WeightsUnavailable
from sdrpn.boxes import PixelBox
from sdrpn.config import VICUNA_SYSTEM_PROMPT, LabelConfig, LayerHeads, ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.roi.crops import crop_tokens
from sdrpn.roi.postprocess import propose
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import (
    BRANCH_LAYER,
    DEPTH,
    QUESTIONS,
    THRESHOLD,
    make_image,
    make_llava,
    make_rpn,
)
from tests.helpers import by_hand


@pytest.fixture(scope="module")
def folder(llava: Llava15, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model as a folder in the Hugging Face layout."""
    path = tmp_path_factory.mktemp("tiny")
    llava.model.save_pretrained(path)
    llava.processor.save_pretrained(path)
    return str(path)


# --- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"device": "cpu"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}]
)
def test_load_gives_the_same_model(
    llava: Llava15, folder: str, images: list[Image.Image], how: dict[str, Any]
) -> None:
    loaded = Llava15.load(folder, dtype="float32", **how)
    assert loaded.name == folder
    assert (loaded.side, loaded.grid, loaded.image_tokens) == (112, 8, 64)
    assert (loaded.num_layers, loaded.context_length) == (6, 1024)
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    expected = ZoomModel(llava, proposer="none").ask(images[1], QUESTIONS[0], max_new_tokens=4)
    found = ZoomModel(loaded, proposer="none").ask(images[1], QUESTIONS[0], max_new_tokens=4)
    assert found.text == expected.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_load_in_any_precision(folder: str, images: list[Image.Image], dtype: Any) -> None:
    """The whole way runs in each: reading, the RPN's map, a crop, an answer."""
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    loaded = Llava15.load(folder, dtype=dtype, device="cpu")
    assert {weight.dtype for weight in loaded.model.parameters()} == {wanted}
    rpn = make_rpn(loaded, perturbed=True)
    assert {weight.dtype for weight in rpn.parameters()} == {wanted}
    zoom = ZoomModel(loaded, rpn, zoom=ZoomConfig(threshold=THRESHOLD))
    questions = [Question(text, (images[1],)) for text in QUESTIONS]
    answers = zoom.ask_batch(questions, {"max_new_tokens": 3})
    assert any(answer.regions for answer in answers)
    maps = [answer.roi_map for answer in answers]
    assert all(one is not None and one.dtype == np.float32 for one in maps)


def test_auto_precision_is_float32_on_the_cpu(folder: str) -> None:
    assert Llava15.load(folder, device="cpu").dtype == torch.float32
    assert Llava15.load(folder, device_map="cpu").dtype == torch.float32


def test_unknown_precision_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"dtype must be auto, float32, .*, got 'int8'"):
        Llava15.load(folder, dtype="int8")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_backends_agree(
    folder: str,
    images: list[Image.Image],
    backend: str,
    perturbed_rpn: RPN,
    llava: Llava15,
    tmp_path: Path,
) -> None:
    """The backend asked for reaches the backbone and a loaded RPN, and does not change the map."""
    perturbed_rpn.save_pretrained(tmp_path)
    loaded = ZoomModel.from_pretrained(
        folder, str(tmp_path), dtype="float32", attn_implementation=backend
    )
    assert loaded.backbone.text_config._attn_implementation == backend
    assert loaded.rpn is not None
    used = {layer.self_attn.config._attn_implementation for layer in loaded.rpn.layers}
    assert used == {backend}
    found = loaded.ask(images[1], QUESTIONS[0], max_new_tokens=1).roi_map
    expected = ZoomModel(llava, perturbed_rpn).ask(images[1], QUESTIONS[0], max_new_tokens=1)
    assert np.abs(found - expected.roi_map).max() < 1e-5


def test_from_pretrained_takes_both_folders(
    folder: str, perturbed_rpn: RPN, images: list[Image.Image], tmp_path: Path, llava: Llava15
) -> None:
    perturbed_rpn.save_pretrained(tmp_path)
    settings = ZoomConfig(threshold=THRESHOLD)
    loaded = ZoomModel.from_pretrained(folder, str(tmp_path), zoom=settings, dtype="float32")
    found = loaded.ask(images[1], QUESTIONS[0], max_new_tokens=4)
    expected = ZoomModel(llava, perturbed_rpn, zoom=settings).ask(
        images[1], QUESTIONS[0], max_new_tokens=4
    )
    assert (found.text, found.regions) == (expected.text, expected.regions)
    assert found.regions


# --- other models ------------------------------------------------------------------------------

TINY = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def config_of(
    kind: Any = LlavaConfig, text: Any = LlamaConfig, vision: Any = CLIPVisionConfig, **other: Any
) -> dict[str, Any]:
    return kind(vision_config=vision(**TINY), text_config=text(**TINY), **other).to_dict()


def llava_next() -> dict[str, Any]:
    return config_of(LlavaNextConfig)


def llava_on_mistral() -> dict[str, Any]:
    return config_of(text=MistralConfig)


def llava_on_siglip() -> dict[str, Any]:
    return config_of(vision=SiglipVisionConfig)


def llava_with_cls() -> dict[str, Any]:
    return config_of(vision_feature_select_strategy="full")


def llava_of_two_layers() -> dict[str, Any]:
    return config_of(vision_feature_layer=[-2, -1])


def original_layout() -> dict[str, Any]:
    return {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}


def early_original_layout() -> dict[str, Any]:
    return {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"}


def bert() -> dict[str, Any]:
    return BertConfig(**TINY).to_dict()


def nameless() -> dict[str, Any]:
    return {"hidden_size": 8}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (llava_next, "not a LLaVA-1.5 model but llava_next;"),
        (llava_on_mistral, "with a mistral language model and a clip_vision_model vision tower"),
        (llava_on_siglip, "with a llama language model and a siglip_vision_model vision tower"),
        (llava_with_cls, "image features 'full' of layer -2"),
        (llava_of_two_layers, r"image features 'default' of layer \[-2, -1\]"),
        (original_layout, r"original LLaVA layout \(model_type 'llava_llama'\)"),
        (early_original_layout, r"original LLaVA layout \(model_type 'llava'\)"),
        (bert, "not a LLaVA-1.5 model but bert;"),
        (nameless, "but a model without a model_type;"),
    ],
)
def test_other_models_are_refused_by_name(
    tmp_path: Path, config: Callable[[], dict[str, Any]], what: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    with pytest.raises(ValueError, match=what) as error:
        Llava15.load(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "llava-hf/llava-1.5-7b-hf" in str(error.value)


def test_a_config_like_the_hubs_is_accepted() -> None:
    """Old checkpoints leave out what has the default value."""
    check_is_llava15(config_of(), "here")
    hub = {
        "model_type": "llava",
        "vision_feature_layer": -2,
        "text_config": {"model_type": "llama"},
    }
    check_is_llava15(hub, "here")


def test_missing_models_are_told_apart_from_wrong_ones(tmp_path: Path, folder: str) -> None:
    """No folder, an empty one, one without weights, and a hub id that cannot be reached."""
    part = tmp_path / "part"
    part.mkdir()
    for file in Path(folder).iterdir():
        if file.suffix != ".safetensors":
            (part / file.name).write_bytes(file.read_bytes())
    empty = tmp_path / "empty"
    empty.mkdir()
    for missing in (tmp_path / "nowhere", empty, part, "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(WeightsUnavailable, match="cannot load") as error:
            Llava15.load(str(missing))
        assert str(missing) in str(error.value)


# --- prompts -----------------------------------------------------------------------------------


def test_the_head_is_derived_from_tokenizer_and_prompt(llava: Llava15) -> None:
    """Tokens before the image: beginning of text, the system sentence, `USER:`."""
    words = llava.tokenizer.convert_ids_to_tokens(llava.head_ids)
    assert words[0] == "<s>"
    assert words[1:5] == ["A", "chat", "between", "a"]
    assert words[-3:] == [".", "USER", ":"]
    other = Llava15(llava.model, llava.processor, system_prompt="Be polite .")
    short = other.tokenizer.convert_ids_to_tokens(other.head_ids)
    assert short == ["<s>", "<unk>", "polite", ".", "USER", ":"]
    for one in (llava, other):
        ids = one.tokenizer(one.prompt("red ?"))["input_ids"]
        assert [*one.head_ids, one.image_token_id, *one.prompt_ids("red ?").after] == ids


def test_the_prompt_is_vicunas() -> None:
    llava = make_llava()
    text = llava.prompt("What is it?")
    assert text == f"{VICUNA_SYSTEM_PROMPT} USER: <image>\nWhat is it? ASSISTANT:"
    assert text == by_hand.prompt(llava, "What is it?")
    assert llava.prompt("Hi", images=0) == f"{VICUNA_SYSTEM_PROMPT} USER: Hi ASSISTANT:"
    assert llava.prompt("Hi", images=2).count("<image>") == 2
    llava.system_prompt = ""
    assert llava.prompt("What is it?") == "USER: <image>\nWhat is it? ASSISTANT:"


# --- images ------------------------------------------------------------------------------------

ODD_SIZES = [(112, 112), (200, 150), (201, 150), (150, 201), (33, 47), (34, 47), (300, 7), (1, 5)]


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
def test_padding_is_a_square_pad_done_in_pil(llava: Llava15, size: tuple[int, int]) -> None:
    image = make_image(*size, seed=3)
    assert (llava.pixels([image])[0] - by_hand.padded(image, llava.side)).abs().max() < 1e-5


def test_images_of_a_batch_do_not_mix(llava: Llava15, images: list[Image.Image]) -> None:
    together = llava.pixels(images)
    assert together.shape == (5, 3, 112, 112)
    for image, pixels in zip(images, together, strict=True):
        assert torch.equal(llava.pixels([image])[0], pixels)


def test_the_checkpoints_mean_and_deviation_are_used(llava: Llava15) -> None:
    """They normalise whole images and crops, and the mean is the colour of the padding."""
    processor = copy.deepcopy(llava.processor)
    processor.image_processor.image_mean = [0.2, 0.4, 0.6]
    processor.image_processor.image_std = [0.5, 0.5, 0.5]
    other = Llava15(llava.model, processor)
    grey = Image.new("RGB", (112, 56), (102, 102, 102))
    whole = other.pixels([grey])[0]
    expected = torch.tensor([0.4, 0.0, -0.4])[:, None, None]
    assert (whole[:, 28:84] - expected).abs().max() < 1e-5
    assert whole[:, [0, -1]].abs().max() < 1e-5
    cut = other.crop_input(grey, PixelBox(0, 0, 50, 50)).pixels
    assert (cut - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", ODD_SIZES[:5], ids=str)
def test_crops_are_the_stretched_boxes(llava: Llava15, size: tuple[int, int]) -> None:
    image = make_image(*size, seed=4)
    box = PixelBox(1, 2, size[0] - 1, size[1] // 2 + 1)
    pixels = llava.crop_input(image, box).pixels
    assert (pixels - by_hand.stretched(image, box, llava.side)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("noted", "padding"), [({}, "pad"), ("pad", "pad"), ("square", "crop"), (None, "pad")]
)
def test_the_padding_that_config_json_notes_is_the_default(
    folder: str, tmp_path: Path, noted: Any, padding: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    note = {} if noted == {} else {"image_aspect_ratio": noted}
    (tmp_path / "config.json").write_text(json.dumps(config | note))
    loaded = Llava15.load(str(tmp_path), device="cpu")
    assert loaded.padding == padding
    assert Llava15(loaded.model, loaded.processor).padding == padding
    assert Llava15.load(str(tmp_path), device="cpu", num_layers=2).padding == padding
    for asked in ("pad", "crop"):
        assert Llava15.load(str(tmp_path), device="cpu", padding=asked).padding == asked


def test_another_note_is_refused_by_name(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "keep"}))
    with pytest.raises(ValueError, match="image_aspect_ratio") as error:
        Llava15.load(str(tmp_path), device="cpu")
    assert str(error.value) == (
        f"{tmp_path}: image_aspect_ratio in config.json must be pad or square, got 'keep'; set "
        "it to the value used in training"
    )
    assert Llava15.load(str(tmp_path), device="cpu", padding="crop").padding == "crop"


@pytest.mark.parametrize("size", [(9000, 40), (40, 8400)])
def test_crops_of_very_large_images_are_cut_from_the_original(
    llava: Llava15, size: tuple[int, int]
) -> None:
    """The first look gets a copy of 8,192 pixels a side; a crop keeps every pixel it holds."""
    long = max(size)
    stripes = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    wide = size[0] == long
    if wide:
        stripes[:, long - 112 :: 2] = 255
    else:
        stripes[long - 112 :: 2, :] = 255
    box = (long - 112, 0, long, 40) if wide else (0, long - 112, 40, long)
    pixels = llava.crop_input(Image.fromarray(stripes), PixelBox(*box)).pixels[0]
    line = pixels[50] if wide else pixels[:, 50]
    # White is (1 - mean) / deviation, black -mean / deviation, of CLIP's red.
    assert line[0::2].tolist() == pytest.approx([1.930336] * 56, abs=1e-4)
    assert line[1::2].tolist() == pytest.approx([-1.792262] * 56, abs=1e-4)


def test_unknown_padding_is_refused(llava: Llava15) -> None:
    with pytest.raises(ValueError, match="padding must be one of pad, crop, got 'stretch'"):
        Llava15(llava.model, llava.processor, padding="stretch")
    with pytest.raises(ValueError, match="padding must be one of pad, crop, got 'stretch'"):
        Llava15.load("/no/folder", padding="stretch")


@pytest.fixture(scope="module")
def hub_folder(llava: Llava15, folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with an image processor configured like the one on the hub."""
    path = tmp_path_factory.mktemp("hub")
    llava.model.save_pretrained(path)
    images = CLIPImageProcessor(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
    )
    LlavaProcessor(
        images,
        llava.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="USER: <image>\n{{ messages[0]['content'] }} ASSISTANT:",
    ).save_pretrained(path)
    return str(path)


def test_crop_without_a_system_prompt_is_plain_transformers(
    hub_folder: str, images: list[Image.Image]
) -> None:
    """`padding=crop` and an empty `system_prompt` give what processor and template give."""
    processor = AutoProcessor.from_pretrained(hub_folder)
    model = LlavaForConditionalGeneration.from_pretrained(hub_folder, dtype=torch.float32)
    loaded = Llava15.load(hub_folder, dtype="float32", padding="crop", system_prompt="")
    zoom = ZoomModel(loaded, proposer="none")
    texts = []
    for image in images:
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            prompt = processor.apply_chat_template(messages, tokenize=False)
            assert prompt == loaded.prompt(question)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            texts.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    questions = [Question(text, (image,)) for image in images for text in QUESTIONS]
    assert [a.text for a in zoom.ask_batch(questions, {"max_new_tokens": 6})] == texts
    other = ZoomModel(Llava15.load(hub_folder, dtype="float32"), proposer="none")
    assert [a.text for a in other.ask_batch(questions, {"max_new_tokens": 6})] != texts


@pytest.mark.parametrize("which", ["folder", "hub_folder"])
@pytest.mark.parametrize("size", [(224, 112), (112, 336)])
def test_crop_shows_the_central_square(
    request: pytest.FixtureRequest, which: str, size: tuple[int, int]
) -> None:
    """Whatever the checkpoint's processor would do by itself: boxes are computed for a square."""
    path = request.getfixturevalue(which)
    loaded = Llava15.load(path, dtype="float32", padding="crop")
    image = make_image(*size, seed=5)
    left, top = (size[0] - 112) // 2, (size[1] - 112) // 2
    square = image.crop((left, top, left + 112, top + 112))
    assert (loaded.pixels([image])[0] - by_hand.normalised(square)).abs().max() < 1e-5
    view = loaded.image_grid(image)
    corner = view.to_pixels(view.to_cells(PixelBox(left, top, left + 1, top + 1)))
    assert (corner.x0, corner.y0) == (left, top)


# --- the context's end -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_llava() -> Llava15:
    """A model whose context holds head, image, the question `yellow`, one answer token and 20."""
    llava = make_llava()
    question = len(llava.prompt_ids("yellow").after)
    llava.context_length = len(llava.head_ids) + llava.image_tokens + question + 1 + 20
    return llava


def test_the_context_comes_from_the_model(folder: str, tmp_path: Path) -> None:
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 77
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Llava15.load(str(tmp_path)).context_length == 77


def test_crop_tokens_are_cut_first(short_llava: Llava15, images: list[Image.Image]) -> None:
    """64 crop tokens do not fit into a room of 20: the crop's grid shrinks until they do."""
    zoom = ZoomModel(short_llava, proposer="none")
    image, box = images[0], PixelBox(0, 0, 60, 60)
    answer = zoom.ask(image, "yellow", box=box, max_new_tokens=1)
    assert answer.regions == (box,)
    assert 9 <= answer.crop_tokens <= 20
    side = round(answer.crop_tokens**0.5)
    assert side**2 == answer.crop_tokens
    grid = by_hand.crop_of(short_llava, image, box).unflatten(0, (8, 8)).permute(2, 0, 1)
    small = torch.nn.functional.interpolate(grid[None], (side, side), mode="bilinear")
    embeds, _ = by_hand.sequence(short_llava, image, "yellow", small[0].flatten(1).T)
    ids, _ = by_hand.greedy(short_llava, embeds, 1)
    assert answer.text == short_llava.tokenizer.decode(ids, skip_special_tokens=True)


def test_crops_that_cannot_fit_are_left_out(short_llava: Llava15, images: Any) -> None:
    """A question that just fits is answered from the whole image, and says why."""
    text = " ".join(["red"] * 21)
    zoom = ZoomModel(short_llava, proposer="none")
    answer = zoom.ask(images[0], text, box=PixelBox(0, 0, 60, 60), max_new_tokens=1)
    assert (answer.regions, answer.crop_tokens) == ((), 0)
    assert "the context is full" in str(answer.reason)
    assert answer.text == zoom.ask(images[0], text, max_new_tokens=1).text


@pytest.mark.parametrize("more", [1, 7])
def test_prompts_that_cannot_fit_are_refused_with_the_number(
    short_llava: Llava15, images: list[Image.Image], more: int
) -> None:
    text = " ".join(["red"] * (21 + more))
    zoom = ZoomModel(short_llava, proposer="none")
    with pytest.raises(ValueError, match=f" {more} too many for a context of "):
        zoom.ask(images[0], text, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"[0-9]+ too many for a context of "):
        zoom.ask_batch([Question("yellow", tuple(images[:2]))], {"max_new_tokens": 1})


def test_crops_without_a_kept_token_are_left_out(llava: Llava15, images: Any) -> None:
    """Two thin components at the ends of a box whose tokens, shrunk, see mostly nothing."""
    over = np.zeros((8, 8), dtype=np.float32)
    over[0, :2] = over[7, 6:] = 0.9
    zoom = ZoomConfig(threshold=0.5, policy="mask", token_budget=0.3)
    region = propose(over, llava.image_grid(images[0]), zoom)
    assert region.keep is not None
    assert crop_tokens(llava, images[:1], [region], [zoom], [100]) == [[]]
    ((whole,),) = crop_tokens(llava, images[:1], [region], [replace(zoom, token_budget=1)], [100])
    assert len(whole.tokens) == 4


def test_rooms_are_each_rows_own(short_llava: Llava15, images: list[Image.Image]) -> None:
    zoom = ZoomModel(short_llava, proposer="none")
    box = PixelBox(0, 0, 60, 60)
    texts = ("yellow", " ".join(["red"] * 12), " ".join(["red"] * 21))
    questions = [Question(text, (images[0],), box) for text in texts]
    together = zoom.ask_batch(questions, {"max_new_tokens": 2})
    alone = [zoom.ask_batch([question], {"max_new_tokens": 2})[0] for question in questions]
    assert [a.crop_tokens for a in together] == [a.crop_tokens for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    assert together[0].crop_tokens > together[1].crop_tokens > together[2].crop_tokens == 0


# --- RPN checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def checkpoint(perturbed_rpn: RPN, tmp_path: Path) -> Path:
    perturbed_rpn.save_pretrained(tmp_path / "rpn")
    return tmp_path / "rpn"


def edit(path: Path, **changes: Any) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))


def test_a_checkpoint_is_weights_config_and_card(llava: Llava15, checkpoint: Path) -> None:
    assert {file.name for file in checkpoint.iterdir()} == {
        "rpn.safetensors",
        "config.json",
        "README.md",
    }
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["branch_layer"], config["depth"]) == (BRANCH_LAYER, DEPTH)
    assert config["base_model"] == llava.name
    tensors = load_file(checkpoint / "rpn.safetensors")
    assert not any("v_proj" in name and "layers" not in name for name in tensors)


def test_settings_and_facts_travel_with_the_checkpoint(llava: Llava15, tmp_path: Path) -> None:
    rpn = make_rpn(llava, perturbed=False)
    labels = LabelConfig((LayerHeads(1, (0, 2)), LayerHeads(2)), (LayerHeads(0),), 3)
    rpn.config = replace(rpn.config, zoom=ZoomConfig(0.33, "strongest", 1.5), labels=labels)
    rpn.facts = {"samples": 1234, "final loss": 0.25}
    rpn.save_pretrained(tmp_path)
    loaded = RPN.from_pretrained(str(tmp_path))
    assert loaded.config == rpn.config
    assert loaded.facts == rpn.facts
    assert ZoomModel(llava, loaded).zoom == ZoomConfig(0.33, "strongest", 1.5)
    assert ZoomModel(llava, loaded).models.labels == labels


def test_the_card_tells_the_facts(llava: Llava15, tmp_path: Path) -> None:
    rpn = make_rpn(llava, perturbed=False)
    rpn.save_pretrained(tmp_path)
    assert "Not trained: a copy of the backbone's layers." in (tmp_path / "README.md").read_text()
    rpn.facts = {"samples": 1234, "final loss": 0.25}
    rpn.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "\nlibrary_name: sdrpn\n" in card
    assert f"base_model: {llava.name}\n" in card
    assert "- samples: 1234\n- final loss: 0.25" in card
    assert f"{sum(weight.numel() for weight in rpn.parameters()):,} parameters" in card
    assert f"layer {BRANCH_LAYER - 1} and has" in card
    assert "Not trained" not in card


def test_sizes_that_do_not_fit_are_refused(
    llava: Llava15, gqa_llava: Llava15, checkpoint: Path
) -> None:
    loaded = RPN.from_pretrained(str(checkpoint))
    wrong = r"num_key_value_heads 4 \(the model has 2\)"
    with pytest.raises(ValueError, match=wrong) as error:
        ZoomModel(gqa_llava, loaded)
    assert llava.name in str(error.value)
    assert gqa_llava.name in str(error.value)
    edit(checkpoint, branch_layer=4)
    with pytest.raises(ValueError, match=r"4 \+ 3 layers \(the model has 6\)"):
        ZoomModel(llava, RPN.from_pretrained(str(checkpoint)))
    edit(checkpoint, branch_layer=2, image_tokens=576)
    with pytest.raises(ValueError, match=r"image_tokens 576 \(the model has 64\)"):
        ZoomModel(llava, RPN.from_pretrained(str(checkpoint)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": 3}, r"not an sdrpn RPN checkpoint: unknown key\(s\) branch in RPNConfig"),
        ({"zoom": {"treshold": 0.1}}, r"unknown key\(s\) treshold in ZoomConfig"),
        ({"zoom": {"threshold": 3}}, r"threshold must be in \(0, 1\), got 3"),
        ({"depth": 0}, "branch_layer and depth must be 1 or more, got 2, 0"),
        ({"depth": 2}, "weights and config disagree"),
        ({"hidden_size": 64}, "weights and config disagree"),
    ],
)
def test_broken_configs_are_refused(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    edit(checkpoint, **changes)
    with pytest.raises(ValueError, match=message) as error:
        RPN.from_pretrained(str(checkpoint))
    assert str(checkpoint) in str(error.value)


def test_a_config_without_its_sizes_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not an sdrpn RPN checkpoint: .*hidden_size"):
        RPN.from_pretrained(str(checkpoint))


def test_missing_weights_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "rpn.safetensors")
    del tensors["layers.1.self_attn.v_proj.weight"]
    save_file(tensors, checkpoint / "rpn.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj.weight"):
        RPN.from_pretrained(str(checkpoint))


@pytest.mark.parametrize("file", ["config.json", "rpn.safetensors"])
def test_missing_files_are_named(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {file}"):
        RPN.from_pretrained(str(checkpoint))


def test_a_fresh_rpn_needs_enough_layers(llava: Llava15) -> None:
    assert RPN.from_backbone(llava, 3, 3).config.depth == 3
    with pytest.raises(
        ValueError, match=r"branch_layer 4 \+ depth 3 must be .*the backbone's 6 layers"
    ):
        RPN.from_backbone(llava, 4, 3)


def test_a_half_precision_checkpoint_runs_in_the_models_precision(
    llava: Llava15, tmp_path: Path
) -> None:
    make_rpn(llava, perturbed=True).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = RPN.from_pretrained(str(tmp_path))
    assert loaded.q_proj.weight.dtype == torch.bfloat16
    ZoomModel(llava, loaded)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


# --- tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tiles", "expected"),
    [
        ((100, 100), 4, (1, 1)),  # fits into one input of 336 pixels
        ((336, 336), 4, (1, 1)),
        ((337, 100), 4, (1, 2)),
        ((100, 337), 2, (2, 1)),
        ((700, 700), 1, (1, 1)),
        ((700, 700), 2, (2, 1)),  # either way is as square
        ((700, 700), 4, (2, 2)),
        ((1500, 200), 4, (1, 4)),
        ((1500, 400), 4, (1, 4)),
        ((1000, 500), 4, (2, 2)),
        ((900, 330), 4, (1, 3)),  # no more tiles than there are pixels for
        ((330, 900), 4, (3, 1)),
    ],
)
def test_large_regions_are_cut_into_tiles(
    size: tuple[int, int], tiles: int, expected: tuple[int, int]
) -> None:
    assert tiling(PixelBox(10, 20, 10 + size[0], 20 + size[1]), tiles, 336) == expected


def test_tiles_cover_the_region_without_gaps(llava: Llava15) -> None:
    image = make_image(500, 300, seed=3)
    box = PixelBox(7, 11, 7 + 401, 11 + 201)  # the tiny encoder's input has 112 pixels a side
    tiles = llava.crop_inputs(image, box, tiles=4, max_tokens=9)
    xs, ys = (7, 207, 408), (11, 111, 212)
    assert [len(line) for line in tiles] == [2, 2]
    for row, line in enumerate(tiles):
        for column, one in enumerate(line):
            part = PixelBox(xs[column], ys[row], xs[column + 1], ys[row + 1])
            assert torch.equal(one.pixels, llava.crop_input(image, part).pixels)
    ((whole,),) = llava.crop_inputs(image, box)
    assert torch.equal(whole.pixels, llava.crop_input(image, box).pixels)
