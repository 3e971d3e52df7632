"""What a label says of answers that a test makes up: words with special tokens, none, too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import LabelConfig, LayerHeads
from sdrpn.distill.label import _read, label, label_batch, padding_of, respond
from sdrpn.distill.pseudo_labels import IGNORED
from sdrpn.engine import Question, ZoomModel
from tests.conftest import QUESTIONS, make_image

LABELS = LabelConfig(
    grounding=(LayerHeads(3, (0, 2)),),
    sink=(LayerHeads(1),),
    vicrop_layer=3,
    sink_threshold=1.0,
    foreground=0.75,
    background=0.5,
    max_new_tokens=3,
)


@pytest.fixture
def zoom(llava: Llava15) -> ZoomModel:
    return ZoomModel(llava, proposer="none", labels=LABELS)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[list[int]]], None]:
    """Makes the model's answers, in the order of the questions, what a test says."""

    def answer(said: Sequence[list[int]]) -> None:
        rest = list(said)

        def generate(backbone: Any, prefixes: Sequence[Any], *more: Any) -> list[list[int]]:
            return [rest.pop(0) for _ in prefixes]

        monkeypatch.setattr("sdrpn.distill.label.generate", generate)

    return answer


def questions(count: int) -> list[Question]:
    return [Question(QUESTIONS[i % 4], (make_image(90, 60, i),)) for i in range(count)]


def test_an_answer_is_kept_without_special_tokens_and_spaces(
    zoom: ZoomModel, answered: Callable[[Sequence[list[int]]], None]
) -> None:
    tokenizer = zoom.backbone.tokenizer
    words = tokenizer("red level", add_special_tokens=False)["input_ids"]
    answered([[tokenizer.bos_token_id, *words]])
    (found,) = label_batch(zoom, questions(1))
    assert found.response == "red level"
    assert found.grounding.any()


def test_an_empty_answer_has_no_map_between_others_that_have(
    zoom: ZoomModel, answered: Callable[[Sequence[list[int]]], None]
) -> None:
    (red,) = zoom.backbone.tokenizer("red", add_special_tokens=False)["input_ids"]
    answered([[red], [], [red]])
    first, none, last = label_batch(zoom, questions(3))
    assert (none.response, none.reason) == ("", "empty response")
    for array, dtype, value in (
        (none.grounding, np.float16, 0),
        (none.sink, np.float16, 0),
        (none.labels, np.int8, IGNORED),
    ):
        assert (array.dtype, array.shape) == (dtype, (8, 8))
        assert (array == value).all()
    assert none.grid == zoom.backbone.image_grid(make_image(90, 60, 1))
    for one in (first, last):
        assert one.response == "red"
        assert (one.grounding.dtype, one.sink.dtype) == (np.float16, np.float16)
        assert (one.grounding.shape, one.sink.shape, one.labels.shape) == ((8, 8),) * 3
        assert one.grounding.any()
        assert one.sink.any()
    assert not np.array_equal(first.grounding, last.grounding)
    assert first.grid == zoom.backbone.image_grid(make_image(90, 60, 0))


def test_nothing_said_at_all_makes_no_map(
    zoom: ZoomModel, answered: Callable[[Sequence[list[int]]], None]
) -> None:
    answered([[], []])
    assert [one.reason for one in label_batch(zoom, questions(2))] == ["empty response"] * 2


