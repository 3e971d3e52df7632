"""Qwen2.5-VL: what is its own, apart from what holds for every family and from recorded numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from sdrpn.backbones import qwen25_vl_published as published
from sdrpn.backbones.base import CropTokens
from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.backbones.qwen25_vl_images import ImageRules, image_processor
from sdrpn.backbones.registry import load_backbone
from sdrpn.boxes import GridBox, PixelBox
from sdrpn.config import RPNConfig, ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.roi.postprocess import darken, propose
from sdrpn.rpn.checkpoint import RPN
from sdrpn.rpn.model import RegionProposalNetwork
from tests.conftest import QUESTIONS, make_image
from tests.helpers import by_hand_qwen, qwen_tiny
from tests.helpers.qwen_tiny import CELL_PIXELS, LEAST, MOST, make_qwen, make_rpn

LIMITS = {"min_pixels": LEAST * CELL_PIXELS, "max_pixels": MOST * CELL_PIXELS}
STEPS = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def qwen() -> Qwen25VL:
    return make_qwen()


@pytest.fixture(scope="module")
def rpn(qwen: Qwen25VL) -> RPN:
    return make_rpn(qwen, perturbed=True)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return make_image(200, 150, 1)


@pytest.fixture(scope="module")
def folder(qwen: Qwen25VL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_tiny.write_checkpoint(qwen, tmp_path_factory.mktemp("hub") / "qwen")


# --- loading -----------------------------------------------------------------------------------


def test_a_folder_as_the_hub_lays_it_out(
    qwen: Qwen25VL, folder: Path, picture: Image.Image
) -> None:
    loaded = load_backbone(str(folder), dtype="float32", **LIMITS)
    assert isinstance(loaded, Qwen25VL)
    assert loaded.preprocessing == {**LIMITS, "square": False}
    asked = [Question(text, (picture,)) for text in QUESTIONS]
    # The checkpoint's own penalty stays in force, over the ids of the prompt.
    found = ZoomModel(loaded, proposer="none").ask_batch(asked, STEPS)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    own = {"repetition_penalty": 1.05, "eos_token_id": ends}
    expected = ZoomModel(qwen, proposer="none").ask_batch(asked, STEPS | own)
    assert [one.text for one in found] == [one.text for one in expected]


def test_the_published_limits_are_the_default(folder: Path) -> None:
    loaded = load_backbone(str(folder), dtype="float32")
    assert loaded.preprocessing["min_pixels"] == loaded.preprocessing["max_pixels"] == 451_584
    shapes = {(640, 480): (21, 28), (480, 480): (24, 24), (1000, 480): (16, 34)}
    for size, cells in shapes.items():
        grid = loaded.image_grid(Image.new("RGB", size))
        assert (grid.rows, grid.columns) == cells


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers(folder: Path, picture: Image.Image, dtype: str) -> None:
    loaded = load_backbone(str(folder), dtype=dtype, **LIMITS)
    assert str(loaded.dtype) == f"torch.{dtype}"
    network = make_rpn(loaded, perturbed=False)
    (found,) = ZoomModel(loaded, network).ask_batch([Question(QUESTIONS[0], (picture,))], STEPS)
    assert found.roi_map is not None
    assert np.isfinite(found.roi_map).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_backends_agree(
    qwen: Qwen25VL, rpn: RPN, folder: Path, picture: Image.Image, attention: str
) -> None:
    loaded = load_backbone(
        str(folder), dtype="float32", attn_implementation=attention, device_map="cpu", **LIMITS
    )
    asked = [Question(text, (picture,)) for text in QUESTIONS]
    ends = {"eos_token_id": loaded.eos_token_id, "repetition_penalty": 1.0}
    found = ZoomModel(loaded, rpn).ask_batch(asked, STEPS | ends)
    expected = ZoomModel(qwen, rpn).ask_batch(asked, STEPS | ends)
    for one, other in zip(found, expected, strict=True):
        assert one.text == other.text
        assert one.roi_map is not None
        assert np.abs(one.roi_map - other.roi_map).max() < 1e-5


def test_offloaded_weights_give_the_same(qwen: Qwen25VL, rpn: RPN, picture: Image.Image) -> None:
    asked = [Question(text, (picture,)) for text in QUESTIONS]
    expected = ZoomModel(qwen, rpn).ask_batch(asked, STEPS)
    other = make_qwen()
    cpu_offload(other.model, execution_device=torch.device("cpu"))
    assert next(other.model.parameters()).is_meta
    found = ZoomModel(other, rpn).ask_batch(asked, STEPS)
    for one, own in zip(found, expected, strict=True):
        assert (one.text, one.regions) == (own.text, own.regions)


def test_older_versions_of_transformers_are_refused(
    qwen: Qwen25VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Qwen2_5_VLRotaryEmbedding, "recomposition_frequencies")
    with pytest.raises(ValueError, match=r"Qwen2\.5-VL needs transformers 5\.20 or newer"):
        Qwen25VL(qwen.model, qwen.processor)


def test_only_the_first_layers_for_training(folder: Path) -> None:
    loaded = load_backbone(str(folder), dtype="float32", num_layers=5)
    assert loaded.num_layers == len(loaded.layers) == 5
    assert RPN.from_backbone(loaded, 2, 3).config.branch_layer == 2


def test_tied_output_embeddings(tmp_path: Path, picture: Image.Image) -> None:
    """As in the 3B: the folder holds no lm_head."""
    tied = make_qwen(tied=True)
    folder = qwen_tiny.write_checkpoint(tied, tmp_path / "tied")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    loaded = load_backbone(str(folder), dtype="float32", **LIMITS)
    assert torch.equal(loaded.model.lm_head.weight, tied.model.lm_head.weight)
    assert torch.equal(loaded.model.lm_head.weight, tied.model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("kind", "named"),
    [("qwen2_vl", "Qwen2-VL"), ("qwen3_vl", "Qwen3-VL"), ("llava_onevision", "LLaVA-OneVision")],
)
def test_cousins_are_refused_by_name(folder: Path, tmp_path: Path, kind: str, named: str) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"is a {named} .*use a Qwen2.5-VL"):
        load_backbone(str(tmp_path))


def test_other_models_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="gpt2"):
        load_backbone(str(tmp_path))
    with pytest.raises(ValueError, match=r"is not a Qwen2\.5-VL but has model_type 'gpt2'"):
        Qwen25VL.load(str(tmp_path))


def test_sliding_windows_are_refused(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"use_sliding_window": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="use_sliding_window"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(("least", "most"), [(100, 451_584), (451_584, 100_000)])
def test_limits_that_make_no_sense(qwen: Qwen25VL, least: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"got {least} and {most}"):
        Qwen25VL(qwen.model, qwen.processor, min_pixels=least, max_pixels=most)


# --- prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*QUESTIONS, "", " two  spaces ", "übel\nund 中文 ?"])
def test_prompts_are_the_chat_templates(qwen: Qwen25VL, text: str) -> None:
    expected = qwen.tokenizer(by_hand_qwen.prompt(text))["input_ids"]
    assert qwen.plain_ids(text) == expected
    before, after = qwen.prompt_ids(text)
    assert [*before, qwen.image_token_id, *after] == expected
    assert qwen.tokenizer.convert_ids_to_tokens([before[-1], after[0]]) == [
        "<|vision_start|>",
        "<|vision_end|>",
    ]


@pytest.mark.parametrize("special", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
def test_special_tokens_in_a_question_are_text(qwen: Qwen25VL, special: str) -> None:
    plain = qwen.plain_ids("what is ?")
    ids = qwen.plain_ids(f"what is {special} ?")
    number = qwen.tokenizer.convert_tokens_to_ids(special)
    assert ids.count(number) == plain.count(number)
    assert special in qwen.tokenizer.decode(ids).replace(by_hand_qwen.prompt("X"), "")


def test_prompts_in_training(qwen: Qwen25VL) -> None:
    """With the text `<image>` and a line break, as labels were published."""
    ids = qwen.as_trained().plain_ids("what ?")
    expected = by_hand_qwen.prompt("\nwhat ?").replace(
        "<|vision_start|>", "<image><|vision_start|>"
    )
    assert qwen.tokenizer.decode(ids) == expected


def test_several_pictures_and_none(qwen: Qwen25VL) -> None:
    for count in (0, 2):
        expected = qwen.tokenizer(by_hand_qwen.prompt("what ?", count))["input_ids"]
        assert qwen.plain_ids("what ?", count) == expected


def test_plain_prompts_are_stock(qwen: Qwen25VL) -> None:
    """Several pictures of different size, and none, whatever was asked before."""
    pictures = (make_image(200, 150, 1), make_image(90, 161, 2))
    least, most = by_hand_qwen.limits_of(qwen)
    engine = ZoomModel(qwen, proposer="none")
    engine.ask_batch([Question("the cyan", pictures[:1])], STEPS)
    asked = [Question("the red disc and the blue ?", pictures), Question("what is on the pink ?")]
    found = engine.ask_batch([*asked, *asked[::-1]], STEPS)
    assert [one.text for one in found] == [
        found[0].text,
        found[1].text,
        found[1].text,
        found[0].text,
    ]
    for question, answer in zip(asked, found, strict=False):
        small = [
            one.resize(by_hand_qwen.fit(*one.size, 4 * 784, 16384 * 784), Image.Resampling.BICUBIC)
            for one in question.images
        ]
        inputs = qwen.processor(
            images=small or None,
            text=by_hand_qwen.prompt(question.text, len(small)),
            size={"shortest_edge": least, "longest_edge": most},
            return_tensors="pt",
        )
        output = qwen.model.generate(**inputs, **STEPS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert answer.text == qwen.tokenizer.decode(new, skip_special_tokens=True).strip()


# --- pictures ----------------------------------------------------------------------------------


SIZES = [(640, 480), (27, 20), (5000, 26), (10, 10), (28, 28), (3000, 31), (57, 41), (1600, 300)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("limits", [(LEAST, MOST), (64, 64)], ids=str)
def test_pictures_of_any_size(qwen: Qwen25VL, size: Any, limits: tuple[int, int]) -> None:
    """Grid and patches agree, the grid reaches from edge to edge, tokens are within limits."""
    rules = ImageRules(
        image_processor(qwen.processor.image_processor), *(n * CELL_PIXELS for n in limits)
    )
    ready = rules.whole(make_image(*size, 3))
    assert ready.grid == rules.grid(size)
    assert len(ready.pixels) == 4 * ready.grid.cells
    box = ready.grid.to_pixels(GridBox(0, 0, ready.grid.columns, ready.grid.rows))
    assert size[0] - 1 <= box.x1 <= size[0]
    assert size[1] - 1 <= box.y1 <= size[1]
    assert ready.grid.cells <= 2 * limits[1] + max(ready.grid.rows, ready.grid.columns)


def test_pictures_under_a_cell_are_enlarged(qwen: Qwen25VL) -> None:
    """Sizes after the first resize, by hand: 28 px at least, then 4 cells at least."""
    first = qwen.image_rules._first_size
    assert first(10, 10) == (56, 56)
    assert first(2600, 13) == (2604, 28)
    assert first(640, 480) == (644, 476)


def test_pictures_that_are_too_thin_are_refused(qwen: Qwen25VL) -> None:
    with pytest.raises(ValueError, match="2010 x 10 pixels, thinner than 1 : 200"):
        qwen.image_grid(Image.new("RGB", (2010, 10)))


def test_pictures_in_training_are_grey_squares(qwen: Qwen25VL) -> None:
    trained = qwen.as_trained()
    grid = trained.image_grid(Image.new("RGB", (301, 100)))
    assert (grid.rows, grid.columns) == (24, 24)
    assert grid.extent == pytest.approx((0, -100, 301, 201))
    assert grid.to_pixels(GridBox(0, 8, 24, 16)) == PixelBox(0, 0, 301, 100)
    (ready,) = trained.preprocess([Image.new("RGB", (300, 100), "white")])
    grey = (127 / 255 - by_hand_qwen.CLIP_MEAN[0]) / by_hand_qwen.CLIP_STD[0]
    assert ready.pixels[0, :10].tolist() == pytest.approx([grey] * 10, abs=1e-5)


def test_the_prefix_key_includes_the_limits(qwen: Qwen25VL, rpn: RPN, picture: Image.Image) -> None:
    engine = ZoomModel(qwen, rpn)
    (first,) = engine.prefill([picture])
    engine.backbone = Qwen25VL(qwen.model, qwen.processor, min_pixels=64 * 784, max_pixels=64 * 784)
    (other,) = engine.prefill([picture])
    assert (first.image_tokens, other.image_tokens) == (35, 70)


# --- maps and crops ----------------------------------------------------------------------------


def test_only_large_grids_are_darkened(qwen: Qwen25VL) -> None:
    small, large = np.ones((24, 32), np.float32), np.ones((25, 31), np.float32)
    assert darken(small, qwen.map_rules) is small
    dark = darken(large, qwen.map_rules)
    expected = np.ones((25, 31))
    expected[:6, 0] = 0
    expected[0, :7] = 0
    assert np.array_equal(dark, expected)
    assert large.min() == 1


def test_one_box_around_everything(qwen: Qwen25VL) -> None:
    """No components, no limits on their size; a single cell counts."""
    grid = qwen.image_grid(Image.new("RGB", (600, 400)))
    values = np.zeros((grid.rows, grid.columns), np.float32)
    values[1, 1] = values[grid.rows - 1, 4] = 0.9
    region = propose(values, grid, ZoomConfig(threshold=0.5), qwen.map_rules)
    assert region.grid_boxes == (GridBox(1, 1, 5, grid.rows),)
    assert region.keep is not None
    assert region.keep.sum() == 2
    values[1, 1] = 0
    region = propose(values, grid, ZoomConfig(threshold=0.5), qwen.map_rules)
    assert region.grid_boxes == (GridBox(4, grid.rows - 1, 5, grid.rows),)


@pytest.mark.parametrize("box", [(0, 0, 27, 100), (0, 0, 200, 27)])
def test_refused_crops_are_no_zoom(
    qwen: Qwen25VL, picture: Image.Image, box: tuple[int, ...]
) -> None:
    engine = ZoomModel(qwen, proposer="none")
    plain = engine.ask_batch([Question(QUESTIONS[0], (picture,))], STEPS)[0]
    asked = Question(QUESTIONS[0], (picture,), PixelBox(*box))
    (found,) = engine.ask_batch([asked], STEPS)
    assert (found.text, found.regions) == (plain.text, ())
    assert "side under 28 are not supported" in (found.reason or "")
    (whole,) = engine.ask_batch([replace(asked, box=PixelBox(0, 0, 28, 100))], STEPS)
    assert whole.regions


def test_a_crop_that_keeps_no_token_keeps_its_marks(qwen: Qwen25VL) -> None:
    nothing = CropTokens(torch.zeros(0, 64), 3, 4, torch.zeros(12, dtype=torch.bool))
    words = qwen.prompt_ids("what ?").after
    plain, marked = qwen.suffix_segment(50, words), qwen.suffix_segment(50, words, [nothing])
    assert marked.ids == (*qwen.marks, *plain.ids)
    assert marked.positions[0].tolist()[:3] == [50, 50 + 1 + 4, 50 + 1 + 4 + 1]


def test_tokens_fit_the_context(qwen: Qwen25VL, rpn: RPN, picture: Image.Image) -> None:
    """Crops shrink to what the context holds, their marks included."""
    short = make_qwen()
    words = short.prompt_ids(QUESTIONS[0]).after
    needed = short.prefix_length(35) + len(words) + 1
    for spare in (0, 4, 5, 12):
        short.context_length = needed + spare
        asked = Question(QUESTIONS[0], (picture,), PixelBox(0, 0, 200, 150))
        (found,) = ZoomModel(short, proposer="none").ask_batch([asked], {"max_new_tokens": 1})
        assert found.crop_tokens <= max(spare - 4, 0)
        assert bool(found.crop_tokens) == (spare > 4)


# --- large first looks, thinned ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp(qwen: Qwen25VL) -> RPN:
    rpn = make_rpn(qwen, perturbed=True)
    with torch.no_grad():
        rpn.q_proj.weight.mul_(8)
        rpn.q_proj.bias.mul_(8)
    return rpn


def test_thinned_answers_are_one_full_forward(
    qwen: Qwen25VL, sharp: RPN, picture: Image.Image
) -> None:
    """Off by default; only with a zoom, and only on grids above the limit."""
    text = QUESTIONS[0]
    start = by_hand_qwen.sequence(qwen, picture, text)
    looked = by_hand_qwen.logits_of_words(qwen, sharp, start).max(0)
    keep = (1 / (1 + np.exp(-looked)) > 0.01).ravel()
    assert 0 < keep.sum() < keep.size
    zoom = ZoomConfig(threshold=0.3, thin_above=keep.size - 1)
    engine = ZoomModel(qwen, sharp, zoom=zoom)
    (answer,) = engine.ask_batch([Question(text, (picture,))], {"max_new_tokens": 6})
    assert answer.regions
    assert answer.image_tokens == keep.sum()
    (box,), over = answer.regions, answer.roi_map > zoom.threshold
    crop = by_hand_qwen.crop_of(qwen, picture, box, over)
    full = by_hand_qwen.sequence(qwen, picture, text, crop)
    stays = torch.ones(len(full.embeds), dtype=torch.bool)
    stays[full.image] = torch.from_numpy(keep)
    thinned = full._replace(embeds=full.embeds[stays], positions=full.positions[:, stays])
    ids, _ = by_hand_qwen.greedy(qwen, thinned, 6)
    assert answer.text == qwen.tokenizer.decode(ids, skip_special_tokens=True).strip()
    for other in (replace(zoom, thin_above=None), replace(zoom, thin_above=keep.size)):
        asked = Question(text, (picture,), zoom=other)
        assert engine.ask_batch([asked], STEPS)[0].image_tokens == keep.size
    nowhere = replace(zoom, threshold=1 - 1e-9)
    asked = Question(text, (picture,), zoom=nowhere)
    assert engine.ask_batch([asked], STEPS)[0].image_tokens == keep.size


def test_thinning_needs_a_limit_that_makes_sense() -> None:
    with pytest.raises(ValueError, match="thin_above must be 1 or more, got 0"):
        ZoomConfig(thin_above=0)
    assert ZoomConfig.from_text("thin_above=1024").thin_above == 1024


# --- sizes -------------------------------------------------------------------------------------


HUB_SHAPES = {
    "3B": (36, 2048, 16, 2, 11008, 21, 159),
    "7B": (28, 3584, 28, 4, 18944, 16, 481),
    "32B": (64, 5120, 40, 8, 27648, 37, None),
    "72B": (80, 8192, 64, 8, 29568, 46, None),
}


@pytest.fixture(params=sorted(HUB_SHAPES))
def shape(request: pytest.FixtureRequest) -> tuple[Any, Qwen25VL]:
    """A model of a published size on the meta device."""
    layers, hidden, heads, groups, inner, *_ = HUB_SHAPES[request.param]
    processor = qwen_tiny.build_processor()
    values = qwen_tiny.flat_config(processor.tokenizer) | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": 152_064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    values["vision_config"] |= {"out_hidden_size": hidden}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(values))
    return HUB_SHAPES[request.param], Qwen25VL(model, processor, name=request.param)


def test_rpns_of_every_published_size(shape: tuple[Any, Qwen25VL]) -> None:
    """Shapes only, on the meta device: a pass over the RPN, and how many parameters it has."""
    (layers, hidden, _, groups, _, branch, millions), qwen = shape
    assert published.branch_layer(hidden, layers) == branch
    with torch.device("meta"):
        rpn = RegionProposalNetwork(
            RPNConfig(**qwen.rpn_shape(), branch_layer=branch, depth=published.DEPTH)
        )
        states = torch.zeros(2, 7, hidden)
        rotary = torch.zeros(2, 7, 128), torch.zeros(2, 7, 128)
        keys = rpn.image_keys(states, rotary)
        assert keys.shape == (2, 7, groups * 128)
        last = rotary[0][:, -1:], rotary[1][:, -1:]
        assert rpn.roi_logits(states[:, -1], last, keys).shape == (2, 7)
    copied = qwen.layers[branch][1].state_dict()
    own = rpn.layers[0].state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in copied.items()}
    if millions:
        assert round(sum(p.numel() for p in rpn.parameters()) / 1e6) == millions
    assert (qwen.published_labels() is not None) == (millions is not None)


def test_published_settings() -> None:
    small, large = published.SIZES
    assert (small.branch_layer, large.branch_layer, published.DEPTH) == (21, 16, 3)
    assert small.thresholds["textvqa"] == 0.15
    assert small.thresholds["vstar"] == 0.175
    assert small.thresholds["hrbench"] == 0.1
    assert large.thresholds["textvqa"] == large.thresholds["vstar"] == 0.075
    assert large.thresholds["docvqa"] == small.thresholds["docvqa"] == 0.1
    assert (small.thresholds["ocrbench"], large.thresholds["ocrbench"]) == (0.03, 0.05)
    assert "hrbench" not in large.thresholds
    labels = large.labels
    assert [(one.layer, one.heads) for one in labels.of("natural").grounding] == [
        (16, (1, 7, 17)),
        (19, (17, 20)),
    ]
    assert [(one.layer, one.heads) for one in labels.of("text").grounding] == [
        (22, (1, 4)),
        (23, (6, 11)),
    ]
    assert labels.of("text").sink == ()
    labels.check_fits(28, 28, "7B")
    small.labels.check_fits(36, 16, "3B")


def test_a_budget_of_crop_tokens_limits_the_crop_s_pixels() -> None:
    qwen = qwen_tiny.make_qwen()
    image, box = make_image(400, 300, seed=1), PixelBox(10, 20, 330, 220)
    ((whole,),) = qwen.crop_inputs(image, box)
    assert torch.equal(whole.pixels, qwen.crop_input(image, box).pixels)
    most = whole.grid.cells
    for budget, tiles in ((most // 2, 1), (6, 1), (6, 2), (1, 1)):
        ((small,),) = qwen.crop_inputs(image, box, tiles=tiles, max_tokens=budget)
        assert small.grid.cells <= budget * tiles
        assert small.grid.size == (320, 200)
        assert len(small.pixels) == small.grid.cells * 4
    ((same,),) = qwen.crop_inputs(image, box, max_tokens=10 * most)
    assert torch.equal(same.pixels, whole.pixels)
