"""The exactness the project promises, in float32 and greedy: no cache, batch or neighbour shows.

Logits are read inside generate(), by a logits processor that changes nothing, so that what is
compared is what answers are made of.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList

from sdrpn.backbones.base import Segment
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.inference.prefix import Prefix, PrefixCache, batch_rows, stack
from sdrpn.roi.postprocess import blur
from sdrpn.roi.proposers import Look, roi_logits
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import QUESTIONS, THRESHOLD, make_llava, make_rpn
from tests.helpers import by_hand

NEW_TOKENS = 6
TOLERANCE = 1e-4
MASK = ZoomConfig(threshold=THRESHOLD, policy="mask")
BBOX = ZoomConfig(threshold=THRESHOLD, policy="bbox")


class Recorder:
    """A logits processor that keeps what it sees: [step][row, vocabulary]."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.clone())
        return scores


def ask(
    zoom: ZoomModel, questions: Sequence[Question], **generation: Any
) -> list[tuple[Answer, torch.Tensor]]:
    """Answer questions on one image each in one batch: (answer, logits [its own steps, V])."""
    recorder = Recorder()
    processors = LogitsProcessorList([recorder])
    generation = {"max_new_tokens": NEW_TOKENS, "logits_processor": processors} | generation
    answers = zoom.ask_batch(questions, generation)
    steps = torch.stack(recorder.steps, dim=1)
    return [
        (answer, logits[: min(answer.new_tokens + 1, len(logits))])
        for answer, logits in zip(answers, steps, strict=True)
    ]


