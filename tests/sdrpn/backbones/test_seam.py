"""The double, a backbone unlike LLaVA-1.5, through every station: what holds there is the seam's.

The reference is one plain forward over the whole sequence, without a cache and without neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList

from sdrpn.boxes import GridBox, PixelBox
from sdrpn.config import LabelConfig, LayerHeads, ZoomConfig
from sdrpn.distill.label import label
from sdrpn.distill.label_dataset import LabelledImages, load_labels
from sdrpn.distill.label_job import LabelJob
from sdrpn.distill.trainer import RPNForTraining, RPNSamples, collate, train, training_arguments
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.inference.attention_rows import read_rows
from sdrpn.io.questions import ImageQuestion
from sdrpn.roi.postprocess import blur
from sdrpn.roi.proposers import Look, roi_logits
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import QUESTIONS, make_image
from tests.helpers import double

TOLERANCE = 1e-4
NEW_TOKENS = 5
BRANCH_LAYER, DEPTH = 2, 3
SIZES = ((100, 60), (60, 100), (80, 80), (300, 40), (33, 47))
MASK = ZoomConfig(threshold=0.4, policy="mask", min_cells=1, max_cells_fraction=1)
LABELS = LabelConfig(
    grounding=(LayerHeads(3, (0, 2)), LayerHeads(4, (1,))),
    sink=(LayerHeads(1),),
    vicrop_layer=3,
    sink_threshold=1.0,
    max_box_fraction=1.1,
    max_new_tokens=4,
)


@pytest.fixture(scope="module", autouse=True)
def known_family() -> Iterator[None]:
    with double.registered():
        yield


@pytest.fixture(scope="module")
def backbone() -> double.Double:
    return double.Double()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Wide and not: two lengths of prefix."""
    return [make_image(*size, seed) for seed, size in enumerate(SIZES)]


@torch.no_grad()
def perturbed(backbone: double.Double) -> RPN:
    rpn = RPN.from_backbone(backbone, BRANCH_LAYER, DEPTH)
    generator = torch.Generator().manual_seed(1)
    rpn.q_proj.weight.mul_(6)
    for weight in rpn.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return rpn.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rpn(backbone: double.Double) -> RPN:
    return perturbed(backbone)


def ask(zoom: ZoomModel, questions: Sequence[Question]) -> list[tuple[Answer, torch.Tensor]]:
    """Answers with the logits of their steps."""
    steps: list[torch.Tensor] = []

    def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps.append(scores.clone())
        return scores

    settings = {"max_new_tokens": NEW_TOKENS, "logits_processor": LogitsProcessorList([keep])}
    answers = zoom.ask_batch(questions, settings)
    logits = torch.stack(steps, dim=1)
    return [
        (answer, own[: min(answer.new_tokens + 1, NEW_TOKENS)])
        for answer, own in zip(answers, logits, strict=True)
    ]


def agree(found: Sequence[tuple[Answer, Any]], expected: Sequence[tuple[Answer, Any]]) -> None:
    for (answer, logits), (other, reference) in zip(found, expected, strict=True):
        assert (answer.text, answer.regions) == (other.text, other.regions)
        assert (answer.reason, answer.crop_tokens) == (other.reason, other.crop_tokens)
        assert (logits - reference).abs().max() < TOLERANCE


def all_questions(pictures: Sequence[Image.Image]) -> list[Question]:
    return [Question(text, (image,)) for image in pictures for text in QUESTIONS]


@torch.no_grad()
def plain(
    backbone: double.Double, image: Image.Image, text: str, crop: torch.Tensor | None, at: list[int]
) -> tuple[torch.Tensor, list[int], int]:
    """(embeddings [N, C], positions, where the image begins) of a whole sequence, by hand.

    crop, at: crop tokens to insert, and the row of each in its crop; rows of the crop: 3 or 4.
    """
    ids = backbone.tokenizer("USER :")["input_ids"]
    rows, columns = (3, 5) if image.width > image.height else (4, 3)
    table = backbone.model.get_input_embeddings().weight
    question = backbone.tokenizer(f"{text} ASSISTANT :", add_special_tokens=False)["input_ids"]
    positions = [*range(len(ids)), *[len(ids) + r for r in range(rows) for _ in range(columns)]]
    parts = [table[ids], cells(backbone, image)]
    after = len(ids) + rows
    if crop is not None:
        parts.append(crop)
        positions += [after + row for row in at]
        after += at[-1] + 1 if len(at) in (12, 15) else 0
    positions += range(after, after + len(question))
    return torch.cat([*parts, table[question]]), positions, len(ids)


