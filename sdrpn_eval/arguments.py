"""`--model_args` of llava_sdrpn: what there is, of which type, and one error that lists it all."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdrpn.model_registry import LLAVA_7B

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "proposer": "rpn",
        "policy": "mask",
        "padding": "pad",
        "token_budget": None,
        "skip_above": None,
        "relative": False,
        "max_crop_tokens": None,
    },
    # The budget and the skip cost the embedded model no answers (docs/fast.md), whose 64 tokens the
    # limit never touches: a ninth of the 576, at which one question on an image costs 1.2 times
    # stock by operations. It was chosen for speed alone.
    "fast": {
        "proposer": "rpn",
        "padding": "pad",
        "token_budget": 2.5,
        "max_crop_tokens": 64,
        "skip_above": 0.7,
    },
}


DTYPES = ("auto", "float32", "bfloat16", "float16")

NONE_IS_A_VALUE = ("proposer", "prefix_cache", "record")
NONE_IS_A_VALUE += ("token_budget", "skip_above", "max_crop_tokens")
"""Arguments of which `none` switches something off; of every other it is the default."""


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return float(value)


def _fraction(value: Any) -> float:
    if not 0 < _number(value) < 1:
        raise ValueError("a number between 0 and 1")
    return _number(value)


def _above_zero(value: Any) -> float | None:
    if isinstance(value, str) and value.lower() == "none":
        return None
    if _number(value) <= 0:
        raise ValueError("a number above 0, or none")
    return _number(value)


def _count(value: Any) -> int | None:
    if isinstance(value, str) and value.lower() == "none":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number of 1 or more, or none")
    return value


def _dtype(value: Any) -> str:
    """A name, torch's own (`torch.float16`) included, or a torch.dtype."""
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"one of {', '.join(DTYPES)}")
    return name


