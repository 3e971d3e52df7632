"""Labels and training for Qwen2.5-VL: its rules, two kinds of pictures, and the commands."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdrpn.backbones import qwen25_vl_published as published
from sdrpn.backbones.qwen25_vl import Qwen25VL
from sdrpn.backbones.registry import family_of
from sdrpn.cli import app
from sdrpn.config import ONE_WORD, LabelConfig, LayerHeads
from sdrpn.convert.labels import convert_labels
from sdrpn.distill.head_search import find_heads
from sdrpn.distill.label import kind_of, label_batch
from sdrpn.distill.label_dataset import load_labels, read_label_config, read_settings
from sdrpn.distill.label_job import LabelJob, relabel
from sdrpn.distill.pseudo_labels import label_cells, padding_cells, pseudo_labels
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference.generation import generate
from sdrpn.io.questions import ImageQuestion
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import QUESTIONS, make_image
from tests.helpers.qwen_tiny import CELL_PIXELS, make_qwen, write_checkpoint

runner = CliRunner()
RULES = published.label_rules({3: (0, 2), 4: (1,)}, {1: (3,)}, {2: (1,)}, vicrop_layer=3)
LOUD = replace(RULES, sink_threshold=1.0, floor=0.0, max_box_fraction=1.1, max_new_tokens=4)
"""Rules under which a random model's attention gives labels."""


@pytest.fixture(scope="module")
def qwen() -> Qwen25VL:
    return make_qwen().as_trained()


@pytest.fixture(scope="module")
def engine(qwen: Qwen25VL) -> ZoomModel:
    return ZoomModel(qwen, proposer="none", labels=LOUD)


# --- rules, by hand ----------------------------------------------------------------------------


def drawn(*lines: str) -> np.ndarray:
    """A map of digits, each a tenth of a tenth: 9 is 0.09."""
    return np.array([[int(digit) / 100 for digit in line] for line in lines])


