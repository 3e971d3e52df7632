"""Converts lmms-eval's generation arguments to those of `ZoomModel.ask_batch`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from loguru import logger

from sdrpn.inference.generation_arguments import SAMPLING, check_generation, greedy_note, is_known

MAX_NEW_TOKENS = 1024
"""Default of a task without its own; as in llava_hf."""


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Converts lmms-eval's generation arguments to those of transformers' `generate()`, and `stop`.

    `until` becomes `stop`. A temperature of 0 or None means greedy decoding, as in llava_hf, which
    drops the arguments of sampling, with one warning if they differ from their defaults. Arguments
    that `generate()` does not have are dropped, with one warning.

    Raises:
        ValueError: For unsupported values, see `check_generation`.
    """
    known = {
        name: value
        for name, value in kwargs.items()
        if value is not None and name not in ("until", "stop") and is_known(name)
    }
    given = {name for name, value in kwargs.items() if value is not None}
    if unknown := sorted(given - set(known) - {"until", "max_gen_toks"}):
        _warn(f"generation kwargs that transformers does not know: {', '.join(unknown)}")
    generation = {"max_new_tokens": MAX_NEW_TOKENS} | known
    if "max_gen_toks" in kwargs and "max_new_tokens" not in kwargs:
        generation["max_new_tokens"] = kwargs["max_gen_toks"]
    generation["max_new_tokens"] = int(generation["max_new_tokens"])
    temperature = known.get("temperature")
    sample = bool(known.get("do_sample", temperature is not None and temperature > 0))
    if (note := greedy_note(generation | {"do_sample": sample})) is not None:
        _warn(note)
    generation["do_sample"] = sample and temperature != 0
    if not generation["do_sample"]:
        generation = {k: v for k, v in generation.items() if k not in SAMPLING}
    return check_generation(generation) | {"stop": stop_strings(kwargs.get("until"))}


def stop_strings(until: Any) -> list[str]:
    """Converts `until`, which is None, a string or several, to a list without empty strings."""
    if until is None:
        return []
    several = [until] if isinstance(until, str) else until
    if not isinstance(several, list | tuple) or not all(isinstance(s, str) for s in several):
        raise ValueError(f"until must be a string or a list of strings, got {until!r}")
    return [s for s in several if s]


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)
