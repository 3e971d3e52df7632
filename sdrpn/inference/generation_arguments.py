"""Arguments of transformers' generate(): those supported over a filled KV cache.

The image is prefilled before generate() starts, so only decoding loops that accept a filled cache
are exact: greedy search, sampling and beam search, with any logits processor.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from transformers import GenerationConfig

logger = logging.getLogger(__name__)

SAMPLING: Mapping[str, tuple[float, ...]] = {
    "temperature": (0,),
    "top_p": (0, 1),
    "top_k": (0, 1),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""Arguments that only affect sampling, each with the values that have no effect."""

SUPPORTED = frozenset(
    {
        *SAMPLING,
        "bad_words_ids",
        "begin_suppress_tokens",
        "do_sample",
        "early_stopping",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "forced_eos_token_id",
        "guidance_scale",
        "length_penalty",
        "logits_processor",
        "max_new_tokens",
        "max_time",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "pad_token_id",
        "prefix_allowed_tokens_fn",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "stop",
        "stopping_criteria",
        "streamer",
        "suppress_tokens",
        "watermarking_config",
    }
)

ONE_QUESTION = ("prefix_allowed_tokens_fn", "streamer")
"""Arguments that refer to rows of generate()'s batch, which may differ from the questions'."""

_OBJECTS = ("logits_processor", "stopping_criteria", *ONE_QUESTION)

_INPUT = "it is made from the question and its images"
_CACHE = "the KV cache is filled before generate() starts"
_ASSISTED = "assisted decoding does not support a filled KV cache"
_OTHER_LOOP = "only greedy search, sampling and beam search support a filled KV cache"
_OUTPUT = "an answer is text; read scores with a logits_processor"
_ENCODER = "it has no effect with a filled KV cache"

