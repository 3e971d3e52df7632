"""Attention rows against eager attention of the whole model, and the proposers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdrpn.backbones.llava15 import Llava15, square_grid
from sdrpn.boxes import GridBox, ImageGrid, PixelBox
from sdrpn.config import LabelConfig, LayerHeads, ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.attention_rows import read_rows
from sdrpn.roi.postprocess import blur, propose
from sdrpn.roi.sinks import remove_sinks
from sdrpn.roi.vicrop import (
    NEUTRAL_QUESTION,
    contrast,
    propose_window,
    relative_attention,
    window_sums,
)
from tests.conftest import QUESTIONS, make_image, make_llava
from tests.helpers import by_hand

TOLERANCE = 1e-5
LABELS = LabelConfig(
    grounding=(LayerHeads(1, (0, 3)), LayerHeads(4, (2,))),
    sink=(LayerHeads(2),),
    vicrop_layer=3,
    sink_threshold=0.02,
    max_new_tokens=5,
)


def eager_rows(
    llava: Llava15, image: Image.Image, question: str, response: Sequence[int]
) -> list[torch.Tensor]:
    """Attention of the last tokens to the image, layer by layer: [H, T], mean over the tokens.

    The whole sequence, whole matrices, by eager attention. An empty response reads the last token
    of the prompt.
    """
    embeds, start = by_hand.sequence(llava, image, question)
    table = llava.model.get_input_embeddings().weight
    embeds = torch.cat([embeds, table[list(response)]])
    inner = llava.model.model.language_model
    backend = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        output = inner(inputs_embeds=embeds[None], output_attentions=True, use_cache=False)
    finally:
        inner.set_attn_implementation(backend)
    tokens = max(len(response), 1)
    image_columns = slice(start, start + llava.image_tokens)
    return [a[0, :, -tokens:, image_columns].mean(1) for a in output.attentions]


RESPONSES = ([31, 44], [50], [33, 34, 35, 36, 31], [])


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_rows_are_those_of_eager_attention(images: list[Image.Image], key_value_heads: int) -> None:
    """A batch of questions and responses of different length, on different images."""
    llava = make_llava(key_value_heads=key_value_heads)
    prefixes = ZoomModel(llava, proposer="none").prefill(images[:4])
    suffixes = [
        [*llava.prompt_ids(text).after, *response]
        for text, response in zip(QUESTIONS, RESPONSES, strict=True)
    ]
    counts = [max(len(response), 1) for response in RESPONSES]
    rows = read_rows(llava, prefixes, suffixes, counts, [0, 1, 4])
    assert set(rows.by_layer) == {0, 1, 4}
    chosen = (LayerHeads(1, (0, 3)), LayerHeads(4, (2,)), LayerHeads(0))
    means = rows.mean(chosen)
    for i, (image, text, response) in enumerate(zip(images, QUESTIONS, RESPONSES, strict=False)):
        expected = eager_rows(llava, image, text, response)
        for layer, found in rows.by_layer.items():
            assert torch.stack(found).shape == (4, 4, 64)
            assert (found[i] - expected[layer]).abs().max() < TOLERANCE
        seven = [expected[1][0], expected[1][3], expected[4][2], *expected[0]]
        assert (means[i] - torch.stack(seven).mean(0)).abs().max() < TOLERANCE
    assert torch.stack(rows.by_layer[1]).std(dim=-1).min() > 1e-5


def test_rows_do_not_depend_on_neighbours(llava: Llava15, images: list[Image.Image]) -> None:
    prefixes = ZoomModel(llava, proposer="none").prefill(images[:4])
    suffixes = [llava.prompt_ids(text).after for text in QUESTIONS]
    together = read_rows(llava, prefixes, suffixes, [2, 1, 4, 3], [3]).by_layer[3]
    for i, count in enumerate([2, 1, 4, 3]):
        alone = read_rows(llava, prefixes[i : i + 1], suffixes[i : i + 1], [count], [3])
        assert (together[i] - alone.by_layer[3][0]).abs().max() < TOLERANCE


def test_the_backbone_runs_no_further_than_asked(llava: Llava15, images: Any) -> None:
    ran: list[int] = []
    layers = llava.model.model.language_model.layers
    handles = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(layers)
    ]
    prefixes = ZoomModel(llava, proposer="none").prefill(images[:1])
    ran.clear()
    try:
        read_rows(llava, prefixes, [llava.prompt_ids("yellow").after], [1], [0, 2])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 2]


# --- the attention proposer --------------------------------------------------------------------


def ask_all(zoom: ZoomModel, images: Sequence[Image.Image]) -> list[tuple[Question, Any]]:
    questions = [Question(text, (image,)) for image in images for text in QUESTIONS]
    return list(zip(questions, zoom.ask_batch(questions, {"max_new_tokens": 5}), strict=True))


def test_attention_proposer_reads_the_models_own_answer(
    llava: Llava15, images: list[Image.Image]
) -> None:
    """The grounding map, sinks out, over its maximum, then from the blur."""
    settings = ZoomConfig(threshold=0.4, policy="strongest")
    zoom = ZoomModel(llava, proposer="attention", zoom=settings, labels=LABELS)
    kinds = set()
    for question, answer in ask_all(zoom, images):
        image = question.images[0]
        embeds, _ = by_hand.sequence(llava, image, question.text)
        response, _ = by_hand.greedy(llava, embeds, LABELS.max_new_tokens)
        if not response:
            assert answer.reason == "the model's first answer was empty"
            assert answer.roi_map is None
            kinds.add("empty")
            continue
        rows = eager_rows(llava, image, question.text, response)
        grounding = torch.stack([rows[1][0], rows[1][3], rows[4][2]]).mean(0).numpy()
        clean = remove_sinks(grounding, rows[2].mean(0).numpy(), LABELS.sink_threshold)
        kinds.add("sinks" if (clean == 0).any() else "no sinks")
        expected = blur((clean / clean.max()).reshape(8, 8))
        assert np.abs(answer.roi_map - expected).max() < 1e-4
        region = propose(expected, llava.image_grid(image), settings)
        assert (answer.regions, answer.reason) == (region.boxes, region.reason)
        kinds.add("zoom" if answer.regions else "no zoom")
    assert kinds == {"empty", "sinks", "no sinks", "zoom", "no zoom"}


def test_attention_proposer_with_nothing_but_sinks(llava: Llava15, images: Any) -> None:
    zoom = ZoomModel(llava, proposer="attention", labels=replace(LABELS, sink_threshold=0.0))
    for _, answer in ask_all(zoom, images[:2]):
        assert answer.regions == ()
        assert answer.reason
        assert answer.roi_map is None or not answer.roi_map.any()


def test_attention_proposer_reads_no_answer_past_the_context(
    monkeypatch: pytest.MonkeyPatch, llava: Llava15, images: list[Image.Image]
) -> None:
    """With room for two tokens, of an answer of five it reads two."""
    prompt = len(llava.plain_ids("yellow")) - 1 + 64
    found = []
    for context, tokens in ((prompt + 2, 5), (1024, 2), (1024, 5)):
        monkeypatch.setattr(llava, "context_length", context)
        labels = replace(LABELS, max_new_tokens=tokens)
        zoom = ZoomModel(llava, proposer="attention", labels=labels)
        asked = [Question("yellow", (image,)) for image in images]
        found.append([a.roi_map for a in zoom.ask_batch(asked, {"max_new_tokens": 1})])
    cut, short, whole = found
    for one, other in zip(cut, short, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert any(not np.allclose(one, other) for one, other in zip(cut, whole, strict=True))


def test_attention_proposer_needs_to_know_the_heads(llava: Llava15, images: Any) -> None:
    zoom = ZoomModel(llava, proposer="attention")
    with pytest.raises(ValueError, match=f"no grounding heads are known for {llava.name}"):
        ask_all(zoom, images[:1])


# --- ViCrop ------------------------------------------------------------------------------------


def test_vicrop_proposer_divides_by_a_neutral_prompt(
    llava: Llava15, images: list[Image.Image]
) -> None:
    zoom = ZoomModel(llava, proposer="vicrop", labels=LABELS)
    found = set()
    for question, answer in ask_all(zoom, images):
        image = question.images[0]
        asked, plain = (
            eager_rows(llava, image, text, [])[LABELS.vicrop_layer].mean(0)
            for text in (question.text, NEUTRAL_QUESTION)
        )
        ratio = (asked / plain).reshape(8, 8).numpy()
        assert np.allclose(answer.roi_map, ratio / ratio.max(), atol=1e-3)
        assert answer.regions == propose_window(ratio, llava.image_grid(image)).boxes
        assert answer.crop_tokens == 64
        found.add(answer.regions)
    assert len(found) > len(images)


def test_vicrop_reads_the_layer_in_the_middle_unless_told(llava: Llava15, images: Any) -> None:
    """Layer 14 of 32, in proportion: 3 of 6."""
    told = ZoomModel(llava, proposer="vicrop", labels=LABELS).ask(images[0], "yellow")
    untold = ZoomModel(llava, proposer="vicrop").ask(images[0], "yellow")
    other = ZoomModel(llava, proposer="vicrop", labels=replace(LABELS, vicrop_layer=1))
    assert np.array_equal(told.roi_map, untold.roi_map)
    assert not np.allclose(told.roi_map, other.ask(images[0], "yellow").roi_map)


def test_window_sums() -> None:
    ratio = np.arange(16.0).reshape(4, 4)
    assert window_sums(ratio, 1, 1).tolist() == ratio.tolist()
    assert window_sums(ratio, 4, 4).tolist() == [[120.0]]
    assert window_sums(ratio, 3, 3).tolist() == [[45.0, 54.0], [81.0, 90.0]]
    # Rows 0 to 1 and 2 to 3 of columns 0 to 2 and 1 to 3, and so on.
    assert window_sums(ratio, 2, 3).tolist() == [[18.0, 24.0], [42.0, 48.0], [66.0, 72.0]]


def test_contrast_is_the_best_window_less_its_neighbours() -> None:
    sums = np.array([[1.0, 2.0, 3.0], [4.0, 9.0, 5.0], [0.0, 6.0, 0.0]])
    assert contrast(sums, 4) == ((9 - (2 + 6 + 4 + 5) / 4) / 4, (1, 1))
    corner = np.array([[9.0, 2.0], [4.0, 8.0]])
    assert contrast(corner, 1) == (9 - (2 + 4) / 2, (0, 0))
    assert contrast(np.array([[7.0]]), 1) == (7.0, (0, 0))
    wide = np.array([[1.0, 9.0, 2.0]])  # no row below, though there is a third column
    assert contrast(wide, 1) == (9 - (1 + 2) / 2, (0, 1))
    assert contrast(wide.T, 1) == (9 - (1 + 2) / 2, (1, 0))


def test_relative_attention_survives_zeros() -> None:
    found = relative_attention(np.array([0.2, 0.0, 0.1]), np.array([0.1, 0.0, 0.0]))
    assert found[:2].tolist() == [2.0, 0.0]
    assert np.isfinite(found).all()
    half = relative_attention(np.array([0, 0.5], np.float32), np.zeros(2, np.float32))
    assert half.dtype == np.float32
    assert half[0] == 0
    assert 4e37 < half[1] < 5e37  # over the smallest normal float32, 1.18e-38


def peak(grid: int, *cells: tuple[int, int]) -> np.ndarray:
    """A level map with peaks at (row, column)."""
    ratio = np.full((grid, grid), 1.0)
    for row, column in cells:
        ratio[row, column] = 30.0
    return ratio


def reference_window(ratio: np.ndarray, view: ImageGrid) -> tuple[float, int, int, int]:
    """ViCrop by loops: (side in source pixels, cells, row, column) of the winner."""
    grid, best = len(ratio), None
    for multiple in (1, 1.2, 1.4, 1.6, 1.8, 2):
        side = min(336 * multiple, *view.size)
        cells = min(max(round(side / max(view.size) * grid), 1), grid)
        places = range(grid - cells + 1)
        sums = {(r, c): ratio[r : r + cells, c : c + cells].sum() for r in places for c in places}
        r, c = max(sums, key=lambda place: sums[place])
        near = [sums[p] for p in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if p in sums]
        value = (sums[r, c] - (np.mean(near) if near else 0)) / cells**2
        if best is None or value > best[0]:
            best = (value, side, cells, r, c)
    assert best is not None
    return best[1:]


@pytest.mark.parametrize(
    "size",
    [(1344, 1344), (1344, 700), (500, 1344), (2000, 1500), (336, 336), (100, 80), (3000, 200)],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_window_search_against_loops(size: tuple[int, int], seed: int) -> None:
    ratio = np.random.default_rng(seed).random((24, 24)) ** 4
    view = square_grid(size, 24, 336)
    region = propose_window(ratio, view)
    side, cells, row, column = reference_window(ratio, view)
    assert region.grid_boxes == (GridBox(column, row, column + cells, row + cells),)
    (box,) = region.boxes
    assert 0 <= box.x0 < box.x1 <= size[0]
    assert 0 <= box.y0 < box.y1 <= size[1]
    assert (box.x1 - box.x0, box.y1 - box.y0) == (int(side), int(side))
    cell = max(size) / 24
    for axis, first in ((0, column), (1, row)):
        pad = (max(size) - size[axis]) / 2
        wanted = (first + cells / 2) * cell - pad - side / 2
        start = min(max(wanted, 0), size[axis] - side)
        assert abs(box[axis] - start) <= 1


@pytest.mark.parametrize(
    ("cells", "box"),
    [
        (6, (392, 280, 728, 616)),  # 336 px
        (7, (386, 274, 789, 677)),  # 1.2 x 336
        (8, (380, 268, 850, 738)),  # 1.4 x 336
        (10, (403, 291, 940, 828)),  # 1.6 x 336
        (11, (397, 285, 1001, 889)),  # 1.8 x 336
    ],
)
def test_each_side_wins_on_a_square_of_its_size(cells: int, box: tuple[int, ...]) -> None:
    """1344 px on 24 cells of 56 px: a level square at (row 5, column 7) in an empty map."""
    ratio = np.zeros((24, 24))
    ratio[5 : 5 + cells, 7 : 7 + cells] = 1.0
    region = propose_window(ratio, square_grid((1344, 1344), 24, 336))
    assert region.grid_boxes == ((7, 5, 7 + cells, 5 + cells),)
    assert region.boxes == (box,)


def test_the_widest_window_wins_on_four_points_at_its_corners() -> None:
    """Twice 336 px are 12 cells: only that window holds all four, and each neighbour holds two."""
    ratio = np.zeros((24, 24))
    ratio[[5, 5, 16, 16], [7, 18, 7, 18]] = 1.0
    region = propose_window(ratio, square_grid((1344, 1344), 24, 336))
    assert region.grid_boxes == ((7, 5, 19, 17),)
    assert region.boxes == ((392, 280, 1064, 952),)


def test_of_equal_windows_the_smallest_is_taken() -> None:
    region = propose_window(np.zeros((24, 24)), square_grid((1344, 1344), 24, 336))
    assert region.grid_boxes == ((0, 0, 6, 6),)
    assert region.boxes == ((0, 0, 336, 336),)


def test_windows_are_squares_of_the_source_where_cells_are_not() -> None:
    """160 x 80 px squeezed into 80 x 80: 80 px are 8 cells high and 4 cells wide."""
    ratio = np.zeros((8, 8))
    ratio[3, 5] = 1.0
    region = propose_window(ratio, ImageGrid(8, 8, (160, 80), 10, (0.5, 1.0)))
    assert region.grid_boxes == ((2, 0, 6, 8),)
    assert region.boxes == ((40, 0, 120, 80),)


def test_a_window_may_be_one_cell() -> None:
    """A strip of 40 px on cells of 56 px."""
    ratio = np.zeros((24, 24))
    ratio[11, 7] = 1.0
    region = propose_window(ratio, square_grid((1344, 40), 24, 336))
    assert region.grid_boxes == ((7, 11, 8, 12),)
    assert region.boxes == ((400, 0, 440, 40),)


def test_the_neutral_prompt_is_vicrops_own() -> None:
    assert NEUTRAL_QUESTION == "Write a general description of the image."


def test_window_around_a_peak() -> None:
    """1344 px on 24 cells: the window of 336 px is 6 cells wide and begins where the sum does."""
    region = propose_window(peak(24, (10, 13)), square_grid((1344, 1344), 24, 336))
    (box,) = region.boxes
    assert (box.x1 - box.x0, box.y1 - box.y0) == (336, 336)
    middle = (13.5 * 56, 10.5 * 56)
    assert box.x0 <= middle[0] <= box.x1
    assert box.y0 <= middle[1] <= box.y1


def test_windows_at_the_border_stay_inside() -> None:
    for row, column in ((0, 0), (23, 23), (0, 23)):
        (box,) = propose_window(peak(24, (row, column)), square_grid((1344, 1344), 24, 336)).boxes
        assert (box.x0 == 0) if column == 0 else (box.x1 == 1344)
        assert (box.y0 == 0) if row == 0 else (box.y1 == 1344)


def test_windows_of_small_images_are_the_whole_side() -> None:
    """No window is larger than the image: a small one is cropped to its square."""
    (box,) = propose_window(peak(8, (3, 3)), square_grid((100, 100), 8, 112)).boxes
    assert box == PixelBox(0, 0, 100, 100)
    (box,) = propose_window(peak(8, (3, 7)), square_grid((1, 1), 8, 112)).boxes
    assert box == PixelBox(0, 0, 1, 1)


def test_windows_of_wide_images() -> None:
    """The side is capped at the short side, in whose band of cells the picture lies."""
    view = square_grid((1600, 100), 24, 336)
    (box,) = propose_window(peak(24, (12, 20)), view).boxes
    assert (box.y0, box.y1) == (0, 100)
    assert box.x1 - box.x0 == 100
    assert box.x0 <= 20.5 * 1600 / 24 <= box.x1


def test_broken_ratio_maps_are_refused() -> None:
    ratio = peak(8)
    ratio[0, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"^the attention ratio map holds values that are not finite"
    ):
        propose_window(ratio, square_grid((100, 100), 8, 112))


def test_vicrop_crops_stay_inside_odd_images(llava: Llava15) -> None:
    zoom = ZoomModel(llava, proposer="vicrop")
    for size in ((5, 3), (400, 9), (9, 400), (500, 400)):
        image = make_image(*size, seed=6)
        (box,) = zoom.ask(image, "yellow", max_new_tokens=1).regions
        assert 0 <= box.x0 < box.x1 <= size[0]
        assert 0 <= box.y0 < box.y1 <= size[1]