def _text(value: Any) -> str:
    """Text as it stands; lmms-eval has parsed what looks like a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("text, in quotes where it reads as a number")
    return value


def _path(value: Any) -> str:
    """A folder, file or hub id as text, with `~` expanded; a shell expands it in first place
    only."""
    return os.path.expanduser(_text(os.fspath(value) if isinstance(value, os.PathLike) else value))


def _model(value: Any) -> Any:
    """A path as text; a model in memory as it is."""
    return _path(value) if isinstance(value, str | int | float | os.PathLike) else value


def _folder_or_none(value: Any) -> str:
    return str(value) if isinstance(value, bool) else _path(value)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

    return check


def _bytes(value: Any) -> int:
    if value is False or (isinstance(value, str) and value.lower() == "none"):
        return 0
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", str(value), flags=re.IGNORECASE)
    if isinstance(value, bool) or not size:
        raise ValueError("a size such as 512MB, 4GB, a number of bytes, or none")
    return int(float(size[1]) * 1024 ** " KMG".index(size[2].upper() or " "))


def _batch_size(value: Any) -> int | str:
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+)?", value):
        return "auto"
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d*", str(value)):
        raise ValueError("a whole number of 1 or more, or auto")
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


@dataclass(frozen=True)
class Argument:
    """One name of `--model_args`: its default, how it is checked, what the listing says of it."""

    default: Any
    check: Callable[[Any], Any]
    help: str


WITHOUT_THRESHOLD = ("none", "box", "vicrop")
"""Proposers whose map, if they draw one, is not cut at a threshold."""

ARGUMENTS: Mapping[str, Argument] = {
    "pretrained": Argument(
        LLAVA_7B, _model, "folder, hub id, `tiny` (embedded), or a model in memory"
    ),
    "revision": Argument("main", _text, "branch, tag or commit of a hub id"),
    "rpn": Argument(
        None,
        _path,
        "folder or hub id of the RPN, ours or the authors'; default: the base's published one",
    ),
    "rpn_revision": Argument(None, _text, "branch, tag or commit of the RPN's hub id"),
    "peft": Argument(None, _path, "folder or hub id of a PEFT adapter for the base (needs peft)"),
    "load_in_4bit": Argument(False, _flag, "the base's language model, with bitsandbytes"),
    "proposer": Argument(
        "rpn",
        _one_of("rpn", "attention", "vicrop", "none", "box"),
        "who says where to look: rpn, attention, vicrop, none (stock), box (the document's own)",
    ),
    "threshold": Argument(None, _fraction, "for all tasks; default: the published one of each"),
    "policy": Argument(
        None, _one_of("mask", "bbox", "strongest"), "map to crops: mask, bbox, strongest"
    ),
    "token_budget": Argument(None, _above_zero, "crop tokens a side per cell of the box, or none"),
    "skip_above": Argument(
        None, _above_zero, "no zoom where the region is this share of the image or more, or none"
    ),
    "relative": Argument(
        None, _flag, "threshold in shares of the map's maximum: true or false (published)"
    ),
    "max_crop_tokens": Argument(None, _count, "crop tokens of one question at most, or none"),
    "padding": Argument(
        "pad",
        _one_of("pad", "crop"),
        "pad to a square, or crop the centre; default: as config.json notes, else",
    ),
    "system_prompt": Argument(None, _path, "sentence, or file with it; empty: no sentence"),
    "dtype": Argument(
        "auto",
        _dtype,
        "auto (float32 on the CPU, float16 on a GPU), float32, bfloat16, float16",
    ),
    "attn_implementation": Argument(None, _text, "as in transformers: sdpa, eager, ..."),
    "device": Argument(None, _text, "cpu, cuda, cuda:1, ..."),
    "device_map": Argument(None, _text, "as in transformers: auto, cuda:0, ..."),
    "prefix_cache": Argument(None, _bytes, "memory for read images, such as 4GB, or none"),
    "record": Argument(None, _folder_or_none, "folder for one line a question; none: no record"),
    "resume": Argument(True, _flag, "take answers that stand in the record already from there"),
    "on_error": Argument(
        "raise",
        _one_of("raise", "stock", "empty"),
        "a document that fails: raise ends the run, stock asks without a second look, empty skips",
    ),
    "preset": Argument(None, _one_of(*PRESETS), "a named set of the above: paper, fast"),
    "batch_size": Argument(1, _batch_size, "questions at a time, or auto"),
    "max_batch_size": Argument(None, _batch_size, "where auto starts"),
}

HINTS: Mapping[str, str] = {
    "chat_template": "the prompt is LLaVA-1.5's own (vicuna_v1), see system_prompt",
    "use_cache": "the cache is always on",
    "trust_remote_code": "no code from the hub is run",
    "max_frames_num": "there is no video",
}
"""What users of llava_hf may bring along, and why it is refused."""


def stated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say something: None, and `none` where it is no value, are left out."""

    def says_nothing(name: str, value: Any) -> bool:
        named = isinstance(value, str) and value.lower() == "none"
        return value is None or (named and name in ARGUMENTS and name not in NONE_IS_A_VALUE)

    return {k: v for k, v in arguments.items() if not says_nothing(k, v)}


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument with its value: the given one, else the preset's, else the default.

    Raises one ValueError for all that is unknown or ill-typed; its last line says what is wrong,
    below the list of what there is where a name is unknown.
    """
    given = stated(given)
    unknown = [name for name in given if name not in ARGUMENTS]
    wrong = [f"unknown {_hint(name)}" for name in unknown]
    values: dict[str, Any] = {}
    for name, argument in ARGUMENTS.items():
        if name not in given:
            continue
        try:
            values[name] = argument.check(unquoted(given[name]))
            _refuse_open_quote(name, values[name])
        except ValueError as needed:
            wrong.append(f"{name} must be {needed}, got {given[name]!r}")
    if wrong:
        listed = f"Arguments of llava_sdrpn:\n{listing()}\n" if unknown else ""
        raise ValueError(f"{listed}llava_sdrpn: {'; '.join(wrong)}")
    defaults = {name: argument.default for name, argument in ARGUMENTS.items()}
    return defaults | dict(PRESETS.get(values.get("preset", ""), {})) | values


def parse_arguments(model_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`--model_args` by name, as lmms-eval reads them: the one reader of this project.

    Args:
        model_args: the text of the option, or what a results file holds of it.

    Returns:
        Values as lmms-eval types them (numbers and booleans are no text), without the quotes that
        it leaves around a text.

    Raises:
        ValueError: where the text is not NAME=VALUE,NAME=VALUE.
    """
    if isinstance(model_args, Mapping):
        return {str(name): unquoted(value) for name, value in model_args.items()}
    # Imported here: it takes seconds, which commands that read no arguments do not have.
    from lmms_eval.utils import simple_parse_args_string

    try:
        parsed = simple_parse_args_string(model_args or "")
    except ValueError:
        raise ValueError(f"model_args must be NAME=VALUE,NAME=VALUE, got {model_args!r}") from None
    return {name.strip(): unquoted(value) for name, value in parsed.items()}