def test_questions_are_labelled_in_batches_in_their_order(
    zoom: ZoomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def batch(_: ZoomModel, asked: Sequence[Question]) -> list[str]:
        sizes.append(len(asked))
        return [question.text for question in asked]

    monkeypatch.setattr("sdrpn.distill.label.label_batch", batch)
    asked = questions(7)
    assert list(label(zoom, asked, batch_size=3)) == [question.text for question in asked]
    assert sizes == [3, 3, 1]
    sizes.clear()
    assert len(list(label(zoom, asked[:1] * 17))) == 17
    assert sizes == [16, 1]


@pytest.mark.parametrize(
    ("size", "extent", "shape", "shown"),
    [
        ((100, 50), (0, -25, 100, 75), (4, 4), (slice(1, 3), slice(None))),
        ((50, 100), (-25, 0, 75, 100), (4, 4), (slice(None), slice(1, 3))),
        ((100, 50), (0, 0, 100, 50), (4, 4), None),  # a grid of the picture alone
        ((100, 50), (0, 0.5, 100, 75), (4, 4), None),
        ((100, 50), (0, -25, 100, 75), (4, 5), None),
        ((), (0, -25, 100, 75), (4, 4), None),
        ((100, 50, 3), (0, -25, 100, 75), (4, 4), None),
        ((), (), (4, 4), None),
    ],
)
def test_padding_is_told_apart_where_a_square_grid_goes_beyond_the_picture(
    size: Any, extent: Any, shape: tuple[int, int], shown: Any
) -> None:
    found = padding_of(size, extent, shape, replace(LABELS, padding_background=True))
    if shown is None:
        assert found is None
    else:
        assert found is not None
        expected = np.ones(shape, bool)
        expected[shown] = False
        assert np.array_equal(found, expected)
    assert padding_of(size, extent, shape, LABELS) is None


@pytest.mark.parametrize(
    ("response", "length", "read"),
    [([5, 6, 7], 3, [5, 6]), ([5, 6], 3, [5, 6]), ([5, 6, 7], 2, [5, 6]), ([5], 1, [5])],
)
def test_the_last_token_of_an_answer_that_was_cut_is_not_read(
    response: list[int], length: int, read: list[int]
) -> None:
    config = replace(LABELS, max_new_tokens=length)
    assert _read(response, config) == response
    assert _read(response, replace(config, read_cut_end=False)) == read


def test_answers_have_what_is_left_of_the_context_and_a_token_to_see_their_end(
    zoom: ZoomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the context 9, 4, 3, 1, 0 and -1 tokens are left, and 4 are asked for."""
    limits: list[tuple[int, int]] = []

    def generate(
        backbone: Any, prefixes: Sequence[Any], suffixes: Sequence[Any], settings: dict[str, int]
    ) -> list[list[int]]:
        limits.append((settings["max_new_tokens"], len(suffixes)))
        return [[7] * settings["max_new_tokens"] for _ in prefixes]

    monkeypatch.setattr("sdrpn.distill.label.generate", generate)
    (prefix,) = zoom.prefill([make_image(90, 60, 0)])
    monkeypatch.setattr(zoom.backbone, "context_length", prefix.length + 14)
    token_ids = [tuple(range(3, 3 + 14 - left)) for left in (9, 4, 3, 1, 0, -1)]
    found = respond(zoom.backbone, [prefix] * 6, token_ids, 4)
    assert limits == [(2, 1), (4, 3)]
    # What goes on beyond the context is no answer.
    assert found == [[7] * 4, [7] * 4, None, None, None, None]


def test_images_without_a_kind_are_natural(
    llava: Llava15, answered: Callable[[Sequence[list[int]]], None]
) -> None:
    """Of text, maps would come from another head, and nothing would be a sink."""
    rules = replace(LABELS, text_grounding=(LayerHeads(2, (1,)),))
    zoom = ZoomModel(llava, proposer="none", labels=rules)
    (red,) = llava.tokenizer("red", add_special_tokens=False)["input_ids"]
    answered([[red]] * 3)
    ((given,), (natural,), (text,)) = (
        label_batch(zoom, questions(1), kinds) for kinds in (None, ["natural"], ["text"])
    )
    assert np.array_equal(given.grounding, natural.grounding)
    assert np.array_equal(given.sink, natural.sink)
    assert given.sink.any()
    assert not np.array_equal(given.grounding, text.grounding)


def test_labels_are_made_in_float32_from_maps_as_they_are_stored(
    zoom: ZoomModel,
    answered: Callable[[Sequence[list[int]]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (red,) = zoom.backbone.tokenizer("red", add_special_tokens=False)["input_ids"]
    answered([[red]])
    seen: list[np.ndarray] = []

    def label_cells(grounding: np.ndarray, sink: np.ndarray, *more: Any) -> tuple[Any, None]:
        seen.extend([grounding, sink])
        return np.zeros(grounding.shape, np.int8), None

    monkeypatch.setattr("sdrpn.distill.label.label_cells", label_cells)
    (found,) = label_batch(zoom, questions(1))
    assert [one.dtype for one in seen] == [np.float32, np.float32]
    assert np.array_equal(seen[0], found.grounding.astype(np.float32))
    assert np.array_equal(seen[1], found.sink.astype(np.float32))
