"""generate()'s arguments: what works behind a filled KV cache is exact, all else is refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import PixelBox
from sdrpn.engine import Question, ZoomModel
from sdrpn.inference import generation_arguments as core
from sdrpn.inference.generation import generation_arguments
from sdrpn.inference.generation_arguments import SUPPORTED, check_generation
from sdrpn_eval import generation as plugin
from sdrpn_eval.generation import translate
from tests.conftest import QUESTIONS
from tests.helpers import by_hand
from tests.helpers.asking_by_hand import ask, logged, model, rows
from tests.helpers.fake_engine import FakeEngine

NEW_TOKENS = 6
BOX = PixelBox(0, 0, 60, 40)


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    """Warnings come once a process; each test begins anew."""
    core.warn_once.cache_clear()
    plugin._warn.cache_clear()


@pytest.fixture(scope="module")
def stock_engine(llava: Llava15) -> ZoomModel:
    return ZoomModel(llava, proposer="none")


class Forbidding:
    """Allows nothing but one token, until it has been said twice."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, 40] = 0
        return forced


WORKING: dict[str, Any] = {
    "bad_words_ids": [[30], [41], [52, 53], [17]],
    "begin_suppress_tokens": list(range(3, 90)),
    "early_stopping": True,
    "eos_token_id": [2, 40, 41, 42, 43, 44, 45, 46],
    "exponential_decay_length_penalty": (1, 9.0),
    "forced_eos_token_id": 2,
    "guidance_scale": 1.7,
    "length_penalty": -3.0,
    "logits_processor": LogitsProcessorList([Forbidding()]),
    "max_time": 600.0,
    "min_new_tokens": 6,
    "no_repeat_ngram_size": 1,
    "prefix_allowed_tokens_fn": lambda row, ids: [40, 41, 2],
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.9,
    "sequence_bias": [[[40], 20.0], [[41, 40], 5.0]],
    "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(0.0)]),
    "suppress_tokens": list(range(3, 60)),
    "watermarking_config": {"bias": 30.0, "seeding_scheme": "lefthash"},
}
"""One value of each argument that greedy and beam search read beside `num_beams`."""
READ_BY_BEAMS = {"early_stopping", "length_penalty"}


def by_transformers(llava: Llava15, question: Question, crop: Any, **generation: Any) -> str:
    """A whole prompt, embedded by hand and given to generate() with no cache before it."""
    (image,) = question.images
    embeds, where = by_hand.sequence(llava, image, question.text, crop)
    words = llava.tokenizer(by_hand.prompt(llava, question.text))["input_ids"]
    spread = len(embeds) - len(words) + 1
    ids = [*words[:where], *[words[where]] * spread, *words[where + 1 :]]
    output = llava.model.generate(
        input_ids=torch.tensor([ids]),
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        **generation,
    )
    new = output[0, len(ids) :].tolist()
    ends = generation.get("eos_token_id", [llava.eos_token_id])
    end = next((i for i, token in enumerate(new) if token in ends), len(new))
    return llava.tokenizer.decode(new[:end], skip_special_tokens=True).strip()


def test_every_supported_argument_is_tested() -> None:
    elsewhere = {"do_sample", "max_new_tokens", "num_beams", "pad_token_id", "stop", "streamer"}
    assert set(WORKING) | elsewhere | set(core.SAMPLING) == SUPPORTED