def unquoted(value: Any) -> Any:
    """A text without the quotes around all of it, which lmms-eval keeps; all else as it is."""
    if not isinstance(value, str):
        return value
    quoted = re.fullmatch(r"""(['"])((?:\\\1|(?!\1).)*)\1""", value, flags=re.DOTALL)
    return quoted[2].replace(f"\\{quoted[1]}", quoted[1]) if quoted else value


def written_arguments(arguments: Mapping[str, Any]) -> str | dict[str, Any]:
    """Arguments as `--model_args` takes them, with quotes where a text needs some.

    Returns:
        A text that `parse_arguments` reads back as what was given; the arguments themselves where
        there is no such text (lmms-eval's parser takes no text that mixes both kinds of quotes
        with commas).
    """
    words: list[str] = []
    for name, value in arguments.items():
        text = str(value)
        forms = (text, f'"{text}"', f"'{text}'", '"' + text.replace('"', '\\"') + '"')
        kept = next((form for form in forms if _reads_as(form, name, value)), None)
        if kept is None:
            return dict(arguments)
        words.append(f"{name}={kept}")
    return ",".join(words)


def _reads_as(form: str, name: str, value: Any) -> bool:
    """Whether a value written in a form is read back, between others too."""
    try:
        return parse_arguments(f"{name}={form},end=1") == {name: value, "end": 1}
    except ValueError:
        return False


def _refuse_open_quote(name: str, value: Any) -> None:
    """Raise ValueError where a text has swallowed the arguments behind it: an apostrophe opens a
    quotation for lmms-eval, as a bracket opens a list."""
    swallowed = re.search(rf",\s*({'|'.join(ARGUMENTS)})\s*=", value if type(value) is str else "")
    before = value[: swallowed.start()] if swallowed else ""
    open_quote = any(before.count(quote) % 2 for quote in "'\"")
    if swallowed and (
        open_quote or any(before.count(a) != before.count(b) for a, b in ("[]", "{}"))
    ):
        raise ValueError(
            f"in quotes: lmms-eval reads {swallowed[0]!r} as a part of it, behind an unclosed "
            "quotation mark or bracket"
        )


def on_command_line(option: str, argv: Sequence[str]) -> str | None:
    """What a command line says after an option, `--x y` or `--x=y`; None where it does not."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def _hint(name: str) -> str:
    if name in HINTS:
        return f"{name} ({HINTS[name]})"
    near = difflib.get_close_matches(name, ARGUMENTS, n=1)
    return f"{name}, did you mean {near[0]}?" if near else name


def listing() -> str:
    """The arguments, one a line."""
    return "\n".join(
        f"  {name}: {argument.help}"
        + ("" if argument.default is None else f" [{argument.default}]")
        for name, argument in ARGUMENTS.items()
    )