def test_foreground_has_a_margin_and_padding_is_background() -> None:
    grounding = drawn(
        "900000",
        "000000",
        "050000",
        "000020",
        "000000",
        "990000",
    )
    padding = np.zeros((6, 6), dtype=bool)
    padding[0] = padding[5] = True
    rules = replace(RULES, foreground=0.5, background=0.5)
    found = pseudo_labels(grounding, np.zeros((6, 6)), rules, padding)
    # One cell of foreground, its box grown to 3 x 3; the 2 outside is under half of 5.
    assert found.tolist() == [
        [0, 0, 0, 0, 0, 0],
        [-100, -100, -100, 0, 0, 0],
        [-100, 1, -100, 0, 0, 0],
        [-100, -100, -100, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_sinks_and_faint_maps() -> None:
    grounding, sink = drawn("9000", "0000", "0003", "0000"), drawn("1000", "0000", "0000", "0000")
    rules = replace(RULES, max_box_fraction=1.1)
    labels, reason = label_cells(grounding, sink, rules)
    assert reason is None
    assert labels[0, 0] == 0, "a sink of 1e-2 or more is no foreground"
    assert labels[2, 3] == 1
    labels, reason = label_cells(grounding / 10, sink / 10, rules)
    assert labels[0, 0] == 1
    labels, reason = label_cells(grounding / 10, sink, rules)
    assert (labels == -100).all()
    assert reason == "attention to the image too faint"


def test_boxes_of_half_the_grid_are_ignored() -> None:
    """With the margin, which is cut at the border: 4 x 2 of 16 cells."""
    grounding = drawn("9000", "0000", "0000", "9000")
    labels, reason = label_cells(grounding, grounding * 0, RULES)
    assert reason == "foreground over too much of the image"
    assert (labels == -100).all()


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((100, 50), (6, 18), (0, 24)),
        ((50, 100), (0, 24), (6, 18)),
        ((77, 77), (0, 24), (0, 24)),
        ((1000, 10), (11, 13), (0, 24)),  # one row of picture, and one more by rounding
        ((100, 46), (6, 18), (0, 24)),  # 11.04 rows: an odd number lies off the middle
    ],
)
def test_padding_around_a_picture(
    size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    shown = ~padding_cells(size, 24)
    expected = np.zeros((24, 24), dtype=bool)
    expected[slice(*rows), slice(*columns)] = True
    assert np.array_equal(shown, expected)


# --- kinds of pictures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("gqa/images/1.jpg", "natural"),
        ("ocr_vqa/images/1.jpg", "text"),
        ("data/TextVQA/1.jpg", "text"),
        ("ocr_vqa.jpg", "natural"),
        ("", "natural"),
    ],
)
def test_kinds_go_by_folders(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def test_natural_pictures_are_asked_for_boxes() -> None:
    asked = RULES.of("natural").asked(f"Where is it?\n{ONE_WORD}")
    assert asked == f"Where is it?\n{published.ASK_FOR_BOXES}"
    assert RULES.of("text").asked(f"Where is it?\n{ONE_WORD}") == f"Where is it?\n{ONE_WORD}"


@pytest.mark.parametrize("kind", ["natural", "text"])
def test_maps_are_the_attention_of_the_answer(qwen: Qwen25VL, engine: ZoomModel, kind: str) -> None:
    """Recomputed from the eager attention of one full forward, over the kind's own prompt."""
    question = Question(f"what is on it ?\n{ONE_WORD}", (make_image(90, 161, 2),))
    (found,) = label_batch(engine, [question], [kind])
    text = f"what is on it ?\n{published.ASK_FOR_BOXES if kind == 'natural' else ONE_WORD}"
    (ready,) = qwen.preprocess(question.images)
    (tokens,) = qwen.encode([ready])
    first = qwen.prefix_segment(ready, tokens)
    whole = first.followed_by(qwen.suffix_segment(first.next_position, qwen.prompt_ids(text).after))
    (prefix,) = engine.prefill(question.images)
    suffix = qwen.suffix_segment(prefix.next_position, qwen.prompt_ids(text).after)
    (said,) = generate(qwen, [prefix], [suffix], {"max_new_tokens": 4})
    assert len(said) == 4, "cut: the last token was never fed back"
    assert found.response == qwen.tokenizer.decode(said, skip_special_tokens=True).strip()
    whole = whole.followed_by(qwen.text_segment(whole.next_position, said[:3]))
    qwen.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = qwen.model.model.language_model(
                inputs_embeds=whole.embeds[None],
                position_ids=whole.positions[:, None],
                attention_mask=torch.ones(1, whole.length, dtype=torch.long),
                output_attentions=True,
                use_cache=False,
            )
    finally:
        qwen.model.set_attn_implementation("sdpa")
    rows = [one[0, :, -3:, first.image].mean(1) for one in output.attentions]
    if kind == "natural":
        grounding, sink = torch.stack([rows[3][0], rows[3][2], rows[4][1]]).mean(0), rows[1][3]
    else:
        grounding, sink = rows[2][1], rows[2][1] * 0
    assert found.grounding.shape == (24, 24)
    assert np.abs(found.grounding.ravel() - grounding.numpy()).max() < 1e-4
    assert np.abs(found.sink.ravel() - sink.numpy()).max() < 1e-4


def test_a_batch_of_both_kinds(engine: ZoomModel) -> None:
    questions = [Question(f"{t}\n{ONE_WORD}", (make_image(90, 161, 2),)) for t in QUESTIONS]
    kinds = ["natural", "text", "natural", "text"]
    together = label_batch(engine, questions, kinds)
    for question, kind, found in zip(questions, kinds, together, strict=True):
        (alone,) = label_batch(engine, [question], [kind])
        assert found.response == alone.response
        np.testing.assert_allclose(found.grounding, alone.grounding, atol=1e-3)
        assert (found.sink == 0).all() == (kind == "text")


def pictures(folder: Path) -> list[ImageQuestion]:
    """Natural pictures and pictures of text, wide and high."""
    items = []
    for place in ("gqa", "ocr_vqa"):
        (folder / place).mkdir(parents=True)
        for number, size in enumerate([(161, 90), (90, 161), (112, 112)]):
            name = f"{place}/{number}.png"
            make_image(*size, number).save(folder / name)
            items += [ImageQuestion(f"{name}-{t}", name, f"{t}\n{ONE_WORD}") for t in QUESTIONS[:2]]
    return items


def test_relabelling_knows_the_padding(engine: ZoomModel, tmp_path: Path) -> None:
    """The same labels again out of the kept maps, padding included; others by other rules."""
    items = pictures(tmp_path / "images")
    LabelJob(engine, items, tmp_path / "a", images=tmp_path / "images", batch_size=5).run()
    settings = read_settings(tmp_path / "a")
    assert (settings["square"], settings["min_pixels"]) == (True, 451_584)
    relabel(tmp_path / "a", tmp_path / "b", LOUD)
    first, again = load_labels(tmp_path / "a"), load_labels(tmp_path / "b")
    assert first["labels"][:] == again["labels"][:]
    assert first["size"][:][0] == [161, 90]
    relabel(tmp_path / "a", tmp_path / "c", replace(LOUD, padding_background=False))
    assert load_labels(tmp_path / "c")["labels"][:] != first["labels"][:]
    wide: Any = first[0]
    labels = np.array(wide["labels"]).reshape(24, 24)
    assert (labels[:5] == 0).all(), "padding above a wide picture is background"


def test_kinds_that_do_not_exist(engine: ZoomModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be natural, text or None, got 'chart'"):
        LabelJob(engine, [], tmp_path, images=None, kind="chart")


# --- heads -------------------------------------------------------------------------------------


def test_heads_are_found_with_the_familys_rules(qwen: Qwen25VL) -> None:
    cells = 64 * CELL_PIXELS
    small = Qwen25VL(qwen.model, qwen.processor, min_pixels=cells, max_pixels=cells, training=True)
    # A random model looks everywhere, and nowhere much.
    small.label_rules = replace(small.label_rules, floor=1e-6, max_box_fraction=1.1)  # type: ignore[misc]
    engine = ZoomModel(small, proposer="none")
    found = find_heads(engine, scenes=6, side=224, max_new_tokens=3, max_heads=2).labels
    assert found.grounding
    assert (found.box_margin, found.floor, found.padding_background) == (1, 1e-6, True)
    assert (found.instead, found.text_grounding) == ("", ())


def test_branches_of_sizes_without_published_ones(tmp_path: Path) -> None:
    for layers, hidden, expected in ((36, 2048, 21), (28, 3584, 16), (64, 5120, 37), (6, 64, 3)):
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden}
        for values in (sizes, {"text_config": sizes}):
            config = {"model_type": "qwen2_5_vl", **values}
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert family_of(str(tmp_path)) == (Qwen25VL, expected)


# --- the authors' labels -----------------------------------------------------------------------


def published_records(images: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records = []
    for number, size in enumerate([(100, 50), (50, 100), (80, 80)]):
        (images / "gqa").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(images / "gqa" / f"{number}.jpg")
        grounding = rng.random((24, 24)) * 1e-4
        grounding[11:13, 10 + number] = 0.05
        records.append(
            {
                "question_id": str(number),
                "prompt": f"<image>\nWhat?\n{ONE_WORD}",
                "text": "10 10 20 20 {it}",
                "image": f"gqa/{number}.jpg",
                "sink_attn": np.zeros((24, 24)),
                "grounding_attn_o2i": grounding,
            }
        )
    return records


@pytest.mark.parametrize("size", ["qwen-3b", "qwen-7b"])
def test_published_labels_are_converted(tmp_path: Path, size: str) -> None:
    records = published_records(tmp_path / "images")
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps(records))
    words = ["convert", "labels", str(tmp_path / "labels.pkl"), "--out", str(tmp_path / "out")]
    refused = runner.invoke(app, [*words, "--size", size])
    assert refused.exit_code == 2
    assert "--images" in refused.output
    words += ["--images", str(tmp_path / "images"), "--size", size]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    rows: Any = load_labels(tmp_path / "out")
    config = read_label_config(tmp_path / "out")
    assert config == published.SIZES[size == "qwen-7b"].labels
    sizes = [(100, 50), (50, 100), (80, 80)]
    for row, record, own in zip(rows, records, sizes, strict=True):
        padding = padding_cells(own, 24)
        half = record["grounding_attn_o2i"]
        expected = pseudo_labels(half, record["sink_attn"], config, padding)
        assert row["labels"] == expected.ravel().tolist()
        assert (row["foreground"], row["size"]) == (2, list(own))
        assert row["question"] == f"What?\n{ONE_WORD}"
    settings = read_settings(tmp_path / "out")
    assert (settings["image_tokens"], settings["square"]) == (None, True)


def test_flat_maps_are_another_familys(tmp_path: Path) -> None:
    records = published_records(tmp_path / "images")
    records[0]["sink_attn"] = np.zeros(576)
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps(records))
    with pytest.raises(ValueError, match=r"sink_attn must be one grid .*got the shape \(576,\)"):
        convert_labels(
            tmp_path / "labels.pkl",
            tmp_path / "out",
            images=tmp_path / "images",
            config=published.SIZES[0].labels,
            preprocessing=published.PREPROCESSING,
        )