@pytest.mark.parametrize(
    "zoomed",
    [pytest.param(False, id="stock"), pytest.param(True, id="zoomed", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", WORKING)
def test_supported_arguments_do_what_generate_does_without_a_cache(
    stock_engine: ZoomModel, images: list[Image.Image], name: str, zoomed: bool
) -> None:
    """The same words as over the whole prompt, in a batch of questions of different lengths."""
    llava = stock_engine.backbone
    more: dict[str, Any] = {name: WORKING[name]}
    if name in READ_BY_BEAMS:
        more["num_beams"] = 3
    asked = [
        Question(
            text, (image,), BOX if zoomed and image.width >= 60 and image.height >= 40 else None
        )
        for image in images[:3]
        for text in QUESTIONS
    ]
    expected = []
    for question in asked:
        crop = by_hand.crop_of(llava, question.images[0], BOX) if question.box else None
        expected.append(by_transformers(llava, question, crop, **more))
    settings = {"max_new_tokens": NEW_TOKENS, **more}
    alone = [stock_engine.ask_batch([question], settings)[0].text for question in asked]
    assert alone == expected
    if name not in core.ONE_QUESTION:
        together = [answer.text for answer in stock_engine.ask_batch(asked, settings)]
        assert together == expected


CHANGE_NOTHING_HERE = {
    "early_stopping",
    "max_time",
    "remove_invalid_values",
    "renormalize_logits",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(WORKING) - CHANGE_NOTHING_HERE))
def test_the_values_above_change_answers(
    stock_engine: ZoomModel, images: list[Image.Image], name: str
) -> None:
    """Else the comparison would prove nothing."""
    more: dict[str, Any] = {"max_new_tokens": NEW_TOKENS}
    if name in READ_BY_BEAMS:
        more["num_beams"] = 3
    asked = [Question(text, (image,)) for image in images[:3] for text in QUESTIONS]

    def texts(**generation: Any) -> list[tuple[str, int]]:
        found = [stock_engine.ask_batch([one], {**more, **generation})[0] for one in asked]
        return [(answer.text, answer.new_tokens) for answer in found]

    assert texts(**{name: WORKING[name]}) != texts()


REFUSED: list[tuple[str, Any, str]] = [
    ("prompt_lookup_num_tokens", 3, "prompt_lookup_num_tokens=3 is not supported: assisted"),
    ("assistant_model", object(), "assistant_model is not supported: assisted decoding"),
    ("assistant_early_exit", 2, "assistant_early_exit=2 is not supported: assisted decoding"),
    ("num_assistant_tokens", 5, "num_assistant_tokens=5 is not supported"),
    ("max_matching_ngram_size", 2, "max_matching_ngram_size=2 is not supported"),
    ("use_mtp", True, "use_mtp=True is not supported"),
    ("return_dict_in_generate", True, "return_dict_in_generate=True .*: an answer is text"),
    ("output_scores", True, "output_scores=True is not supported: an answer is text"),
    ("output_logits", True, "output_logits=True is not supported: an answer is text"),
    ("output_attentions", True, "output_attentions=True is not supported"),
    ("output_hidden_states", True, "output_hidden_states=True is not supported"),
    ("use_cache", False, "use_cache=False is not supported: the KV cache is filled"),
    ("cache_implementation", "static", "cache_implementation=static is not supported"),
    ("cache_implementation", "paged", "cache_implementation=paged is not supported"),
    ("cache_config", {"backend": "quanto"}, "cache_config is not supported: the KV cache"),
    ("prefill_chunk_size", 8, "prefill_chunk_size=8 is not supported"),
    ("past_key_values", object(), "past_key_values is not supported: the KV cache"),
    ("penalty_alpha", 0.6, "penalty_alpha=0.6 is not supported: only greedy search"),
    ("dola_layers", "high", "dola_layers=high is not supported: only greedy search"),
    ("num_beam_groups", 2, "num_beam_groups=2 is not supported: only greedy search"),
    ("diversity_penalty", 0.5, "diversity_penalty=0.5 is not supported"),
    ("force_words_ids", [[5]], "force_words_ids is not supported: only greedy search"),
    ("constraints", [object()], "constraints is not supported: only greedy search"),
    (
        "custom_generate",
        "someone/loop",
        "custom_generate=someone/loop is not supported: remote code",
    ),
    ("generation_config", GenerationConfig(), "generation_config is not .*: pass its fields"),
    ("max_length", 100, "max_length=100 is not supported: .* use max_new_tokens"),
    ("min_length", 3, "min_length=3 is not supported: .* use min_new_tokens"),
    ("stop_strings", ["\n"], "stop_strings is not supported: use stop, a list of strings"),
    ("num_return_sequences", 2, "num_return_sequences must be 1: .* one answer, got 2"),
    ("num_return_sequences", 0, "num_return_sequences must be 1: .* one answer, got 0"),
    ("encoder_repetition_penalty", 2.0, "encoder_repetition_penalty=2.0 is not supported"),
    ("encoder_no_repeat_ngram_size", 2, "encoder_no_repeat_ngram_size=2 is not supported"),
    ("forced_bos_token_id", 0, "forced_bos_token_id=0 is not supported"),
    ("token_healing", True, "token_healing=True is not supported: the prompt's tokens"),
    ("negative_prompt_ids", torch.zeros(1, 1), "negative_prompt_ids is not supported: it is made"),
    ("inputs", torch.zeros(1, 1), "inputs is not supported: it is made from the question"),
    ("input_ids", torch.zeros(1, 1), "input_ids is not supported: it is made from the question"),
    ("pixel_values", torch.zeros(1), "pixel_values is not supported: it is made"),
    ("attention_mask", torch.zeros(1), "attention_mask is not supported: it is made"),
    ("tokenizer", object(), "tokenizer is not supported"),
    ("synced_gpus", True, "synced_gpus=True is not supported"),
    ("tempreature", 0.5, "unknown generation argument tempreature; did you mean temperature"),
    ("until", ["\n"], "unknown generation argument until; "),
    ("frobnicate", 0, "unknown generation argument frobnicate; known: bad_words_ids, "),
    ("max_new_tokens", 0, "max_new_tokens must be a positive integer, got 0"),
    ("max_new_tokens", 2.5, "max_new_tokens must be a positive integer, got 2.5"),
    ("num_beams", 0, "num_beams must be a positive integer, got 0"),
    ("stop", [""], r"stop must be a list of non-empty strings, got \[''\]"),
    ("stop", "", "stop must be a list of non-empty strings, got ''"),
    ("stop", [3], r"stop must be a list of non-empty strings, got \[3\]"),
    ("logits_processor", "mine", "logits_processor must be an object .*, got 'mine'"),
]


class Untouched:
    """A vision tower, a language model: whatever runs after the check, and must not."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read before the arguments were checked")


@pytest.mark.parametrize("count", [0, 1, 2], ids=["no image", "one", "several"])
@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name_before_the_model_runs(
    stock_engine: ZoomModel,
    images: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: Any,
    message: str,
    count: int,
) -> None:
    """On the zoomed path and on the plain one alike."""
    monkeypatch.setattr(stock_engine.backbone, "model", Untouched())
    with pytest.raises(ValueError, match=message):
        stock_engine.ask_batch([Question("yellow", tuple(images[:count]))], {name: value})


@pytest.mark.parametrize("name", sorted(set(GenerationConfig().to_dict()) - SUPPORTED))
def test_no_other_field_of_a_generation_config_passes(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        check_generation({name: 7})


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"dola_layers=low .*; unknown .* beams; .*num_beams must"):
        check_generation({"dola_layers": "low", "beams": 2, "num_beams": -1, "top_p": 0.5})


def test_values_that_ask_for_nothing_pass(llava: Llava15) -> None:
    """What configurations write out though it is the default."""
    asked = {
        "use_cache": True,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "output_scores": False,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "encoder_repetition_penalty": 1.0,
        "min_length": 0,
        "prompt_lookup_num_tokens": None,
        "num_beams": None,
        "temperature": None,
    }
    assert check_generation(asked) == {}
    assert generation_arguments(llava, asked)["num_beams"] == 1


def test_a_streamer_takes_one_question(
    stock_engine: ZoomModel, images: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = stock_engine.backbone.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = stock_engine.ask(images[0], QUESTIONS[0], streamer=streamer, max_new_tokens=4)
    assert answer.text
    assert answer.text in capsys.readouterr().out
    two = [Question("yellow", (images[0],))] * 2
    for name, value in (("streamer", streamer), ("prefix_allowed_tokens_fn", lambda i, t: [2])):
        with pytest.raises(ValueError, match=f"{name} needs one question at a time, got 2"):
            stock_engine.ask_batch(two, {name: value})
    with pytest.raises(ValueError, match="streamer needs num_beams=1, got 2"):
        stock_engine.ask(images[0], "yellow", streamer=streamer, num_beams=2)


def test_one_stop_string_is_not_its_letters(
    stock_engine: ZoomModel, images: list[Image.Image]
) -> None:
    whole = stock_engine.ask(images[0], QUESTIONS[0], max_new_tokens=NEW_TOKENS).text
    stop = whole.split()[2]
    found = stock_engine.ask(images[0], QUESTIONS[0], max_new_tokens=NEW_TOKENS, stop=stop)
    assert found.text == whole.split(stop)[0].strip()


def test_a_checkpoints_own_settings_cannot_break_generation(
    stock_engine: ZoomModel, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tunes are saved with such a generation_config.json."""
    asked = [Question(QUESTIONS[0], (images[0],)), Question(QUESTIONS[1], tuple(images[:2]))]
    expected = [a.text for a in stock_engine.ask_batch(asked, {"max_new_tokens": NEW_TOKENS})]
    own = {
        "use_cache": False,
        "return_dict_in_generate": True,
        "output_attentions": True,
        "prompt_lookup_num_tokens": 3,
        "cache_implementation": "static",
        "max_length": 9,
        "min_length": 2000,
    }
    for name, value in own.items():
        monkeypatch.setattr(stock_engine.backbone.model.generation_config, name, value)
    found = [a.text for a in stock_engine.ask_batch(asked, {"max_new_tokens": NEW_TOKENS})]
    assert found == expected


def test_every_end_token_of_a_checkpoint_ends_an_answer(
    stock_engine: ZoomModel, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    llava = stock_engine.backbone
    question = Question(QUESTIONS[0], (images[0],))
    whole = stock_engine.ask_batch([question], {"max_new_tokens": NEW_TOKENS})[0]
    first, second, *_ = whole.text.split()
    end = llava.tokenizer.convert_tokens_to_ids(second)
    monkeypatch.setattr(llava.model.generation_config, "eos_token_id", [2, end])
    together = [question, Question(QUESTIONS[2], (images[1],))]
    found = stock_engine.ask_batch(together, {"max_new_tokens": NEW_TOKENS})[0]
    assert found.text == first
    assert found.new_tokens < whole.new_tokens
    alone = stock_engine.ask_batch([question], {"max_new_tokens": NEW_TOKENS})[0]
    assert found.new_tokens == alone.new_tokens


# --- sampling settings without sampling ----------------------------------------------------------

IDLE: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 5}, "temperature=5 has no effect without do_sample=True"),
    ({"do_sample": False, "temperature": 1}, "temperature=1 has no effect without do_sample"),
    ({"top_p": 0.5}, "top_p=0.5 has no effect without do_sample=True"),
    ({"top_k": 3, "min_p": 0.1}, "top_k=3, min_p=0.1 has no effect without do_sample=True"),
    ({"temperature": 0, "top_p": 0.7}, "top_p=0.7 has no effect without do_sample=True"),
    ({"do_sample": True, "temperature": 0}, "do_sample=True has no effect with temperature=0"),
]
SILENT: Sequence[dict[str, Any]] = [
    {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
    {"temperature": 0.0, "top_p": 0, "top_k": 1, "do_sample": False},
    {"temperature": None, "top_p": None, "num_beams": None},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {},
]


@pytest.mark.parametrize(("settings", "message"), IDLE)
def test_sampling_settings_without_effect_are_said_once(
    llava: Llava15, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], message: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="sdrpn"):
        found = [generation_arguments(llava, settings) for _ in range(2)]
    assert [record.getMessage().startswith(message) for record in caplog.records] == [True]
    for arguments in found:
        assert arguments["do_sample"] is False
        assert [arguments[name] for name in ("temperature", "top_p", "top_k")] == [None] * 3