def stock(llava: Llava15, image: Image.Image, text: str, **generation: Any) -> tuple[str, Any]:
    """What plain transformers says: its processor on the padded image, its generate()."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), (122, 116, 104))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    # The torchvision processor rounds a bicubic resize unlike PIL: it gets the final size.
    small = square.resize((llava.side, llava.side), Image.Resampling.BICUBIC)
    prompt = by_hand.prompt(llava, text)
    inputs = llava.processor(images=small, text=prompt, return_tensors="pt")
    generation = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | generation
    output = llava.model.generate(
        **inputs, **generation, output_logits=True, return_dict_in_generate=True
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    text = llava.tokenizer.decode(new, skip_special_tokens=True).strip()
    return text, torch.stack(output.logits)[:, 0]


def all_questions(images: Sequence[Image.Image], zoom: ZoomConfig | None = None) -> list[Question]:
    return [Question(text, (image,), zoom=zoom) for image in images for text in QUESTIONS]


@pytest.fixture(scope="module")
def engine(llava: Llava15, perturbed_rpn: RPN) -> ZoomModel:
    return ZoomModel(llava, perturbed_rpn, zoom=MASK, prefix_cache=0)


@pytest.fixture(scope="module")
def alone(engine: ZoomModel, images: list[Image.Image]) -> list[tuple[Answer, torch.Tensor]]:
    """Every question asked alone, without any cache."""
    return [ask(engine, [question])[0] for question in all_questions(images)]


def agree(found: Sequence[tuple[Answer, Any]], expected: Sequence[tuple[Answer, Any]]) -> None:
    """Same texts and regions; logits of every step within the tolerance."""
    for (answer, logits), (other, reference) in zip(found, expected, strict=True):
        assert (answer.text, answer.regions) == (other.text, other.regions)
        assert (answer.reason, answer.crop_tokens) == (other.reason, other.crop_tokens)
        assert answer.new_tokens == other.new_tokens
        assert logits.shape == reference.shape
        assert (logits - reference).abs().max() < TOLERANCE


def test_the_fixture_is_worth_testing(alone: list[tuple[Answer, torch.Tensor]]) -> None:
    """With and without a zoom, whole and masked crops, long and short answers, all different."""
    answers = [answer for answer, _ in alone]
    assert len({answer.text for answer in answers}) > len(answers) / 2
    assert {bool(answer.regions) for answer in answers} == {True, False}
    assert {0 < answer.crop_tokens < 64 for answer in answers if answer.regions} == {True, False}
    assert len({answer.new_tokens for answer in answers}) > 1


# --- no region is the stock model -------------------------------------------------------------


@pytest.mark.parametrize("text", QUESTIONS)
@pytest.mark.parametrize("proposer", ["none", "rpn"])
def test_no_region_is_stock(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image], proposer: str, text: str
) -> None:
    """The same tokens, and logits within 1e-4, whether nobody looked or nothing was found."""
    nothing = ZoomConfig(threshold=1 - 1e-9)
    zoom = ZoomModel(llava, perturbed_rpn, proposer=proposer, zoom=nothing)
    found = ask(zoom, [Question(text, (image,)) for image in images])
    for image, (answer, logits) in zip(images, found, strict=True):
        expected, reference = stock(llava, image, text)
        assert answer.text == expected
        assert answer.regions == ()
        assert answer.reason is not None
        assert answer.crop_tokens == 0
        assert (logits - reference).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "generation",
    [{"num_beams": 3}, {"repetition_penalty": 1.7}, {"num_beams": 2, "length_penalty": 2.0}],
    ids=str,
)
def test_no_region_is_stock_under_other_settings(
    llava: Llava15, images: list[Image.Image], generation: dict[str, Any]
) -> None:
    """Beams and penalties read the whole prompt, which a cache could hide from them."""
    zoom = ZoomModel(llava, proposer="none")
    questions = all_questions(images[:3])
    generation = {"max_new_tokens": NEW_TOKENS} | generation
    texts = [answer.text for answer in zoom.ask_batch(questions, generation)]
    assert texts == [stock(llava, q.images[0], q.text, **generation)[0] for q in questions]
    greedy = [answer.text for answer in zoom.ask_batch(questions, {"max_new_tokens": NEW_TOKENS})]
    assert texts != greedy


def test_penalties_count_each_rows_own_words(llava: Llava15, images: list[Image.Image]) -> None:
    """In a batch of different lengths, padding between prefix and question is no word said."""
    zoom = ZoomModel(llava, proposer="none")
    questions = [Question(text, (images[0],)) for text in QUESTIONS]
    penalised = ask(zoom, questions, repetition_penalty=1.7)
    plain = ask(zoom, questions)
    for question, (_, scores), (_, logits) in zip(questions, penalised, plain, strict=True):
        # Penalties come before the recorder: logits of the words in the prompt are moved, as
        # transformers documents it, and only theirs.
        ids = llava.tokenizer(by_hand.prompt(llava, question.text))["input_ids"]
        expected = logits[0].clone()
        said = expected[sorted(set(ids))]
        expected[sorted(set(ids))] = torch.where(said < 0, said * 1.7, said / 1.7)
        assert (scores[0] - expected).abs().max() < TOLERANCE


# --- with a region: reuse of the prefix is one full forward -----------------------------------


def recompute(llava: Llava15, answer: Answer, question: Question, zoom: ZoomConfig) -> Any:
    """Ids and logits by full forwards over [text][image][crops][question], crops made by hand."""
    image = question.images[0]
    keep = None
    if answer.roi_map is not None and zoom.policy == "mask":
        over = answer.roi_map > zoom.threshold
        masked = answer.crop_tokens < llava.image_tokens
        keep = by_hand.kept(over, llava.grid) if masked else None
    crops = [by_hand.crop_of(llava, image, box, keep) for box in answer.regions]
    embeds, _ = by_hand.sequence(llava, image, question.text, torch.cat(crops))
    return by_hand.greedy(llava, embeds, NEW_TOKENS)


def check_full_forward(llava: Llava15, found: Any, question: Question, zoom: ZoomConfig) -> None:
    answer, logits = found
    ids, reference = recompute(llava, answer, question, zoom)
    assert answer.text == llava.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer.new_tokens == len(ids)
    assert (logits - torch.stack(reference)).abs().max() < TOLERANCE


def test_given_box_is_one_full_forward(llava: Llava15, images: list[Image.Image]) -> None:
    zoom = ZoomModel(llava, proposer="none")
    for image in images:
        box = PixelBox(3, 5, image.width // 2, image.height)
        question = Question(QUESTIONS[0], (image,), box)
        (found,) = ask(zoom, [question])
        assert found[0].regions == (box,)
        assert found[0].crop_tokens == llava.image_tokens
        check_full_forward(llava, found, question, zoom.zoom)
        ((_, without),) = ask(zoom, [replace(question, box=None)])
        assert (found[1][0] - without[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("zoom", "kind"),
    [(MASK, "one crop"), (MASK, "masked crop"), (BBOX, "two crops")],
    ids=["one crop", "masked crop", "two crops"],
)
def test_zoom_is_one_full_forward(
    llava: Llava15, engine: ZoomModel, images: list[Image.Image], zoom: ZoomConfig, kind: str
) -> None:
    questions = all_questions(images, zoom)
    found = ask(engine, questions)
    chosen = [
        (one, question)
        for one, question in zip(found, questions, strict=True)
        if {
            "one crop": one[0].crop_tokens == llava.image_tokens,
            "masked crop": 0 < one[0].crop_tokens < llava.image_tokens,
            "two crops": len(one[0].regions) == 2,
        }[kind]
    ]
    assert len(chosen) >= 3
    for one, question in chosen:
        check_full_forward(llava, one, question, zoom)


@pytest.mark.parametrize(("budget", "rows", "columns"), [(1.5, 3, 6), (0.1, 1, 1), (9, 8, 8)])
def test_token_budget_is_one_full_forward(
    llava: Llava15, images: list[Image.Image], budget: float, rows: int, columns: int
) -> None:
    """The crop's grid is resized to cells of the box x budget: here the box has 2 x 4 cells."""
    image = images[0]
    box = PixelBox(14, 28, 14 * 5, 14 * 4)
    config = ZoomConfig(token_budget=budget)
    zoom = ZoomModel(llava, proposer="none", zoom=config)
    ((answer, logits),) = ask(zoom, [Question(QUESTIONS[2], (image,), box)])
    assert answer.crop_tokens == rows * columns
    tokens = by_hand.crop_of(llava, image, box).unflatten(0, (llava.grid, llava.grid))
    small = torch.nn.functional.interpolate(
        tokens.permute(2, 0, 1)[None], (rows, columns), mode="bilinear", align_corners=False
    )
    crop = small[0].flatten(1).T
    embeds, _ = by_hand.sequence(llava, image, QUESTIONS[2], crop)
    _, reference = by_hand.greedy(llava, embeds, NEW_TOKENS)
    assert (logits - torch.stack(reference)).abs().max() < TOLERANCE


