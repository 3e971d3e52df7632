"""The numbers recorded from the authors' own code on Qwen2.5-VL, on their tiny random model.

`data/parity_qwen/README.md` says what is recorded; `SDRPN_PARITY_QWEN=DIR` tests against another
record. Everything here follows from what a record holds.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sdrpn.backbones.base import CropTokens
from sdrpn.backbones.qwen25_vl_images import StretchedGrid
from sdrpn.backbones.qwen25_vl_published import label_rules
from sdrpn.boxes import GridBox, PixelBox
from sdrpn.distill.pseudo_labels import padding_cells, pseudo_labels
from sdrpn.distill.trainer import RPNForTraining, RPNSamples, collate
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.attention_rows import read_rows
from sdrpn.io.weight_maps import rpn_names
from sdrpn.roi.crops import crop_tokens, keep_mask
from sdrpn.roi.postprocess import blur, darken, propose, unsupported_crop
from sdrpn.roi.proposers import Look, roi_logits
from sdrpn.rpn.checkpoint import RPN
from tests.helpers import parity_qwen as parity
from tests.helpers.parity_qwen import CELL_PIXELS, Case, Looked, answer, at, strided

TOLERANCE = 1e-4
SHARP_TOLERANCE = 1e-3
RECORD = parity.Record(parity.DATA)
KEYS = list(RECORD.cases)
AT_THRESHOLDS = [(key, k) for key in KEYS for k in range(len(RECORD.thresholds(key)))]
ZOOMS = [(key, k) for key in KEYS for k in RECORD.zooms(key)]


@pytest.fixture(scope="module")
def looked() -> dict[str, Looked]:
    """Every case prefilled and looked at once."""
    return {key: RECORD.look(case) for key, case in RECORD.cases.items()}


def outputs(name: str) -> Any:
    return RECORD.outputs[name]


def recorded(name: str) -> Any:
    """What is filed under a name, None for what the reference did not come to."""
    return RECORD.outputs[name] if name in RECORD.outputs.files else None


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert np.shape(found) == np.shape(expected)
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() < tolerance


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", RECORD.cases_with("image_embeds"))
def test_pictures(looked: dict[str, Looked], key: str) -> None:
    backbone = looked[key].engine.backbone
    (ready,) = backbone.preprocess([RECORD.cases[key].image])
    patches = [1, 2 * ready.grid.rows, 2 * ready.grid.columns]
    assert patches == outputs(f"{key}/image_grid_thw").tolist()
    close(strided(ready.pixels), outputs(f"{key}/pixel_probe"))
    (tokens,) = backbone.encode([ready])
    close(tokens, outputs(f"{key}/image_embeds"))


@pytest.mark.parametrize("key", RECORD.cases_with("input_ids"))
def test_prompts(looked: dict[str, Looked], key: str) -> None:
    case = looked[key]
    assert [*case.prefix.ids, *case.words] == outputs(f"{key}/input_ids").tolist()


# --- maps and boxes ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", RECORD.cases_with("pred_roi"))
def test_roi_logits(looked: dict[str, Looked], key: str) -> None:
    case, image = looked[key], RECORD.cases[key].image
    grid = case.engine.backbone.image_grid(image)
    look = Look(case.prefix, grid, case.words, case.engine.zoom)
    (found,) = roi_logits(case.engine.models, [look])
    close(found, outputs(f"{key}/pred_roi"))


@pytest.mark.parametrize("key", RECORD.cases_with("blurred"))
def test_blurred_maps(looked: dict[str, Looked], key: str) -> None:
    close(looked[key].proposal.roi_map, outputs(f"{key}/blurred"))


@pytest.mark.parametrize(("key", "k"), AT_THRESHOLDS)
def test_boxes(looked: dict[str, Looked], key: str, k: int) -> None:
    """From our own maps, in cells and in pixels; no box where the reference did not zoom."""
    backbone, image = looked[key].engine.backbone, RECORD.cases[key].image
    blurred = looked[key].proposal.roi_map
    assert blurred is not None
    grid = backbone.image_grid(image)
    region = propose(blurred, grid, at(RECORD.thresholds(key)[k]), backbone.map_rules)
    box, source = recorded(f"{key}/box_grid/{k}"), recorded(f"{key}/box_src/{k}")
    if recorded(f"{key}/keep/{k}") is None:
        assert not region.boxes
        assert region.reason
        if source is not None:
            assert unsupported_crop(PixelBox(*source.tolist()), backbone.map_rules)
        return
    assert [list(one) for one in region.grid_boxes] == [box.tolist()]
    assert [list(one) for one in region.boxes] == [source.tolist()]


@pytest.mark.parametrize(("key", "k"), AT_THRESHOLDS)
def test_crops(looked: dict[str, Looked], key: str, k: int) -> None:
    expected = recorded(f"{key}/keep/{k}")
    if expected is None:
        return
    backbone, image = looked[key].engine.backbone, RECORD.cases[key].image
    blurred = looked[key].proposal.roi_map
    assert blurred is not None
    box = PixelBox(*outputs(f"{key}/box_src/{k}").tolist())
    crop = backbone.crop_input(image, box)
    patches = [1, 2 * crop.grid.rows, 2 * crop.grid.columns]
    assert patches == outputs(f"{key}/crop_grid_thw/{k}").tolist()
    cells = GridBox(*outputs(f"{key}/box_grid/{k}").tolist())
    over = blurred > np.float32(RECORD.thresholds(key)[k])
    assert keep_mask(over, cells, crop.grid.rows, crop.grid.columns).tolist() == expected.tolist()


@pytest.mark.parametrize("part", RECORD.parts("regions"))
def test_regions(part: str) -> None:
    """Synthetic maps of every shape; grids of one row, where the reference raised, are blurred."""
    arrays = RECORD.arrays("regions")
    names = [name for name in arrays.files if name.startswith(f"{part}/")]
    stored = {name.split("/")[1]: arrays[name] for name in names}
    width, height, least, most = stored["size_threshold_lo_hi"][[0, 1, 3, 4]].astype(int).tolist()
    threshold, logits = float(stored["size_threshold_lo_hi"][2]), stored["logits"]
    backbone = RECORD.backbone((least * CELL_PIXELS, most * CELL_PIXELS))
    # Made for the size at once, without the first of two resizes.
    grid = stretched_grid((width, height), *logits.shape)
    values = torch.sigmoid(torch.from_numpy(logits)).numpy()
    blurred = blur(darken(values, backbone.map_rules))
    region = propose(blurred, grid, at(threshold), backbone.map_rules)
    if str(stored["error"]):
        assert np.isfinite(blurred).all()
        return
    close(blurred, stored["blurred"], 1e-6)
    if "keep" not in stored:
        assert not region.boxes
        if "box_src" in stored:
            assert unsupported_crop(PixelBox(*stored["box_src"].tolist()), backbone.map_rules)
            cells = GridBox(*stored["box_grid"].tolist())
            assert list(grid.to_pixels(cells)) == stored["box_src"].tolist()
        return
    assert [list(box) for box in region.grid_boxes] == [stored["box_grid"].tolist()]
    assert [list(box) for box in region.boxes] == [stored["box_src"].tolist()]
    assert region.keep is not None
    (box,), (cells,) = region.boxes, region.grid_boxes
    columns, rows = backbone.image_rules.crop_cells(box)
    assert [1, 2 * rows, 2 * columns] == stored["crop_grid_thw"].tolist()
    assert keep_mask(region.keep, cells, rows, columns).tolist() == stored["keep"].tolist()


def stretched_grid(size: tuple[int, int], rows: int, columns: int) -> StretchedGrid:
    scale = Fraction(28 * columns, size[0]), Fraction(28 * rows, size[1])
    return StretchedGrid(rows, columns, size, 28, scale)


def same_answer(found: Any, name: str, tolerance: float = TOLERANCE) -> None:
    """Tokens and logits, as far as they were recorded."""
    tokens, logits, _ = found
    expected = outputs(f"{name}/tokens").tolist()
    assert len(expected) > 1
    assert tokens[: len(expected)] == expected
    close(logits[: len(expected)], outputs(f"{name}/logits")[: len(expected)], tolerance)


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", RECORD.cases_with("none/tokens"))
def test_answers_without_a_zoom(looked: dict[str, Looked], key: str) -> None:
    case = looked[key]
    backbone, prefix = case.engine.backbone, case.prefix
    suffix = backbone.suffix_segment(prefix.next_position, case.words)
    same_answer(answer(case.engine, prefix, suffix), f"{key}/none")
    assert positions(case, RECORD.cases[key]) == outputs(f"{key}/none/position_ids").tolist()


def positions(case: Looked, asked: Case, crops: list[CropTokens] | None = None) -> Any:
    """Positions of the whole sequence, [3, length] as lists."""
    backbone = case.engine.backbone
    (ready,) = backbone.preprocess([asked.image])
    (tokens,) = backbone.encode([ready])
    first = backbone.prefix_segment(ready, tokens)
    suffix = backbone.suffix_segment(first.next_position, case.words, crops or [])
    return first.followed_by(suffix).positions.tolist()


@pytest.mark.parametrize(("key", "k"), ZOOMS)
def test_answers_at_a_threshold(looked: dict[str, Looked], key: str, k: int) -> None:
    """The second pass, or the stock answer where nothing exceeds the threshold."""
    case, asked = looked[key], RECORD.cases[key]
    backbone, prefix, blurred = case.engine.backbone, case.prefix, case.proposal.roi_map
    assert blurred is not None
    zoom, grid = at(RECORD.thresholds(key)[k]), backbone.image_grid(asked.image)
    region = propose(blurred, grid, zoom, backbone.map_rules)
    (crops,) = crop_tokens(backbone, [asked.image], [region], [zoom], [10_000])
    name = f"{key}/zoom/{k}"
    assert bool(region.boxes) == (recorded(f"{name}/crop_embeds") is not None)
    if region.boxes:
        ready = backbone.crop_input(asked.image, region.boxes[0])
        close(strided(ready.pixels), outputs(f"{name}/crop_pixel_probe"))
        close(backbone.encode([ready])[0], outputs(f"{name}/crop_embeds"))
        before, stay = outputs(f"{name}/input_ids_before_dropping"), outputs(f"{name}/kept")
        suffix = backbone.suffix_segment(prefix.next_position, case.words, crops)
        assert [*prefix.ids, *suffix.ids] == before[stay].tolist()
    assert positions(case, asked, crops) == outputs(f"{name}/position_ids").tolist()
    suffix = backbone.suffix_segment(prefix.next_position, case.words, crops)
    found = answer(case.engine, prefix, suffix)
    same_answer(found, name)
    expected = outputs(f"{name}/decode_position_ids")
    assert found[2][:, : expected.shape[1]].tolist() == expected.tolist()


def test_answers_do_not_depend_on_what_was_asked_before() -> None:
    """With and without zooms, in turn and all at once, through one model: always the recorded."""
    rpn, asked = RECORD.rpn(), []
    for key, case in RECORD.cases.items():
        engine = RECORD.engine(case, rpn)
        for k in RECORD.zooms(key):
            question = Question(case.question, (case.image,), zoom=at(RECORD.thresholds(key)[k]))
            asked.append((engine, question, outputs(f"{key}/zoom/{k}/tokens").tolist()))
        if (expected := recorded(f"{key}/none/tokens")) is not None:
            plain = ZoomModel(engine.backbone, proposer="none")
            asked.append((plain, Question(case.question, (case.image,)), expected.tolist()))
    settings = {"max_new_tokens": parity.NEW_TOKENS}
    for engine, question, expected in [*asked, *asked[::-1]]:
        (found,) = engine.ask_batch([question], settings)
        assert found.text.split()[: len(expected)] == list(map(str, expected))


@pytest.mark.parametrize("key", RECORD.sharp)
def test_thinned_first_looks(key: str) -> None:
    """Cells of a large picture that no word looks at are dropped, and the rest is read again."""
    asked = RECORD.cases[key.removeprefix("sharp")]
    rpn = sharpened(RECORD.rpn())
    words = outputs(f"{key}/input_ids")
    image_ids = np.flatnonzero(words == RECORD.config["ids"]["image_token_id"])
    tail = len(RECORD.config["tail_ids"])
    text = " ".join(map(str, words[image_ids[-1] + 2 : -tail]))
    zoom = at(float(outputs(f"{key}/threshold")), thin_above=1024)
    question = Question(text, (asked.image,), zoom=zoom)
    engine = RECORD.engine(asked, rpn)
    (row,) = engine._rows([question])
    look = Look(
        engine.prefill([asked.image])[0],
        engine.backbone.image_grid(asked.image),
        tuple(engine.backbone.prompt_ids(text).after),
        zoom,
    )
    (found,) = roi_logits(engine.models, [look])
    close(found, outputs(f"{key}/pred_roi"), SHARP_TOLERANCE)
    assert [list(box) for box in row.proposal.region.boxes] == [outputs(f"{key}/box_src").tolist()]
    sequence = [*row.prefix.ids, *row.suffix.ids]
    assert len(sequence) == outputs(f"{key}/position_ids").shape[1]
    assert row.prefix.image_tokens < look.grid.cells
    kept_of_first = outputs(f"{key}/kept")[: len(look.prefix.ids)]
    assert row.prefix.length == kept_of_first.sum()
    expected = outputs(f"{key}/position_ids")[:, row.prefix.length :]
    assert row.suffix.positions.tolist() == expected.tolist()
    same_answer(answer(engine, row.prefix, row.suffix), key, SHARP_TOLERANCE)


@torch.no_grad()
def sharpened(rpn: RPN) -> RPN:
    rpn.q_proj.weight.mul_(25)
    rpn.q_proj.bias.mul_(25)
    return rpn


# --- labels and training -----------------------------------------------------------------------


RULES = label_rules({1: (0,)}, {1: (0,)}, {}, 0)
"""The published rules, with heads that no map here is read from."""


@pytest.mark.parametrize("part", RECORD.parts("pseudo_labels"))
def test_pseudo_labels(part: str) -> None:
    arrays = RECORD.arrays("pseudo_labels")
    grounding, sink = arrays[f"{part}/grounding"], arrays[f"{part}/sink"]
    size = tuple(arrays[f"{part}/image_size"].tolist())
    padding = padding_cells(size, len(grounding)) if all(size) else None
    found = pseudo_labels(grounding, sink, RULES, padding)
    assert found.tolist() == arrays[f"{part}/labels"].tolist()


@pytest.mark.parametrize("part", RECORD.parts("capture"))
def test_captured_attention(part: str) -> None:
    """Where the tokens of an answer looked that were fed back, head by head."""
    arrays = RECORD.arrays("capture")
    layers = {
        int(name.split("/layer")[1]): arrays[name]
        for name in arrays.files
        if name.startswith(f"{part}/layer")
    }
    cells = next(iter(layers.values())).shape[1]
    backbone = RECORD.backbone((cells * CELL_PIXELS, cells * CELL_PIXELS), training=True)
    engine = ZoomModel(backbone, proposer="none")
    (prefix,) = engine.prefill([RECORD.image(f"{part}.png")])
    ids, response = arrays[f"{part}/input_ids"].tolist(), arrays[f"{part}/response"].tolist()
    assert list(prefix.ids) == ids[: prefix.length]
    suffix = backbone.suffix_segment(prefix.next_position, ids[prefix.length :])
    said, _, _ = answer(engine, prefix, suffix, len(response))
    assert said == response
    fed_back = response[:-1]
    rows = read_rows(
        backbone, [prefix], [[*ids[prefix.length :], *fed_back]], [len(fed_back)], list(layers)
    )
    for layer, expected in layers.items():
        close(rows.by_layer[layer][0], expected.astype(np.float32))


def test_training_step() -> None:
    """The loss of a batch and the gradient norm of every weight of the RPN."""
    step = json.loads((RECORD.folder / "training.json").read_text())
    labels = [RECORD.arrays("pseudo_labels")[f"{one['labels']}/labels"] for one in step["samples"]]
    backbone = RECORD.backbone((576 * CELL_PIXELS, 576 * CELL_PIXELS), training=True)
    rpn = RECORD.rpn()
    model = RPNForTraining(backbone, rpn).train()
    rows = [
        {
            "image": RECORD.image(one["image"]),
            "question": " ".join(map(str, one["prompt_question_ids"])),
            "labels": own,
        }
        for one, own in zip(step["samples"], labels, strict=True)
    ]
    samples = RPNSamples(rows, backbone)
    loss = model(**collate([samples[i] for i in range(len(rows))]))["loss"]
    assert loss.item() == pytest.approx(step["loss"], abs=TOLERANCE)
    loss.backward()
    norms = {name: weight.grad.norm().item() for name, weight in rpn.named_parameters()}
    names = rpn_names(rpn.config.depth, biases=True, norm=False)
    expected = {names[theirs]: norm for theirs, norm in step["grad_norms"].items()}
    assert set(norms) == set(expected)
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=TOLERANCE), name
    assert all(weight.grad is None for weight in backbone.model.parameters())
    unused = {names.get(name) for name in step["trainable_without_gradient"]}
    assert unused == {None}