@pytest.mark.parametrize("settings", SILENT)
def test_greedy_settings_as_tasks_ship_them_are_silent(
    llava: Llava15, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING), logged() as log:
        generation_arguments(llava, settings)
        translate(settings | {"until": ["\n\n"], "max_new_tokens": 16})
    assert [record.getMessage() for record in caplog.records] == []
    assert log == []


def test_gen_kwargs_of_a_greedy_task_are_said_to_have_no_effect() -> None:
    """`--gen_kwargs temperature=5` over a task's own `do_sample: false`."""
    shipped = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "do_sample": False}
    with logged() as log:
        found = [translate(shipped | {"temperature": 5}) for _ in range(3)]
    assert log == [
        "temperature=5 has no effect without do_sample=True: answers are greedy; add "
        "do_sample=True to sample"
    ]
    assert found[0] == {"max_new_tokens": 16, "do_sample": False, "stop": []}
    with logged() as log:
        sampled = translate(shipped | {"temperature": 5, "do_sample": True})
        alone = translate({"temperature": 0.7})
    assert (sampled["do_sample"], sampled["temperature"]) == (True, 5)
    assert (alone["do_sample"], alone["temperature"]) == (True, 0.7)
    assert log == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 is not supported"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True is not supported"),
        ({"custom_generate": "someone/loop"}, "custom_generate=someone/loop is not supported"),
        ({"num_beams": 0}, "num_beams must be a positive integer, got 0"),
    ],
)
def test_gen_kwargs_that_cannot_be_used_end_the_run_before_a_document_is_asked(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Also under `on_error=empty`: it is no document that is at fault."""
    engine = FakeEngine()
    lm = model(engine, rows(2), on_error="empty", record=tmp_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        lm.generate_until([ask("mytask", i, f"q{i}", asked) for i in range(2)])
    assert engine.batches == []


def test_gen_kwargs_that_generate_does_not_know_are_left_out_once() -> None:
    with logged() as log:
        found = [translate({"image_aspect_ratio": "pad", "stop": ["x"], "until": "\n"})] * 2
    assert found[0] == {"max_new_tokens": 1024, "do_sample": False, "stop": ["\n"]}
    assert log == ["generation kwargs that transformers does not know: image_aspect_ratio, stop"]