# --- batches, orders, neighbours, caches ------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 7, 20])
@pytest.mark.parametrize("order", ["given", "shuffled"])
def test_batches_do_not_show(
    engine: ZoomModel, images: list[Image.Image], alone: Any, size: int, order: str
) -> None:
    """Any batch size, order and neighbours give what each question gives alone."""
    questions = all_questions(images)
    places = list(range(len(questions)))
    if order == "shuffled":
        random.Random(size).shuffle(places)
    for start in range(0, len(places), size):
        batch = places[start : start + size]
        agree(ask(engine, [questions[i] for i in batch]), [alone[i] for i in batch])


def test_one_question_many_times(engine: ZoomModel, images: list[Image.Image], alone: Any) -> None:
    """Rows of one image and one question in a batch: a prefix may stand in many rows."""
    question = all_questions(images)[2]
    agree(ask(engine, [question] * 3), [alone[2]] * 3)


def test_caches_do_not_show(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image], alone: Any
) -> None:
    """Cold, warm and too small a prefix cache give what no cache gives."""
    questions = all_questions(images)
    one = ZoomModel(llava, perturbed_rpn, zoom=MASK).prefill(images[:1])[0].nbytes
    for limit in (10 * one, 2 * one, one // 2):
        zoom = ZoomModel(llava, perturbed_rpn, zoom=MASK, prefix_cache=limit)
        for _ in ("cold", "warm"):
            for start in range(0, len(questions), 7):
                rows = slice(start, start + 7)
                agree(ask(zoom, questions[rows]), alone[rows])
        assert len(zoom.prefixes) == min(limit // one, len(images))
        assert zoom.prefixes.nbytes == len(zoom.prefixes) * one


def test_answers_leave_the_cached_prefix_alone(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image]
) -> None:
    """Nothing that is asked writes to what was read."""
    zoom = ZoomModel(llava, perturbed_rpn, zoom=MASK)
    (prefix,) = zoom.prefill(images[1:2])
    tensors = [t for pair in (*prefix.kv, *prefix.rpn_kv) for t in pair] + [prefix.rpn_keys]
    before = [t.clone() for t in tensors]
    questions = [Question(text, (images[1],)) for text in QUESTIONS]
    zoom.ask_batch(questions, {"max_new_tokens": 3, "num_beams": 2})
    zoom.ask_batch(questions[:1], {"max_new_tokens": 3})
    assert zoom.prefill(images[1:2])[0] is prefix
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_prefixes_hold_no_more_memory_than_they_count(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image]
) -> None:
    """A view would keep the tensors of its whole batch alive, and the cache's bound untrue."""
    for count in (1, 2, 5):
        for prefix in ZoomModel(llava, perturbed_rpn, prefix_cache=0).prefill(images[:count]):
            tensors = [t for pair in (*prefix.kv, *prefix.rpn_kv) for t in pair]
            assert len(tensors) == 2 * (6 + 2)
            tensors.append(prefix.rpn_keys)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            assert sum(s.nbytes() for s in storages.values()) == prefix.nbytes
            # 4 bytes x 128 channels x (16 tensors of text and image, one of the image alone).
            assert prefix.nbytes == 4 * 128 * (16 * prefix.length + 64)