# --- the commands ------------------------------------------------------------------------------


def test_from_pictures_to_an_rpn_by_the_commands(tmp_path: Path) -> None:
    """sdrpn label, sdrpn train, sdrpn look, on a folder as the Hub lays it out."""
    model = write_checkpoint(make_qwen(), tmp_path / "qwen")
    items = pictures(tmp_path / "images")
    lines = [{"id": i.id, "image": i.image, "question": i.question} for i in items]
    (tmp_path / "data.json").write_text(json.dumps(lines))
    heads = {
        "grounding": [{"layer": 3, "heads": [0, 2]}],
        "sink": [{"layer": 1, "heads": [0]}],
        "vicrop_layer": 3,
        "text_grounding": [{"layer": 2, "heads": [1]}],
        "sink_threshold": 1.0,
        "max_box_fraction": 1.1,
        "max_new_tokens": 3,
        "padding_background": True,
    }
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    labelled = runner.invoke(
        app,
        [
            *("label", "--model", str(model), "--data", str(tmp_path / "data.json")),
            *("--images", str(tmp_path / "images"), "--out", str(tmp_path / "labels")),
            *("--heads", str(tmp_path / "heads.json"), "--dtype", "float32"),
        ],
    )
    assert labelled.exit_code == 0, labelled.output
    rows: Any = load_labels(tmp_path / "labels")
    zero_sinks = [not any(row["sink"]) for row in rows]
    assert zero_sinks == [row["image"].startswith("ocr_vqa") for row in rows]
    trained = runner.invoke(
        app,
        [
            *("train", "--labels", str(tmp_path / "labels"), "--model", str(model)),
            *("--out", str(tmp_path / "rpn"), "--dtype", "float32", "--max_steps", "2"),
            *("--per_device_train_batch_size", "4", "--held-out", "0", "--global-batch", "4"),
            *("--report_to", "none"),
        ],
    )
    assert trained.exit_code == 0, trained.output
    rpn = RPN.from_pretrained(tmp_path / "rpn")
    assert (rpn.config.branch_layer, rpn.config.depth) == (3, 3)
    assert rpn.config.zoom.threshold == 0.1
    assert rpn.config.labels == LabelConfig.from_dict(heads)
    assert rpn.facts["learning rate"] == 1e-4
    zoom = ZoomModel.from_pretrained(str(model), str(tmp_path / "rpn"), dtype="float32")
    picture = make_image(161, 90, 0)
    (answer,) = zoom.ask_batch([Question(QUESTIONS[0], (picture,))], {"max_new_tokens": 2})
    grid = zoom.backbone.image_grid(picture)
    assert answer.roi_map is not None
    assert answer.roi_map.shape == (grid.rows, grid.columns) != (24, 24)


def test_padding_is_no_option_here(tmp_path: Path) -> None:
    model = write_checkpoint(make_qwen(), tmp_path / "qwen")
    with pytest.raises(ValueError, match="qwen2_5_vl model, which has no padding"):
        ZoomModel.from_pretrained(str(model), proposer="none", padding="pad")


def test_published_heads_name_their_layers() -> None:
    config = LabelConfig.from_dict(json.loads(json.dumps(asdict(published.SIZES[1].labels))))
    assert config == published.SIZES[1].labels
    with pytest.raises(ValueError, match="head 4 of layer 22"):
        config.check_fits(20, 28, "a model")
    assert config.text_grounding[0] == LayerHeads(22, (1, 4))