def cells(backbone: double.Double, image: Image.Image) -> torch.Tensor:
    """Image tokens, cell by cell: [rows * columns, C]."""
    rows, columns = (3, 5) if image.width > image.height else (4, 3)
    side = double.CELL
    small = image.resize((columns * side, rows * side))
    values = np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255 - 0.5
    found = []
    for r in range(rows):
        for c in range(columns):
            cell = values[:, r * side : (r + 1) * side, c * side : (c + 1) * side]
            found.append(backbone.tower(torch.tensor(cell.reshape(-1))))
    return torch.stack(found)


@torch.no_grad()
def greedy(
    backbone: double.Double, embeds: torch.Tensor, positions: list[int]
) -> tuple[list[int], torch.Tensor]:
    """Token ids and logits of a greedy answer, each by one full forward without a cache."""
    table = backbone.model.get_input_embeddings().weight
    ids, logits = [], []
    for _ in range(NEW_TOKENS):
        output = backbone.model(
            inputs_embeds=embeds[None],
            # Without a mask, repeated positions would be read as several packed sequences.
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            position_ids=torch.tensor([positions]),
            use_cache=False,
        )
        logits.append(output.logits[0, -1])
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == backbone.eos_token_id:
            ids.pop()
            break
        embeds = torch.cat([embeds, table[ids[-1:]]])
        positions = [*positions, positions[-1] + 1]
    return ids, torch.stack(logits)


# --- answers -----------------------------------------------------------------------------------


def test_the_double_is_unlike_llava(backbone: double.Double, pictures: list[Image.Image]) -> None:
    zoom = ZoomModel(backbone, proposer="none")
    lengths = {prefix.length for prefix in zoom.prefill(pictures)}
    assert lengths == {15 + 3, 12 + 3}
    assert {(g.rows, g.columns) for g in map(backbone.image_grid, pictures)} == {(3, 5), (4, 3)}
    assert backbone.layers[0][1].self_attn.q_proj.bias is not None  # type: ignore[union-attr]


def test_no_region_is_the_plain_model(
    backbone: double.Double, rpn: RPN, pictures: list[Image.Image]
) -> None:
    nothing = ZoomConfig(threshold=1 - 1e-9)
    questions = all_questions(pictures)
    for zoom in (
        ZoomModel(backbone, proposer="none"),
        ZoomModel(backbone, rpn, zoom=nothing),
    ):
        texts = set()
        for question, (answer, logits) in zip(questions, ask(zoom, questions), strict=True):
            embeds, positions, _ = plain(backbone, question.images[0], question.text, None, [])
            ids, reference = greedy(backbone, embeds, positions)
            text = backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert answer.text == text
            assert not answer.regions
            assert answer.image_tokens in (12, 15)
            assert (logits - reference).abs().max() < TOLERANCE
            texts.add(text)
        assert len(texts) > 5


@pytest.mark.parametrize("box", [(10, 5, 50, 30), (5, 5, 20, 33)], ids=["wide", "high"])
def test_a_region_is_one_forward_over_the_whole_sequence(
    backbone: double.Double, pictures: list[Image.Image], box: tuple[int, ...]
) -> None:
    zoom = ZoomModel(backbone, proposer="none")
    questions = [Question(t, (i,), PixelBox(*box)) for i in pictures[:3] for t in QUESTIONS]
    for question, (answer, logits) in zip(questions, ask(zoom, questions), strict=True):
        cut = question.images[0].crop(box)
        rows, columns = (3, 5) if cut.width > cut.height else (4, 3)
        at = [row for row in range(rows) for _ in range(columns)]
        crop = cells(backbone, cut)
        embeds, positions, _ = plain(backbone, question.images[0], question.text, crop, at)
        ids, reference = greedy(backbone, embeds, positions)
        assert answer.text == backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.crop_tokens == len(at)
        assert (logits - reference).abs().max() < TOLERANCE


def test_batches_order_and_cache_do_not_show(
    backbone: double.Double, rpn: RPN, pictures: list[Image.Image]
) -> None:
    """Both lengths of prefix, with and without crops, whole and masked, in one batch."""
    questions = all_questions(pictures)
    single = ZoomModel(backbone, rpn, zoom=MASK, prefix_cache=0)
    alone = [ask(single, [question])[0] for question in questions]
    answers = [answer for answer, _ in alone]
    assert {bool(answer.regions) for answer in answers} == {True, False}
    assert {answer.crop_tokens in (0, 12, 15) for answer in answers} == {True, False}
    assert len({answer.text for answer in answers}) > 5
    zoom = ZoomModel(backbone, rpn, zoom=MASK)
    agree(ask(zoom, questions), alone)
    agree(ask(zoom, questions[::-1]), alone[::-1])
    order = np.random.default_rng(0).permutation(len(questions))
    for start in range(0, len(order), 3):
        some = [int(i) for i in order[start : start + 3]]
        agree(ask(zoom, [questions[i] for i in some]), [alone[i] for i in some])