def test_prefix_cache_drops_the_least_recently_used(llava: Llava15, images: Any) -> None:
    one = ZoomModel(llava, proposer="none").prefill(images[:1])[0].nbytes
    zoom = ZoomModel(llava, proposer="none", prefix_cache=2 * one)
    first, second = zoom.prefill(images[:2])
    assert zoom.prefill(images[:1])[0] is first
    zoom.prefill(images[2:3])
    assert zoom.prefill(images[:1])[0] is first
    assert zoom.prefill(images[1:2])[0] is not second
    with pytest.raises(ValueError, match="-1"):
        ZoomModel(llava, proposer="none", prefix_cache=-1)


def plain_prefix(tokens: int) -> Prefix:
    """Of one layer, with 8 bytes a token: keys and values of one channel."""
    kv = ((torch.zeros(1, 1, tokens, 1), torch.zeros(1, 1, tokens, 1)),)
    return Prefix(kv, (), None, tuple(range(tokens)), slice(0, tokens), tokens)


def test_the_prefix_cache_counts_what_it_holds() -> None:
    cache = PrefixCache(100)
    cache.put("a", plain_prefix(5))
    cache.put("b", plain_prefix(7))
    assert (len(cache), cache.nbytes) == (2, 96)
    cache.put("b", plain_prefix(1))  # known already
    assert (len(cache), cache.nbytes, cache.get("b").length) == (2, 96, 7)  # type: ignore[union-attr]
    cache.put("c", plain_prefix(13))  # larger than the cache: nothing is dropped for it
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, True, False)
    assert cache.get("a") is not None
    assert cache.get("c") is None
    cache.put("d", plain_prefix(6))  # drops b, which was used before a
    assert ("a" in cache, "b" in cache, "d" in cache) == (True, False, True)
    assert cache.nbytes == 88
    cache.put("e", plain_prefix(12))  # one that drops both; 96 of 100 bytes are no reason to more
    assert (len(cache), cache.nbytes, "e" in cache) == (1, 96, True)
    cache.clear()
    assert (len(cache), cache.nbytes, "e" in cache) == (0, 0, False)
    whole = PrefixCache(40)
    whole.put("a", plain_prefix(5))  # just fits
    assert (len(whole), whole.nbytes) == (1, 40)
    off = PrefixCache(0)
    off.put("a", plain_prefix(1))
    assert len(off) == 0


def test_a_limit_of_crop_tokens_shrinks_their_grid(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image]
) -> None:
    box = PixelBox(10, 10, 150, 90)
    for limit, tokens in ((None, 64), (64, 64), (36, 36), (40, 36), (1, 1)):
        zoom = ZoomConfig(crop_tokens=limit)
        engine = ZoomModel(llava, perturbed_rpn, zoom=zoom)
        assert engine.ask(images[1], QUESTIONS[0], box=box).crop_tokens == tokens
    with pytest.raises(ValueError, match="crop_tokens must be 1 or more, got 0"):
        ZoomConfig(crop_tokens=0)


def test_suffixes_are_padded_between_prefix_and_suffix() -> None:
    two = Segment((7, 8), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3, 4]]), 5)
    one = Segment((9,), torch.tensor([[5.0, 6.0]]), torch.tensor([[3]]), 4)
    batch = batch_rows([two, one], [3, 3])
    assert batch.embeds.tolist() == [[[1, 2], [3, 4]], [[0, 0], [5, 6]]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]]
    assert batch.mask.dtype == torch.long
    assert batch.positions.tolist() == [[[3, 4], [0, 3]]]
    assert batch.prefix_length == 3


