"""The first new token without a forward pass, against generate(), for every model family.

A logits processor that changes nothing makes generate() run the prompt's last token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.inference.first_token import is_greedy
from sdrpn.inference.generation import generation_arguments
from tests.helpers.families import NEW_TOKENS, Family

NO_REGION = ZoomConfig(threshold=1 - 1e-9)


@pytest.fixture(scope="module")
def firsts(family: Family, questions: list[Question]) -> list[tuple[int, int]]:
    """The first two tokens of each question's stock answer."""
    answers = [family.stock(q.images[0], q.text, max_new_tokens=2)[0] for q in questions]
    return [(ids[0], ids[-1]) for ids in answers]


def unchanged(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores


def engine(family: Family, **zoom: Any) -> ZoomModel:
    return ZoomModel(family.backbone, family.rpn, zoom=replace(family.zoom, **zoom))


def by_generate(engine: ZoomModel, asked: list[Question], settings: dict[str, Any]) -> list[Answer]:
    processor = {"logits_processor": LogitsProcessorList([unchanged])}
    return engine.ask_batch(asked, settings | processor)


def settings_of(family: Family, firsts: list[tuple[int, int]], name: str) -> dict[str, Any]:
    decode = family.backbone.tokenizer.decode
    # Tokens of bytes may decode to a character only together with others.
    pairs = [pair for pair in firsts if decode(pair) == decode(pair[:1]) + decode(pair[1:])]
    pairs = [pair for pair in pairs if "\ufffd" not in decode(pair)] or firsts
    common, second = max(set(pairs), key=pairs.count)
    word, two = decode([common]).strip(), decode([common, second]).strip()
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "one token": {"max_new_tokens": 1},
        "stop at the first": {"stop": [word]},
        "stop over two tokens": {"stop": [two]},
        "end at the first": {"eos_token_id": common},
        "two ends, not before 3 tokens": {
            "eos_token_id": [common, family.backbone.eos_token_id],
            "min_new_tokens": 3,
        },
        "repetition penalty": {"repetition_penalty": 1.7},
    }
    return {"max_new_tokens": NEW_TOKENS} | settings[name]


NAMES = (
    *("plain", "one token", "stop at the first", "stop over two tokens", "end at the first"),
    *("two ends, not before 3 tokens", "repetition penalty"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "zoom", [{}, {"threshold": 1 - 1e-9}, {"keep_tokens": 5}, {"gate": 0.5}], ids=str
)
def test_answers_are_those_of_generate(
    family: Family,
    questions: list[Question],
    firsts: list[tuple[int, int]],
    zoom: dict[str, Any],
    name: str,
) -> None:
    settings = settings_of(family, firsts, name)
    model = engine(family, **zoom)
    assert is_greedy(family.backbone, generation_arguments(family.backbone, settings))
    found = model.ask_batch(questions, settings)
    expected = by_generate(model, questions, settings)
    for own, other in zip(found, expected, strict=True):
        assert (own.text, own.new_tokens) == (other.text, other.new_tokens)
        assert own.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_settings_of_the_cases_matter(
    family: Family, questions: list[Question], firsts: list[tuple[int, int]]
) -> None:
    def texts(name: str) -> list[tuple[str, int]]:
        answers = engine(family, threshold=1 - 1e-9).ask_batch(
            questions, settings_of(family, firsts, name)
        )
        return [(a.text, a.new_tokens) for a in answers]

    plain = texts("plain")
    assert [name for name in NAMES if texts(name) == plain] == ["plain"]
    assert 0 in [new for _, new in texts("end at the first")]
    assert min(new for _, new in texts("two ends, not before 3 tokens")) >= 3


def test_stock_answers_without_a_region(family: Family, questions: list[Question]) -> None:
    """Not only as our own slower way: as transformers answers the whole prompt."""
    asked = [replace(question, zoom=NO_REGION) for question in questions]
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    for question, answer in zip(asked, engine(family).ask_batch(asked, settings), strict=True):
        ids, _ = family.stock(question.images[0], question.text, min_new_tokens=NEW_TOKENS)
        assert (
            answer.text == family.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()
        )


@pytest.mark.parametrize("new", [1, 4])
def test_a_pass_is_saved(family: Family, questions: list[Question], new: int) -> None:
    """Without a region, the question passes the first layer once, then each token but the last."""
    model, question = engine(family), replace(questions[0], zoom=NO_REGION)
    model.prefill(question.images)
    (_, layer), tokens = family.backbone.layers[0], []
    hook = layer.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    model.ask_batch([question], {"max_new_tokens": new, "min_new_tokens": new})
    hook.remove()
    length = len(family.backbone.prompt_ids(question.text).after)
    assert tokens == [length] + [1] * (new - 1)


class Ignored:
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 2},
        {"suppress_tokens": [5]},
        {"begin_suppress_tokens": [5]},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5]]},
        {"max_time": 9.0},
        {"guidance_scale": 1.5},
        {"streamer": Ignored()},
        {"logits_processor": LogitsProcessorList([unchanged])},
        {"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [5]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_strategies_are_left_to_generate(family: Family, settings: dict[str, Any]) -> None:
    assert not is_greedy(family.backbone, generation_arguments(family.backbone, settings))


def test_settings_of_the_checkpoint_count(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's generation config holds unless an argument overrides it."""
    plain = generation_arguments(family.backbone, {})
    assert is_greedy(family.backbone, plain)
    monkeypatch.setattr(family.backbone.model.generation_config, "suppress_tokens", [5])
    assert not is_greedy(family.backbone, plain)
