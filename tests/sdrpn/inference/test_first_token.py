"""The first new token without a forward pass, against generate(), for every model family.

A logits processor that changes nothing makes generate() run the prompt's last token.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from sdrpn.backbones.llava15 import Llava15
from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.inference.first_token import after_first, first_tokens, is_greedy
from sdrpn.inference.generation import generation_arguments
from sdrpn.inference.prefix import Context
from sdrpn.inference.stopping import StopAtStrings, end_tokens
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
        {"max_time": 0.0},
        {"forced_eos_token_id": 0},
        {"suppress_tokens": torch.tensor([1, 2])},
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


def test_a_checkpoint_s_shortest_answer_is_not_a_token_longer(
    family: Family, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = family.backbone.model.generation_config
    monkeypatch.setattr(defaults, "min_new_tokens", 3)
    model, settings = engine(family, threshold=1 - 1e-9), {"max_new_tokens": NEW_TOKENS}
    ends = sorted({ids for q in questions for ids in family.stock(q.images[0], q.text)[0]})
    monkeypatch.setattr(defaults, "eos_token_id", ends)  # almost all that it says is an end
    found = model.ask_batch(questions, settings)
    assert min(answer.new_tokens for answer in found) == 3
    expected = by_generate(model, questions, settings)
    assert [a.text for a in found] == [a.text for a in expected]


# --- by hand, without a model -----------------------------------------------------------------


class Letters:
    """A tokenizer of the letters a, b, c, ...; token 0 is special."""

    def batch_decode(self, ids: torch.Tensor, *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(96 + one) for one in row if one) for row in ids.tolist()]


class Logits(Llava15):
    """A backbone whose last states are its logits."""

    def __init__(self, **defaults: Any) -> None:
        self.model = SimpleNamespace(generation_config=GenerationConfig(**defaults))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return states.half()


def context(ids: list[int], logits: list[float]) -> Context:
    return Context(tuple(ids), (), torch.tensor(logits))


def test_rows_stop_at_strings_of_what_is_new() -> None:
    """The prompt is all that was there at the first call, but its last token and `known` more."""
    stop = StopAtStrings(Letters(), ["bc", "e"])
    assert stop(torch.tensor([[2, 3, 2], [5, 5, 5]]), None).tolist() == [False, True]
    ids = torch.tensor([[2, 3, 2, 0, 3], [5, 5, 1, 2, 4]])
    found = stop(ids, None)
    assert found.tolist() == [True, False]
    assert found.dtype == torch.bool
    later = StopAtStrings(Letters(), ["bc"], known=1)
    assert later(torch.tensor([[1, 2, 3], [2, 3, 1]]), None).tolist() == [True, False]


def test_the_rest_of_an_answer_has_a_token_less() -> None:
    tokenizer = Letters()
    first = {
        "max_new_tokens": 5,
        "min_new_tokens": 3,
        "stopping_criteria": [StopAtStrings(tokenizer, ["b"])],
        "repetition_penalty": 1.5,
    }
    rest = after_first(Logits(), first)
    (criterion,) = rest.pop("stopping_criteria")
    assert rest == {"max_new_tokens": 4, "min_new_tokens": 2, "repetition_penalty": 1.5}
    assert (criterion.tokenizer, criterion.strings, criterion.known) == (tokenizer, ["b"], 1)
    assert first["max_new_tokens"] == 5
    nothing = {"max_new_tokens": 1, "min_new_tokens": 0, "stopping_criteria": []}
    assert after_first(Logits(), nothing) == nothing | {"max_new_tokens": 0}
    assert after_first(Logits(), {"max_new_tokens": 2}) == {"max_new_tokens": 1}


@pytest.mark.parametrize(
    ("ids", "expected"), [(None, []), (0, [0]), (7, [7]), ([7, 9], [7, 9]), ((7, 9), [7, 9])]
)
def test_end_tokens_are_a_list(ids: Any, expected: list[int]) -> None:
    assert end_tokens(ids) == expected


def test_the_first_token_is_the_largest_with_its_probability() -> None:
    """Logits of 0, ln 3 and ln 4 give 1/8, 3/8 and 4/8."""
    rows = [context([0], [0.0, 1.0986, 1.3863]), context([0], [1.3863, 0.0, 1.0986])]
    backbone = Logits()
    assert first_tokens(backbone, rows, {}) == [
        (2, pytest.approx(0.5, abs=1e-3)),
        (0, pytest.approx(0.5, abs=1e-3)),
    ]


def test_a_penalty_moves_the_choice_but_not_the_probability() -> None:
    """A penalty of 2 halves positive logits of tokens in the prompt, and doubles negative ones."""
    backbone = Logits(repetition_penalty=2.0)
    rows = [context([2, 2], [0.0, 1.0986, 1.3863]), context([0, 1], [0.0, 1.0986, 1.3863])]
    found = first_tokens(backbone, rows, {})
    assert [token for token, _ in found] == [1, 2]
    assert [p for _, p in found] == [pytest.approx(3 / 8, abs=1e-3), pytest.approx(0.5, abs=1e-3)]
    # Arguments override the checkpoint's configuration, which they leave as it is.
    overridden = first_tokens(backbone, rows, {"repetition_penalty": 1.0})
    assert [token for token, _ in overridden] == [2, 2]
    assert backbone.model.generation_config.repetition_penalty == 2.0
    below = Logits(repetition_penalty=0.5)
    assert [token for token, _ in first_tokens(below, [context([1], [0.0, 1.0, 1.5])], {})] == [1]


def test_an_answer_of_several_tokens_does_not_begin_with_its_end() -> None:
    backbone = Logits(eos_token_id=[2, 1])
    rows = [context([0], [0.0, 1.0986, 1.3863])]
    assert first_tokens(backbone, rows, {"min_new_tokens": 1}) == [
        (0, pytest.approx(1 / 8, abs=1e-3))
    ]
    one = {"min_new_tokens": 1, "eos_token_id": 2}
    assert first_tokens(backbone, rows, one) == [(1, pytest.approx(3 / 8, abs=1e-3))]
    assert [token for token, _ in first_tokens(backbone, rows, {"min_new_tokens": 0})] == [2]


@pytest.mark.parametrize(
    ("arguments", "greedy"),
    [
        ({}, True),
        ({"max_new_tokens": 5, "min_new_tokens": 2, "repetition_penalty": 1.5}, True),
        ({"num_beams": 1}, True),
        ({"num_beams": None}, True),
        ({"num_beams": 2}, False),
        ({"do_sample": False, "temperature": 0.5}, True),
        ({"use_cache": True, "num_return_sequences": 1, "min_length": 0}, True),
        ({"no_repeat_ngram_size": 2}, False),
        ({"stopping_criteria": None}, True),
        ({"stopping_criteria": []}, True),
        ({"stopping_criteria": [StopAtStrings(Letters(), ["a"])]}, True),
        ({"stopping_criteria": [StopAtStrings(Letters(), ["a"]), print]}, False),
        ({"logits_processor": []}, False),
        ({"streamer": None}, True),
        ({"streamer": print}, False),
    ],
)
def test_greedy_search_is_recognised(arguments: dict[str, Any], greedy: bool) -> None:
    backbone = Logits()
    assert is_greedy(backbone, arguments) is greedy