def test_shorter_prefixes_are_padded_on_their_left() -> None:
    one = Segment((9,), torch.tensor([[5.0, 6.0]]), torch.tensor([[1]]), 2)
    two = Segment((7, 8), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3, 4]]), 5)
    batch = batch_rows([one, two], [1, 3])
    assert batch.mask.tolist() == [[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [[[0, 1], [3, 4]]]
    keys = [torch.full((1, 1, length, 2), float(length)) for length in (1, 3)]
    cache: Any = stack([((key, -key),) for key in keys])
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[0, 0, 1], [3, 3, 3]]
    assert cache.layers[0].values[:, 0, :, 0].tolist() == [[0, 0, -1], [-3, -3, -3]]


def test_images_made_ready_ahead_do_not_show(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image], alone: Any
) -> None:
    """Pixels prepared beforehand are what would have been made, and are made once."""
    questions = all_questions(images)
    zoom = ZoomModel(llava, perturbed_rpn, zoom=MASK)
    zoom.prepare(questions)
    prepared = {key: ready.pixels.clone() for key, ready in zoom._ready.items()}
    assert len(prepared) == len(images)
    for image, pixels in zip(images, prepared.values(), strict=True):
        torch.testing.assert_close(pixels, llava.pixels([image])[0], rtol=0, atol=0)
    agree(ask(zoom, questions), alone)
    assert not zoom._ready  # what was used is let go
    zoom.prepare(questions)
    assert not zoom._ready  # and what is read already needs no pixels


def test_the_prefix_cache_is_a_share_of_free_memory(
    llava: Llava15, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdrpn.engine.free_memory", lambda device: 1000)
    assert ZoomModel(llava, proposer="none").prefixes.max_bytes == 250
    assert ZoomModel(llava, proposer="none", prefix_cache=7).prefixes.max_bytes == 7


def test_images_are_known_by_their_pixels_and_size(llava: Llava15) -> None:
    """Equal pixels share a prefix; the same bytes in another shape, or one pixel more, do not."""
    zoom = ZoomModel(llava, proposer="none")
    values = np.arange(96, dtype=np.uint8)
    first = Image.fromarray(values.reshape(4, 8, 3))
    turned = Image.fromarray(values.reshape(8, 4, 3))
    brighter = first.copy()
    brighter.putpixel((7, 3), (255, 255, 255))
    prefixes = zoom.prefill([first, turned, brighter, first.copy()])
    assert prefixes[0] is prefixes[3]
    assert len({id(prefix) for prefix in prefixes}) == 3
    assert len(zoom.prefixes) == 3


def count_tower(llava: Llava15) -> tuple[list[int], Any]:
    """Images shown to the vision tower, call by call, and the handle that ends the counting."""
    calls: list[int] = []

    def hook(_: Any, inputs: Any, keywords: Any, __: Any) -> None:
        pixels = inputs[0] if inputs else keywords["pixel_values"]
        calls.append(len(pixels))

    handle = llava.model.model.vision_tower.register_forward_hook(hook, with_kwargs=True)
    return calls, handle


def test_questions_on_one_image_share_its_prefix(llava: Llava15, images: Any) -> None:
    """The tower sees an image once in a batch, once more for all crops, and never when warm."""
    zoom = ZoomModel(llava, proposer="none")
    same = images[0].copy()
    questions = [Question(text, (image,)) for text in QUESTIONS for image in (images[0], same)]
    crops = [replace(question, box=PixelBox(0, 0, 50, 50)) for question in questions[:3]]
    calls, handle = count_tower(llava)
    try:
        zoom.ask_batch(questions, {"max_new_tokens": 1})
        assert calls == [1]
        zoom.ask_batch(questions, {"max_new_tokens": 1})
        assert calls == [1]
        zoom.ask_batch([*crops, Question("yellow", (images[1],))], {"max_new_tokens": 1})
        assert calls == [1, 1, 3]
    finally:
        handle.remove()


def test_image_modes_do_not_show(engine: ZoomModel) -> None:
    """Grey, palette and transparent images are answered like their RGB pixels."""
    grey = Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10) * 2)
    for mode in ("L", "P", "RGBA", "LA"):
        odd = grey.convert(mode)
        box = PixelBox(2, 2, 9, 9)
        pair = [Question("yellow", (one,), box) for one in (odd, odd.convert("RGB"))]
        first, second = ask(engine, pair)
        agree([first], [second])


# --- the RPN's map ----------------------------------------------------------------------------


def cached_maps(llava: Llava15, rpn: RPN, images: Sequence[Image.Image]) -> np.ndarray:
    """RoI logits of every question, all in one batch over cached prefixes."""
    zoom = ZoomModel(llava, rpn)
    looks = []
    for prefix, image in zip(zoom.prefill(images), images, strict=True):
        for text in QUESTIONS:
            words = tuple(llava.prompt_ids(text).after)
            looks.append(Look(prefix, llava.image_grid(image), words, zoom.zoom))
    return np.stack(roi_logits(zoom.models, looks))