REFUSED: Mapping[str, str] = {
    "max_length": "it includes the prompt; use max_new_tokens",
    "min_length": "it includes the prompt; use min_new_tokens",
    "stop_strings": "use stop, a list of strings (until in lmms-eval)",
    "num_return_sequences": "a question has one answer",
    "generation_config": "pass its fields as arguments",
    "custom_generate": "remote code is never run",
    "trust_remote_code": "remote code is never run",
    "synced_gpus": "processes generate independently",
    "token_healing": "the prompt's tokens are fixed",
    **dict.fromkeys(
        (
            *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"),
            *("pixel_values", "image_sizes", "token_type_ids", "labels", "logits_to_keep"),
            *("vision_feature_layer", "vision_feature_select_strategy", "tokenizer"),
            *("negative_prompt_ids", "negative_prompt_attention_mask"),
        ),
        _INPUT,
    ),
    **dict.fromkeys(
        (
            *("use_cache", "cache", "past_key_values", "cache_position", "cache_implementation"),
            *("cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
            *("compile_config", "disable_compile", "continuous_batching_config"),
        ),
        _CACHE,
    ),
    **dict.fromkeys(
        (
            *("assistant_model", "assistant_tokenizer", "is_assistant", "num_assistant_tokens"),
            *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
            *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
            *("assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
            *("speculation_type", "use_mtp"),
        ),
        _ASSISTED,
    ),
    **dict.fromkeys(
        (
            *("penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty"),
            *("constraints", "force_words_ids"),
        ),
        _OTHER_LOOP,
    ),
    **dict.fromkeys(
        (
            *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
            "output_hidden_states",
        ),
        _OUTPUT,
    ),
    **dict.fromkeys(
        (
            *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
            *("decoder_start_token_id", "forced_bos_token_id", "bos_token_id"),
        ),
        _ENCODER,
    ),
}
"""Arguments of generate() that would be ignored, fail or change answers, with reason or remedy."""

_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "bos_token_id": (),
    "decoder_start_token_id": (),
    "disable_compile": (True, False),
    "encoder_repetition_penalty": (1,),
    "forced_bos_token_id": (),
    "max_length": (),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
}
"""Values of refused arguments that have no effect, besides None; others default to False and 0."""

_NEUTRAL: Mapping[str, Any] = {"use_cache": True, "num_return_sequences": 1, "min_length": 0}
"""Values that disable refused arguments, if not None."""


def check_generation(generation: Mapping[str, Any], questions: int = 1) -> dict[str, Any]:
    """Check the settings of a request and drop those without effect.

    Args:
        generation: Arguments of generate(), and `stop`, a string or strings that end an answer.
        questions: Number of questions in the request.

    Returns:
        A new mapping; `stop` is a list of strings.

    Raises:
        ValueError: If arguments are unknown, refused or invalid; names them all.
    """
    given = {name: value for name, value in generation.items() if not _no_effect(name, value)}
    problems = [_refusal(name, value) for name, value in given.items() if name not in SUPPORTED]
    problems += _invalid_values(given, questions)
    if problems:
        raise ValueError("; ".join(problems))
    if "stop" in given:
        given["stop"] = _stop_strings(given["stop"])
    return given


def _invalid_values(given: Mapping[str, Any], questions: int) -> list[str]:
    problems = []
    if questions != 1:
        problems += [
            f"{name} needs one question at a time, got {questions}"
            for name in ONE_QUESTION
            if name in given
        ]
    problems += [
        f"{name} must be an object as in generate(), got {given[name]!r}"
        for name in _OBJECTS
        if isinstance(given.get(name), bool | int | float | str)
    ]
    if "streamer" in given and given.get("num_beams", 1) != 1:
        problems.append(f"streamer needs num_beams=1, got {given['num_beams']}")
    problems += [
        f"{name} must be a positive integer, got {given[name]!r}"
        for name in ("max_new_tokens", "num_beams")
        if name in given and not (_is_integer(given[name]) and given[name] >= 1)
    ]
    return problems


def is_known(name: str) -> bool:
    """Return whether `name` is an argument of generate(), supported or not."""
    return name in SUPPORTED or name in REFUSED or name in _config_names()


def greedy_note(generation: Mapping[str, Any]) -> str | None:
    """Describe sampling settings that have no effect with greedy search.

    Args:
        generation: Settings as requested; temperature 0 is greedy search even with `do_sample`.

    Returns:
        A message for the user; None if there are no such settings.
    """
    temperature = generation.get("temperature")
    if generation.get("do_sample") and temperature != 0:
        return None
    unused = [
        f"{name}={generation[name]}"
        for name, greedy in SAMPLING.items()
        if generation.get(name) is not None and generation[name] not in greedy
    ]
    if generation.get("do_sample"):
        unused = ["do_sample=True", *unused]
        return (
            f"{', '.join(unused)} has no effect with temperature=0: answers are greedy; set a "
            "temperature above 0 to sample"
        )
    if not unused:
        return None
    return (
        f"{', '.join(unused)} has no effect without do_sample=True: answers are greedy; add "
        "do_sample=True to sample"
    )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once per message."""
    logger.warning(message)


def neutral_arguments() -> dict[str, Any]:
    """Return arguments that override refused ones in a checkpoint's generation_config.json."""
    return {name: _NEUTRAL.get(name) for name in REFUSED if name in _config_names()}


def _no_effect(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in SUPPORTED or not isinstance(value, bool | int | float | str):
        return False
    return is_known(name) and value in _NO_EFFECT.get(name, (False,))


def _refusal(name: str, value: Any) -> str:
    if name == "num_return_sequences":
        return f"num_return_sequences must be 1: {REFUSED[name]}, got {value}"
    shown = f"{name}={value}" if isinstance(value, bool | int | float | str) else name
    if name in REFUSED:
        return f"{shown} is not supported: {REFUSED[name]}"
    if is_known(name):
        return f"{shown} is not supported: it may not be exact over a filled KV cache"
    near = difflib.get_close_matches(name, SUPPORTED, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(SUPPORTED))}"
    return f"unknown generation argument {name}; {hint}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _stop_strings(stop: Any) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop must be a list of non-empty strings, got {stop!r}")
    return list(strings)


@functools.cache
def _config_names() -> frozenset[str]:
    own = ("transformers_version", "_from_model_config")
    return frozenset(GenerationConfig().to_dict()) - frozenset(own)
