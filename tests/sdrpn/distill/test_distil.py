"""Labels and training on the tiny random model: small data, the whole way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdrpn import RPN, LabelConfig, Question, ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import LayerHeads
from sdrpn.distill.label import label
from sdrpn.distill.pseudo_labels import IGNORED, pseudo_labels
from sdrpn.distill.trainer import RPNForTraining, RPNSamples, collate, train, training_arguments
from sdrpn.inference.generation import generate
from sdrpn.roi.proposers import Look, Models, roi_logits

LABELS = LabelConfig(
    grounding=(LayerHeads(3, (0, 2)),),
    sink=(LayerHeads(1),),
    vicrop_layer=3,
    sink_threshold=0.5,
    max_new_tokens=3,
)


def noise(seed: int, size: tuple[int, int] = (112, 112)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def questions() -> list[Question]:
    words = ["what pattern is on the red disc ?", "the blue disc ?", "pink"]
    return [Question(words[i % 3], (noise(i // 2),)) for i in range(7)]


def rows(side: int = 8, count: int = 6) -> list[dict]:
    """Images whose labels say: look at the first row of cells."""
    labels = np.zeros((side, side), np.int8)
    labels[0], labels[1] = 1, IGNORED
    return [
        {"image": noise(i), "question": "the red disc ?", "labels": labels.ravel()}
        for i in range(count)
    ]


def test_labels_are_those_of_the_maps_and_do_not_depend_on_the_batch(llava: Llava15) -> None:
    zoom = ZoomModel(llava, proposer="none", labels=LABELS)
    alone = list(label(zoom, questions(), batch_size=1))
    together = list(label(zoom, questions(), batch_size=5))
    assert len(alone) == len(together) == 7
    for one, other in zip(alone, together, strict=True):
        assert one.response == other.response
        np.testing.assert_allclose(one.grounding, other.grounding, atol=1e-3)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.grounding.shape == one.labels.shape == (8, 8)


def test_maps_are_the_attention_of_the_answer_given(llava: Llava15) -> None:
    """Recomputed from the eager attention of one full forward."""
    zoom = ZoomModel(llava, proposer="none", labels=LABELS)
    question = questions()[0]
    (labelled,) = label(zoom, [question])
    words = tuple(llava.prompt_ids(question.text).after)
    (prefix,) = zoom.prefill(question.images)
    suffix = llava.suffix_segment(prefix.next_position, words)
    (said,) = generate(llava, [prefix], [suffix], {"max_new_tokens": 3})
    assert said
    ids = [*llava.head_ids, *[llava.image_token_id] * 64, *words, *said]
    llava.model.set_attn_implementation("eager")
    try:
        output = llava.model(
            input_ids=torch.tensor([ids]),
            pixel_values=llava.pixels(question.images),
            output_attentions=True,
        )
    finally:
        llava.model.set_attn_implementation("sdpa")
    start = len(llava.head_ids)
    rows = output.attentions[3][0, [0, 2], -len(said) :, start : start + 64]
    sinks = output.attentions[1][0, :, -len(said) :, start : start + 64]
    grounding, sink = (one.mean((0, 1)).detach().reshape(8, 8).numpy() for one in (rows, sinks))
    np.testing.assert_allclose(labelled.grounding, grounding, atol=1e-3)
    expected = pseudo_labels(grounding, sink, LABELS)
    np.testing.assert_array_equal(labelled.labels, expected)
    np.testing.assert_allclose(labelled.sink, sink, atol=1e-3)
    # A sink at the peak is taken out, and what is left makes the labels.
    peak = np.unravel_index(labelled.grounding.argmax(), (8, 8))
    sharp = replace(LABELS, foreground=0.75, background=0.5, max_box_fraction=2.0)
    sharper = replace(sharp, sink_threshold=float(labelled.sink[peak]))
    (other,) = label(ZoomModel(llava, proposer="none", labels=sharper), [question])
    assert other.labels[peak] != 1
    assert (other.labels == 1).any()
    clean = np.where(labelled.sink >= labelled.sink[peak], 0, labelled.grounding)
    expected = pseudo_labels(clean.astype(np.float32), np.zeros((8, 8)), sharp)
    np.testing.assert_array_equal(other.labels, expected)
    np.testing.assert_array_equal(other.sink, labelled.sink)


def test_training_learns_and_leaves_the_backbone_alone(llava: Llava15, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in llava.model.named_parameters()}
    rpn = RPN.from_backbone(llava, 3, 3)
    samples = RPNSamples(rows(), llava)
    batch = collate([samples[i] for i in range(6)])
    with torch.no_grad():
        first = float(RPNForTraining(llava, rpn)(**batch)["loss"])
    arguments = training_arguments(
        tmp_path,
        max_steps=15,
        learning_rate=1e-3,
        per_device_train_batch_size=6,
        report_to="none",
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
        use_cpu=True,
    )
    facts = train(llava, rpn, rows(), arguments)
    with torch.no_grad():
        last = float(RPNForTraining(llava, rpn)(**batch)["loss"])
    assert last < 0.5 * first
    assert facts["steps"] == 15
    assert facts["samples"] == 6
    for name, parameter in llava.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    fresh = RPN.from_backbone(llava, 3, 3)
    moved = [
        name
        for (name, new), (_, old) in zip(
            rpn.named_parameters(), fresh.named_parameters(), strict=True
        )
        if not torch.equal(new, old)
    ]
    assert len(moved) == len(list(rpn.parameters()))


def test_training_and_looking_compute_the_same_map(llava: Llava15) -> None:
    """What was trained on whole sequences is what is asked over a cached prefix."""
    rpn = RPN.from_backbone(llava, 3, 3)
    samples = rows(count=2)
    samples[1]["question"] = "what pattern is on the pink disc ?"
    made = RPNSamples(samples, llava)
    trained = RPNForTraining(llava, rpn)
    with torch.no_grad():
        logits = trained(**collate([made[0], made[1]]))["logits"]
    zoom = ZoomModel(llava, rpn)
    looks = [
        Look(
            zoom.prefill([row["image"]])[0],
            llava.image_grid(row["image"]),
            tuple(llava.prompt_ids(row["question"]).after),
            zoom.zoom,
        )
        for row in samples
    ]
    asked = np.stack(roi_logits(Models(llava, zoom.rpn, None), looks)).reshape(2, -1)
    np.testing.assert_allclose(asked, logits.numpy(), atol=1e-4)


def test_a_batch_without_labels_has_no_loss(llava: Llava15) -> None:
    rpn = RPN.from_backbone(llava, 3, 3)
    row = rows(count=1)[0] | {"labels": np.full(64, IGNORED, np.int8)}
    loss = RPNForTraining(llava, rpn)(**collate([RPNSamples([row], llava)[0]]))["loss"]
    assert float(loss.detach()) == 0


def test_published_hyper_parameters_can_be_overridden(tmp_path: Path) -> None:
    published = training_arguments(tmp_path, use_cpu=True)
    assert (published.learning_rate, published.adam_beta2) == (5e-5, 0.98)
    assert published.lr_scheduler_type == "cosine"
    changed = training_arguments(tmp_path, use_cpu=True, learning_rate=1e-3, num_train_epochs=2)
    assert (changed.learning_rate, changed.num_train_epochs) == (1e-3, 2)


def test_labelling_without_known_heads_says_what_to_pass(llava: Llava15) -> None:
    with pytest.raises(ValueError, match="labels=LabelConfig"):
        list(label(ZoomModel(llava, proposer="none"), questions()[:1]))