@pytest.mark.parametrize("multi_head", [True, False])
@pytest.mark.parametrize("perturbed", [False, True], ids=["fresh", "perturbed"])
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_map_is_the_methods(
    images: list[Image.Image], perturbed: bool, multi_head: bool, key_value_heads: int
) -> None:
    """The RPN's map by plain matrix products, uncached, whole sequence, against the engine."""
    llava = make_llava(key_value_heads=key_value_heads)
    rpn = make_rpn(llava, perturbed=perturbed, multi_head=multi_head)
    found = cached_maps(llava, rpn, images)
    pairs = [(image, text) for image in images for text in QUESTIONS]
    expected = np.stack([by_hand.roi_logits(llava, rpn, *pair) for pair in pairs])
    scale = max(1.0, np.abs(expected).max() / 10)
    assert np.abs(found - expected).max() < TOLERANCE * scale
    # Each is a map of its own: neither flat, nor the same for every question or image.
    assert expected.std(axis=(1, 2)).min() > 0.05
    assert (
        np.abs(expected[:, None] - expected).max(axis=(2, 3))[~np.eye(20, dtype=bool)].min() > 0.01
    )


def test_every_weight_of_the_rpn_counts(llava: Llava15, images: list[Image.Image]) -> None:
    """Perturbation reaches every weight, and every weight moves the map."""
    fresh, perturbed = (make_rpn(llava, perturbed=one) for one in (False, True))
    changed = perturbed.state_dict()
    assert all(not torch.equal(w, changed[name]) for name, w in fresh.state_dict().items())
    before = cached_maps(llava, fresh, images[:1])
    for name in fresh.state_dict():
        rpn = make_rpn(llava, perturbed=False)
        rpn.load_state_dict({name: changed[name]}, strict=False)
        assert np.abs(cached_maps(llava, rpn, images[:1]) - before).max() > 1e-3, name


def test_answers_carry_the_blurred_map(
    llava: Llava15, engine: ZoomModel, perturbed_rpn: RPN, images: list[Image.Image], alone: Any
) -> None:
    for question, (answer, _) in zip(all_questions(images)[:6], alone, strict=False):
        logits = by_hand.roi_logits(llava, perturbed_rpn, question.images[0], question.text)
        expected = blur(1 / (1 + np.exp(-logits)))
        assert answer.roi_map is not None
        assert answer.roi_map.dtype == np.float32
        assert np.abs(answer.roi_map - expected).max() < TOLERANCE


def test_save_and_load_give_the_same_map(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image], tmp_path: Any
) -> None:
    perturbed_rpn.save_pretrained(tmp_path / "rpn")
    loaded = RPN.from_pretrained(str(tmp_path / "rpn"))
    assert loaded.config == perturbed_rpn.config
    assert np.array_equal(
        cached_maps(llava, loaded, images), cached_maps(llava, perturbed_rpn, images)
    )


# --- generation -------------------------------------------------------------------------------


def test_beams_over_a_zoom(engine: ZoomModel, images: list[Image.Image]) -> None:
    """Beams in a batch, with and without regions, are each row's own beams."""
    questions = all_questions(images)[:8]
    beams = {"max_new_tokens": NEW_TOKENS, "num_beams": 3}
    together = engine.ask_batch(questions, beams)
    assert {bool(answer.regions) for answer in together} == {True, False}
    assert [a.text for a in together] == [engine.ask_batch([q], beams)[0].text for q in questions]
    greedy = engine.ask_batch(questions, {"max_new_tokens": NEW_TOKENS})
    assert [a.text for a in together] != [a.text for a in greedy]


def test_sampling_follows_the_seed(engine: ZoomModel, images: list[Image.Image]) -> None:
    questions = all_questions(images)[:4]
    generation = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": NEW_TOKENS}

    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return [answer.text for answer in engine.ask_batch(questions, generation)]

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_temperature_zero_is_greedy(engine: ZoomModel, images: list[Image.Image]) -> None:
    questions = all_questions(images)[:4]
    generation = {"do_sample": True, "temperature": 0, "max_new_tokens": NEW_TOKENS}
    expected = [a.text for a in engine.ask_batch(questions, {"max_new_tokens": NEW_TOKENS})]
    assert [a.text for a in engine.ask_batch(questions, generation)] == expected