def test_beams_and_losses(backbone: double.Double, rpn: RPN, pictures: list[Image.Image]) -> None:
    questions = all_questions(pictures)[:8]
    zoom = ZoomModel(backbone, rpn, zoom=MASK)
    beams = {"num_beams": 3, "max_new_tokens": NEW_TOKENS}
    together = [answer.text for answer in zoom.ask_batch(questions, beams)]
    assert together == [zoom.ask_batch([question], beams)[0].text for question in questions]
    words = ["red", "level", "dotted", "blue disc", "pink", "cyan", "green", "checked"]
    scored = zoom.loss_batch(questions, words)
    for question, word, (loss, _, _) in zip(questions, words, scored, strict=True):
        ((alone, _, _),) = zoom.loss_batch([question], [word])
        assert loss == pytest.approx(alone, abs=TOLERANCE)


# --- the map -----------------------------------------------------------------------------------


def test_the_map_of_a_batch_is_that_of_one_full_forward(
    backbone: double.Double, rpn: RPN, pictures: list[Image.Image]
) -> None:
    """The RPN over the whole sequence, uncached; the head by plain products, with its rotation."""
    zoom = ZoomModel(backbone, rpn)
    looks = [
        Look(prefix, backbone.image_grid(image), backbone.prompt_ids(text).after, MASK)
        for prefix, image in zip(zoom.prefill(pictures), pictures, strict=True)
        for text in QUESTIONS
    ]
    found = roi_logits(zoom.models, looks)
    pairs = [(image, text) for image in pictures for text in QUESTIONS]
    for map_, (image, text) in zip(found, pairs, strict=True):
        expected = full_map(backbone, rpn, image, text)
        assert map_.shape == expected.shape
        assert np.abs(map_ - expected).max() < TOLERANCE * max(1, np.abs(expected).max())
        assert expected.std() > 0.05