def test_stop_strings_end_each_row(
    engine: ZoomModel, images: list[Image.Image], alone: Any
) -> None:
    """A row ends before its stop string; rows without one go on."""
    questions = all_questions(images)
    whole = [answer.text for answer, _ in alone]
    stop = whole[0].split()[2]
    stopped = engine.ask_batch(questions, {"max_new_tokens": NEW_TOKENS, "stop": [stop, "\n\n"]})
    assert [answer.text for answer in stopped] == [text.split(stop)[0].strip() for text in whole]
    assert stopped[0].new_tokens < NEW_TOKENS
    assert any(stop not in text for text in whole)


def test_settings_are_not_changed(engine: ZoomModel, images: list[Image.Image]) -> None:
    """lmms-eval reads the settings again after generation: nothing may be popped from them."""
    generation = {"max_new_tokens": 2, "stop": ["\n\n"], "temperature": 0, "do_sample": False}
    before = {**generation, "stop": ["\n\n"]}
    engine.ask_batch(all_questions(images)[:1], generation)
    assert generation == before


def test_several_returned_sequences_are_refused(engine: ZoomModel, images: Any) -> None:
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        engine.ask(images[0], "yellow", num_return_sequences=2, do_sample=True)


# --- prompts with no image or several ---------------------------------------------------------


def plain_stock(llava: Llava15, question: Question) -> str:
    """Plain transformers on any number of images of the model's own size."""
    missing = 0 if "<image>" in question.text else len(question.images)
    holders = " ".join(["<image>"] * missing)
    text = f"{holders}\n{question.text}" if holders else question.text
    prompt = by_hand.prompt(llava, "").replace("<image>\n ASSISTANT:", f"{text} ASSISTANT:")
    images = list(question.images) or None
    inputs = llava.processor(images=images, text=prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = llava.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return llava.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def squares(images: list[Image.Image]) -> list[Image.Image]:
    return [image.resize((112, 112)) for image in images]


def mixture(squares: list[Image.Image]) -> list[Question]:
    return [
        Question(QUESTIONS[0]),
        Question(QUESTIONS[1], (squares[1],)),
        Question(QUESTIONS[2], (squares[0], squares[2])),
        Question(QUESTIONS[3], (squares[3],)),
        Question(QUESTIONS[3]),
        Question(QUESTIONS[1], tuple(squares[:3])),
    ]


def test_no_or_several_images_are_stock(
    engine: ZoomModel, llava: Llava15, squares: list[Image.Image]
) -> None:
    asked = [question for question in mixture(squares) if len(question.images) != 1]
    answers = engine.ask_batch(asked, {"max_new_tokens": NEW_TOKENS})
    assert [answer.text for answer in answers] == [plain_stock(llava, q) for q in asked]
    assert [a.reason for a in answers] == [
        "no image",
        "several images",
        "no image",
        "several images",
    ]
    assert [a.image_tokens for a in answers] == [0, 128, 0, 192]
    assert all(answer.regions == () and answer.roi_map is None for answer in answers)


def test_one_warning_a_run(
    llava: Llava15, perturbed_rpn: RPN, squares: Any, caplog: pytest.LogCaptureFixture
) -> None:
    zoom = ZoomModel(llava, perturbed_rpn)
    with caplog.at_level(logging.WARNING, logger="sdrpn"):
        zoom.ask(squares[0], "yellow", max_new_tokens=1)
        assert caplog.records == []
        for _ in range(2):
            zoom.ask_batch(mixture(squares), {"max_new_tokens": 1})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "without a second look" in messages[0]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0], [1, 3], [2, 0]])
def test_mixtures_keep_their_order(
    engine: ZoomModel, squares: list[Image.Image], order: list[int]
) -> None:
    questions = mixture(squares)
    settings = {"max_new_tokens": NEW_TOKENS}
    each = [engine.ask_batch([question], settings)[0] for question in questions]
    assert len({answer.text for answer in each}) == len(each)
    together = engine.ask_batch([questions[i] for i in order], settings)
    assert [answer.text for answer in together] == [each[i].text for i in order]
    assert [answer.regions for answer in together] == [each[i].regions for i in order]


def test_placeholders_in_a_question(llava: Llava15, squares: list[Image.Image]) -> None:
    """One image goes in front, as in LLaVA-1.5's training; several stay; others are text."""
    zoom = ZoomModel(llava, proposer="none")
    squares = squares[2:]  # on these the place of a placeholder changes the answer

    def say(text: str, count: int) -> str:
        question = Question(text, tuple(squares[:count]))
        return zoom.ask_batch([question], {"max_new_tokens": NEW_TOKENS})[0].text

    assert say("is the <image> red ?", 1) == say("is the  red ?", 1) != say("red ?", 1)
    assert llava.prompt("<image>\nred ?") == llava.prompt("red ?")
    assert say("<image> <image>\nred ?", 2) == say("red ?", 2)
    between = "<image> what pattern is on the red disc ? <image> and on the blue ?"
    assert say(between, 2) == plain_stock(llava, Question(between, tuple(squares[:2])))
    assert say(between, 2) != say(between.replace("<image> ", ""), 2)
    for count in (0, 1, 3):
        letters = "¿ image ¿ red ¿ image ¿ ?"  # to the tokenizer, < is as unknown as ¿
        assert say("<image> red <image> ?", count) == say(letters, count)


def test_no_questions_no_answers(engine: ZoomModel) -> None:
    assert engine.ask_batch([]) == []


# --- losses -----------------------------------------------------------------------------------


def test_losses_are_one_full_forward(
    engine: ZoomModel, llava: Llava15, squares: list[Image.Image], images: list[Image.Image]
) -> None:
    """Mean loss of a continuation and whether greedy gives it, zoomed, stock and without images."""
    box = PixelBox(4, 4, 60, 60)
    questions = [
        Question(QUESTIONS[0], (images[0],), box),
        Question(QUESTIONS[3]),
        Question(QUESTIONS[2], (images[0],), box),
        Question(QUESTIONS[1], (squares[0], squares[1])),
    ]
    said = [a.text for a in engine.ask_batch(questions, {"max_new_tokens": 2})]
    wanted = [said[0], "red", "level checked purple", said[3]]
    results = engine.loss_batch(questions, wanted)
    assert [greedy for _, greedy, _ in results] == [True, False, False, True]
    assert [seen.regions for _, _, seen in results] == [(box,), (), (box,), ()]
    crop = by_hand.crop_of(llava, images[0], box)
    for i in (0, 2):
        embeds, _ = by_hand.sequence(llava, images[0], questions[i].text, crop)
        target = torch.tensor(llava.tokenizer(wanted[i])["input_ids"][1:])
        rows = torch.cat([embeds, llava.model.get_input_embeddings().weight[target]])
        logits = llava.model(inputs_embeds=rows[None]).logits[0, -len(target) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, target)
        assert results[i][0] == pytest.approx(float(expected), abs=TOLERANCE)
    ids = llava.tokenizer(by_hand.prompt(llava, "").replace("<image>\n", f"{QUESTIONS[3]}"))
    ids = torch.tensor([[*ids["input_ids"], *llava.tokenizer("red")["input_ids"][1:]]])
    logits = llava.model(input_ids=ids).logits[0, -2]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, -1])
    assert results[1][0] == pytest.approx(float(expected), abs=TOLERANCE)


def test_an_empty_continuation_is_refused(engine: ZoomModel, images: Any) -> None:
    with pytest.raises(ValueError, match="must not be empty, got ' ' for question 0"):
        engine.loss_batch([Question("yellow", (images[0],))], [" "])


# --- construction -----------------------------------------------------------------------------


def test_proposers_are_checked(llava: Llava15) -> None:
    with pytest.raises(ValueError, match="got 'magic'"):
        ZoomModel(llava, proposer="magic")
    with pytest.raises(ValueError, match="needs an RPN"):
        ZoomModel(llava)


@pytest.mark.parametrize("count", [0, 2])
def test_a_box_needs_one_image(squares: list[Image.Image], count: int) -> None:
    with pytest.raises(ValueError, match=f"a box needs one image .* got {count}"):
        Question("what ?", tuple(squares[:count]), box=PixelBox(0, 0, 5, 5))


def test_only_the_rpn_proposer_pays_for_an_rpn(
    llava: Llava15, perturbed_rpn: RPN, images: list[Image.Image]
) -> None:
    stock = ZoomModel(llava, perturbed_rpn, proposer="none", zoom=MASK)
    assert stock.prefill(images[:1])[0].rpn_kv == ()


def test_an_rpn_in_training_is_left_alone(llava: Llava15) -> None:
    rpn = make_rpn(llava, perturbed=True).train().requires_grad_(True)
    zoom = ZoomModel(llava, rpn)
    assert rpn.training
    assert all(p.requires_grad for p in rpn.parameters())
    assert zoom.rpn is not rpn