@torch.no_grad()
def full_map(backbone: double.Double, rpn: RPN, image: Image.Image, text: str) -> np.ndarray:
    embeds, positions, start = plain(backbone, image, text, None, [])
    where = torch.tensor([positions])
    cos, sin = backbone.model.model.rotary_emb(embeds[None], position_ids=where)
    hidden, length = embeds[None], len(embeds)
    causal = torch.full((1, 1, length, length), float("-inf")).triu(1)
    own: Any = rpn.layers
    for layer in [*backbone.model.model.layers[:BRANCH_LAYER], *own]:
        hidden = layer(hidden, attention_mask=causal, position_embeddings=(cos, sin))
    eps = backbone.text_config.rms_norm_eps
    scale = torch.rsqrt((hidden * hidden).mean(-1, keepdim=True) + eps)
    states = (hidden * scale * rpn.map_norm.weight)[0]

    def turned(values: torch.Tensor, rows: slice) -> torch.Tensor:
        heads = values.reshape(len(values), -1, 16)
        low, high = heads[..., :8], heads[..., 8:]
        c, s = cos[0, rows, None], sin[0, rows, None]
        return heads * c + torch.cat([-high, low], dim=-1) * s

    rows, columns = (3, 5) if image.width > image.height else (4, 3)
    image_rows = slice(start, start + rows * columns)
    query = turned(states[-1:] @ rpn.q_proj.weight.T + rpn.q_proj.bias, slice(-1, None))[0]
    keys = turned(states[image_rows] @ rpn.k_proj.weight.T + rpn.k_proj.bias, image_rows)
    logits = [np.mean([float(query[h] @ key[h // 2]) / 4 for h in range(4)]) for key in keys]
    return np.array(logits).reshape(rows, columns)


def test_an_rpn_is_saved_with_its_variant_and_loaded(
    backbone: double.Double, rpn: RPN, pictures: list[Image.Image], tmp_path: Path
) -> None:
    rpn.save_pretrained(tmp_path)
    loaded = RPN.from_pretrained(tmp_path)
    assert (loaded.config.backbone, loaded.config.rotary_head) == ("double", True)
    assert (loaded.config.head_bias, loaded.config.final_norm) == (True, False)
    questions = all_questions(pictures)[:3]
    before = ask(ZoomModel(backbone, rpn, zoom=MASK), questions)
    agree(ask(ZoomModel(backbone, loaded, zoom=MASK), questions), before)
    for (one, _), (other, _) in zip(
        ask(ZoomModel(backbone, loaded, zoom=MASK), questions), before, strict=True
    ):
        assert np.array_equal(one.roi_map, other.roi_map)  # type: ignore[arg-type]


def test_an_rpn_of_another_family_is_refused(llava: Any, rpn: RPN) -> None:
    with pytest.raises(ValueError, match=r"does not fit .*: it has backbone double"):
        ZoomModel(llava, rpn)


# --- where it looked, labels, training ---------------------------------------------------------


def test_attention_rows_are_those_of_eager_attention(
    backbone: double.Double, pictures: list[Image.Image]
) -> None:
    zoom = ZoomModel(backbone, proposer="none")
    words = [backbone.prompt_ids(text).after for text in QUESTIONS[:3]]
    rows = read_rows(backbone, zoom.prefill(pictures[:3]), words, [1, 2, 3], [0, 4])
    backbone.model.set_attn_implementation("eager")
    try:
        for i, (image, text, count) in enumerate(
            zip(pictures[:3], QUESTIONS[:3], (1, 2, 3), strict=True)
        ):
            embeds, positions, start = plain(backbone, image, text, None, [])
            output = backbone.model(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                position_ids=torch.tensor([positions]),
                output_attentions=True,
                use_cache=False,
            )
            cells_ = 15 if image.width > image.height else 12
            for layer in (0, 4):
                expected = output.attentions[layer][0, :, -count:, start : start + cells_].mean(1)
                assert (rows.by_layer[layer][i] - expected).abs().max() < TOLERANCE
    finally:
        backbone.model.set_attn_implementation("sdpa")


def test_proposers_without_training(backbone: double.Double, pictures: list[Image.Image]) -> None:
    """attention and vicrop: maps of the image's own shape, boxes inside the image."""
    questions = all_questions(pictures)
    for proposer in ("attention", "vicrop"):
        zoom = ZoomModel(backbone, proposer=proposer, labels=LABELS, zoom=MASK)
        answers = zoom.ask_batch(questions, {"max_new_tokens": 2})
        assert any(answer.regions for answer in answers)
        for question, answer in zip(questions, answers, strict=True):
            grid = backbone.image_grid(question.images[0])
            if answer.roi_map is not None:
                assert answer.roi_map.shape == (grid.rows, grid.columns)
            for box in answer.regions:
                assert 0 <= box.x0 < box.x1 <= question.images[0].width
                assert 0 <= box.y0 < box.y1 <= question.images[0].height


def test_labels_then_training(
    backbone: double.Double, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """sdrpn label's job and sdrpn train's trainer, on images of both grids, in mixed batches."""
    (tmp_path / "images").mkdir()
    items = []
    for number, image in enumerate(pictures):
        image.save(tmp_path / "images" / f"{number}.png")
        items += [ImageQuestion(f"{number}-{t}", f"{number}.png", t) for t in QUESTIONS]
    zoom = ZoomModel(backbone, proposer="none", labels=LABELS)
    out = tmp_path / "labels"
    LabelJob(zoom, items, out, images=tmp_path / "images", batch_size=7, shard_size=9).run()
    rows = load_labels(out)
    assert {(row["rows"], row["columns"]) for row in rows} == {(3, 5), (4, 3)}
    alone = label(zoom, [Question(QUESTIONS[0], (pictures[1],))])
    first = next(iter(alone))
    kept = rows[4]
    assert (kept["id"], kept["rows"], kept["columns"]) == ("1-" + QUESTIONS[0], 4, 3)
    assert kept["labels"] == first.labels.ravel().tolist()
    np.testing.assert_allclose(kept["grounding"], first.grounding.ravel(), atol=1e-3)
    assert kept["extent"] == [0, 0, 60, 100]

    data = LabelledImages(rows, tmp_path / "images")
    assert len(data) >= 8
    rpn = RPN.from_backbone(backbone, BRANCH_LAYER, DEPTH)
    samples = RPNSamples(data, backbone)
    batch = [samples[i] for i in range(len(samples))]
    together = RPNForTraining(backbone, rpn)(**collate(batch))
    single = [RPNForTraining(backbone, rpn)(**collate([one])) for one in batch]
    counts = [int((one["labels"] != -100).sum()) for one in batch]
    mean = sum(float(s["loss"]) * n for s, n in zip(single, counts, strict=True)) / sum(counts)
    assert float(together["loss"]) == pytest.approx(mean, abs=1e-5)
    trained = train(
        backbone,
        rpn,
        data,
        training_arguments(
            tmp_path / "run",
            per_device_train_batch_size=8,
            max_steps=30,
            learning_rate=3e-3,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
        ),
    )
    assert trained["steps"] == 30
    after = float(RPNForTraining(backbone, rpn)(**collate(batch))["loss"])
    assert after < 0.8 * float(together["loss"])


def test_boxes_of_a_grid_that_is_not_square(backbone: double.Double) -> None:
    grid = backbone.image_grid(Image.new("RGB", (100, 60)))
    assert grid.to_pixels(GridBox(0, 0, 5, 3)) == PixelBox(0, 0, 100, 60)
    assert grid.to_pixels(GridBox(1, 1, 2, 3)) == PixelBox(20, 20, 40, 60)
    assert grid.to_cells(PixelBox(21, 21, 39, 39)) == GridBox(1, 1, 2, 2)
    assert blur(np.ones((3, 5), np.float32)).shape == (3, 5)
