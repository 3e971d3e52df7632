"""`--model_args`: a pydantic model per family, and one error that says all that is wrong."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from sdrpn.backbones.qwen25_vl_published import PIXELS
from sdrpn.config import PEAK, Padding, Policy, Proposer
from sdrpn.model_registry import LLAVA_7B, QWEN_7B
from sdrpn_eval.command_line import unquoted

WITHOUT_THRESHOLD = ("none", "box", "vicrop")
"""Proposers whose map, if they draw one, is not cut at a threshold."""

GATES = ("gate", "learned_gate")
ZOOM_ARGUMENTS = ("policy", "token_budget", "crop_tokens", "tiles", "skip_above", *GATES)
ZOOM_ARGUMENTS += ("keep_tokens", "thin_above")
"""Arguments that are settings of the zoom, beside the threshold."""

NEEDS_RPN = ("learned_gate", "keep_tokens")
"""Zoom settings that only the RPN can serve."""

OFF = ("token_budget", "crop_tokens", "skip_above", *GATES, "keep_tokens", "thin_above")
NONE_IS_A_VALUE = ("proposer", "prefix_cache", "record", *OFF)
"""Arguments of which `none` switches something off; of every other it is the default."""

PAPER: Mapping[str, Any] = {"proposer": "rpn", "policy": "mask", "tiles": 1} | dict.fromkeys(
    ("token_budget", "skip_above", "crop_tokens", *GATES, "keep_tokens")
)
"""Of every family's `paper`: what is no part of the published method is off."""

FAST: Mapping[str, Any] = {
    "proposer": "rpn",
    "padding": "pad",
    "token_budget": 2.5,
    "crop_tokens": 64,
    "skip_above": 0.7,
}
"""The budget and the skip cost the embedded model no answers (docs/fast.md), whose 64 tokens the
limit never touches: a ninth of the 576, at which one question on an image costs 1.2 times stock by
operations. It was chosen for speed alone."""

CELL = 28 * 28
"""Pixels of an image token of Qwen2.5-VL."""


class Needs(str):
    """What an argument must be, in words, as metadata of its type."""


def _as_text(value: Any) -> Any:
    """lmms-eval has parsed what looks like a whole number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_path(value: Any) -> Any:
    """A folder, file or Hub id with `~` expanded; a shell expands it in first place only."""
    text = _as_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    return os.path.expanduser(text) if isinstance(text, str) else text


def _as_folder_or_none(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else _as_path(value)


def _as_bytes(value: Any) -> Any:
    """A size in text counts in powers of 1024, whether it says GB or GiB."""
    if isinstance(value, bool) or str(value).lower() == "none":
        return None if value is True else 0
    return re.sub(r"(?<=[kmg])i?b?$", "iB", value, flags=re.I) if isinstance(value, str) else value


def _as_batch_size(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+)?", value):
        return "auto"
    return int(value) if isinstance(value, str) and re.fullmatch(r"[1-9]\d*", value) else value


TEXT = Needs("text, in quotes where it reads as a number")
Text = Annotated[str, BeforeValidator(_as_text), TEXT]
Path = Annotated[str, BeforeValidator(_as_path), TEXT]
Flag = Annotated[bool, Field(strict=True), Needs("True or False")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(gt=0, lt=1), Needs("a number between 0 and 1")]
Threshold = Annotated[
    Annotated[Number, Field(gt=0, lt=1)] | Literal["peak"],
    Needs(f"a number between 0 and 1, or {PEAK}"),
]
Positive = Annotated[Number, Field(gt=0), Needs("a number above 0, or none")]
StrictCount = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[StrictCount, Needs("a whole number of 1 or more, or none")]
Tiles = Annotated[Literal[1, 2, 4], Needs("1, 2 or 4")]
Pixels = Annotated[
    int, Field(strict=True, ge=CELL), Needs(f"a whole number of {CELL} (one token) or more")
]
Bytes = Annotated[
    ByteSize,
    Field(ge=0),
    BeforeValidator(_as_bytes),
    Needs("a size such as 512MB, 4GB, a number of bytes, or none"),
]
BatchSize = Annotated[
    StrictCount | Literal["auto"],
    BeforeValidator(_as_batch_size),
    Needs("a whole number of 1 or more, or auto"),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(lambda value: str(value).removeprefix("torch.")),
]


class ModelArguments(BaseModel):
    """What every family takes. `of` makes one of what lmms-eval hands over.

    A subclass a family says its name, adds its own arguments and presets, and changes defaults.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    model_name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    hints: ClassVar[Mapping[str, str]] = {}
    """What users of other models may bring along, and why it is refused."""

    pretrained: Annotated[Any, BeforeValidator(_as_path)] = None
    """folder, hub id, `tiny` (embedded), or a model in memory"""
    revision: Text = "main"
    """branch, tag or commit of a hub id"""
    rpn: Path | None = None
    """folder or hub id of the RPN, ours or the authors'; default: the base's published one"""
    rpn_revision: Text | None = None
    """branch, tag or commit of the RPN's hub id"""
    peft: Path | None = None
    """folder or hub id of a PEFT adapter for the base (needs peft)"""
    load_in_4bit: Flag = False
    """the base's language model, with bitsandbytes"""
    proposer: Proposer | Literal["box"] = "rpn"
    """who says where to look: rpn, attention, vicrop, none (stock), box (the document's own)"""
    threshold: Threshold | None = None
    """for all tasks: a number, or peak (relative to the map's); default: the published of each"""
    policy: Policy | None = None
    """map to crops: mask, bbox, strongest"""
    token_budget: Positive | None = None
    """crop tokens a side per cell of the box, or none"""
    skip_above: Positive | None = None
    """no zoom where the region is this share of the image or more, or none"""
    crop_tokens: Count | None = None
    """crop tokens of one question at most, those of the map's foreground first, or none"""
    tiles: Tiles = 1
    """encode large regions as up to 1, 2 or 4 crops, and keep the map's foreground"""
    gate: Fraction | None = None
    """no zoom where the first answer's least sure token is this sure, or none"""
    learned_gate: Fraction | None = None
    """no zoom where the RPN's learned gate is below this, or none"""
    keep_tokens: Count | None = None
    """image tokens that the upper layers of a zoomed answer see, or none (all)"""
    zoom: Path | None = None
    """file of zoom settings, as `sdrpn-eval sweep` writes it; arguments beside it win"""
    dtype: Dtype = "auto"
    """auto (float32 on the CPU, float16 on a GPU), float32, bfloat16, float16"""
    attn_implementation: Text | None = None
    """as in transformers: sdpa, eager, ..."""
    device: Text | None = None
    """cpu, cuda, cuda:1, ..."""
    device_map: Text | None = None
    """as in transformers: auto, cuda:0, ..."""
    prefix_cache: Bytes | None = None
    """memory for prefilled images, such as 4GB, or none"""
    record: Annotated[str, BeforeValidator(_as_folder_or_none), TEXT] | None = None
    """folder for one line a question; none: no record"""
    resume: Flag = True
    """take answers that stand in the record already from there"""
    on_error: Literal["raise", "stock", "empty"] = "raise"
    """a document that fails: raise ends the run, stock asks without a second look, empty skips"""
    batch_size: BatchSize = 1
    """questions at a time, or auto"""
    _given: frozenset[str] = PrivateAttr(frozenset())

    @property
    def given(self) -> frozenset[str]:
        """Names that the user wrote; `model_fields_set` has those of the preset too."""
        return self._given

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Every argument with its value: the given one, else the preset's, else the default.

        Raises:
            ValueError: For all that is unknown or ill-typed; its last line says what is wrong,
                below the list of what there is where a name is unknown. Or if the file of `zoom`
                cannot be read.
        """
        given = stated(given, cls)
        preset = given.get("preset")
        chosen = dict(cls.presets.get(preset, {})) if isinstance(preset, str) else {}
        if isinstance(given.get("zoom"), str | os.PathLike):
            chosen |= zoom_file(os.path.expanduser(given["zoom"]))
        if given.get("proposer", "rpn") != "rpn":
            chosen = {name: value for name, value in chosen.items() if name not in NEEDS_RPN}
        try:
            made = cls.model_validate({**chosen, **{k: unquoted(v) for k, v in given.items()}})
        except ValidationError as error:
            raise ValueError(cls._in_words(error, given)) from None
        made._given = frozenset(given)
        return made

    def note(self, settings: Mapping[str, Any]) -> None:
        """Take over what the loaded model decided, for the arguments of these names."""
        for name in settings.keys() & type(self).model_fields.keys():
            setattr(self, name, settings[name])

    @field_validator(*OFF, mode="before", check_fields=False)
    @classmethod
    def _switched_off(cls, value: Any) -> Any:
        return None if isinstance(value, str) and value.lower() == "none" else value

    @field_validator(*NEEDS_RPN, mode="after")
    @classmethod
    def _served(cls, value: Any, info: ValidationInfo) -> Any:
        proposer = info.data.get("proposer", "rpn")
        if value is not None and proposer != "rpn":
            raise ValueError(f"left out with proposer={proposer}: only the RPN can rank tokens")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _closed_quote(cls, value: Any) -> Any:
        """Refuse a text that has swallowed the arguments behind it: an apostrophe opens a
        quotation for lmms-eval, as a bracket opens a list."""
        names = "|".join(cls.model_fields)
        swallowed = re.search(rf",\s*({names})\s*=", value) if type(value) is str else None
        if swallowed is None:
            return value
        before = value[: swallowed.start()]
        if any(before.count(quote) % 2 for quote in "'\"") or any(
            before.count(a) != before.count(b) for a, b in ("[]", "{}")
        ):
            raise ValueError(
                f"in quotes: lmms-eval reads {swallowed[0]!r} as a part of it, behind an unclosed "
                "quotation mark or bracket"
            )
        return value

    @classmethod
    def _in_words(cls, error: ValidationError, given: Mapping[str, Any]) -> str:
        unknown, wrong = [], {}
        for one in error.errors():
            name = str(one["loc"][0])
            if one["type"] == "extra_forbidden":
                unknown.append(f"unknown {cls._hint(name)}")
            elif one["type"] == "value_error":
                wrong[name] = one["msg"].removeprefix("Value error, ")
            else:
                wrong.setdefault(name, cls._needed(name))
        values = cls.defaults() | dict(given)
        told = [*unknown, *(f"{n} must be {w}, got {values[n]!r}" for n, w in wrong.items())]
        listed = f"Arguments of {cls.model_name}:\n{cls.listing()}\n" if unknown else ""
        return f"{listed}{cls.model_name}: {'; '.join(told)}"

    @classmethod
    def _needed(cls, name: str) -> str:
        field = cls.model_fields[name]
        every = [*field.metadata, *_metadata(field.annotation)]
        words = next((one for one in every if isinstance(one, Needs)), None)
        return words or f"one of {', '.join(one for one in every if isinstance(one, str))}"

    @classmethod
    def _hint(cls, name: str) -> str:
        if name in cls.hints:
            return f"{name} ({cls.hints[name]})"
        near = difflib.get_close_matches(name, cls.model_fields, n=1)
        return f"{name}, did you mean {near[0]}?" if near else name

    @classmethod
    def listing(cls) -> str:
        """The arguments, one a line."""
        return "\n".join(
            f"  {name}: {' '.join(str(field.description).split())}"
            + ("" if field.default is None else f" [{field.default}]")
            for name, field in cls.model_fields.items()
        )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every argument's default by name."""
        return {name: field.default for name, field in cls.model_fields.items()}


def zoom_file(path: str) -> dict[str, Any]:
    """Read zoom settings from a file of `sdrpn-eval sweep`: a JSON object with a key `zoom`.

    Returns:
        Values of the arguments `threshold` and `ZOOM_ARGUMENTS`.

    Raises:
        ValueError: If the file cannot be read, or holds something else; names it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)["zoom"]
    except OSError as error:
        raise ValueError(f"zoom={path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"zoom={path} holds no zoom settings; give a file that `sdrpn-eval sweep` wrote"
        )
    known = ("threshold", *ZOOM_ARGUMENTS)
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"zoom={path}: unknown setting {unknown[0]}; known: {', '.join(known)}")
    return settings


def _metadata(annotation: Any) -> Iterator[Any]:
    """What stands in the Annotated parts of a type, and the choices of its Literals."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif hasattr(annotation, "__metadata__"):
        yield from annotation.__metadata__
        yield from _metadata(annotation.__origin__)
    else:
        for inner in get_args(annotation):
            yield from _metadata(inner)


class LlavaArguments(ModelArguments):
    """`--model_args` of llava_sdrpn."""

    model_name = "llava_sdrpn"
    presets: ClassVar = {
        "paper": {**PAPER, "padding": "pad"},
        "fast": FAST,
        # One rule for all benchmarks, and every saving that needs no training.
        "fastest": {**FAST, "threshold": PEAK, "keep_tokens": 128},
    }
    hints: ClassVar = {
        "chat_template": "the prompt is LLaVA-1.5's own (vicuna_v1), see system_prompt",
        "use_cache": "the cache is always on",
        "trust_remote_code": "no code from the hub is run",
        "max_frames_num": "there is no video",
        "max_batch_size": "batch_size=auto starts high and halves what does not fit",
    }

    pretrained: Annotated[Any, BeforeValidator(_as_path)] = LLAVA_7B
    """folder, hub id, `tiny` (embedded), or a model in memory"""
    padding: Padding = "pad"
    """pad to a square, or crop the centre; default: as config.json notes, else"""
    system_prompt: Path | None = None
    """sentence, or file with it; empty: no sentence"""
    preset: Literal["paper", "fast", "fastest"] | None = None
    """a named set of the above: paper, fast, fastest"""


class QwenArguments(ModelArguments):
    """`--model_args` of qwen2_5_vl_sdrpn; those of lmms-eval's qwen2_5_vl mean the same."""

    model_name = "qwen2_5_vl_sdrpn"
    presets: ClassVar = {
        "paper": {**PAPER, "min_pixels": PIXELS, "max_pixels": PIXELS, "short_answer": True},
    }
    hints: ClassVar = {
        "padding": "images keep their shape",
        "use_cache": "the cache is always on",
        "use_flash_attention_2": "give attn_implementation=flash_attention_2",
        "max_num_frames": "there is no video",
        "fps": "there is no video",
        "interleave_visuals": "images stand in front of the question",
        "reasoning_prompt": "write it into the task's prompt",
        "max_batch_size": "batch_size=auto starts high and halves what does not fit",
    }

    pretrained: Annotated[Any, BeforeValidator(_as_path)] = QWEN_7B
    """folder, hub id, or a model in memory"""
    min_pixels: Pixels = PIXELS
    """fewest pixels of a resized image or crop; the published 576 tokens of 28 x 28 pixels are"""
    max_pixels: Annotated[Pixels, Field(validate_default=True)] = PIXELS
    """most pixels of a resized image or crop"""
    system_prompt: Path | None = None
    """sentence, or file with it; default: the model's own"""
    thin_above: Count | None = None
    """drop unneeded image tokens of images with more than this (published: 1024), or none"""
    short_answer: Flag = False
    """end questions as the published runs do: Answer the question using a single word or phrase."""
    preset: Literal["paper"] | None = None
    """a named set of the above: paper"""

    @field_validator("max_pixels", mode="after")
    @classmethod
    def _not_below_least(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("min_pixels")
        if least is not None and value < least:
            raise ValueError(f"at least min_pixels, {least}")
        return value


ARGUMENTS: Mapping[str, type[ModelArguments]] = {
    kind.model_name: kind for kind in (LlavaArguments, QwenArguments)
}
"""Classes of model arguments by the model's name in lmms-eval."""


def stated(
    arguments: Mapping[str, Any], kind: type[ModelArguments] = ModelArguments
) -> dict[str, Any]:
    """The arguments that say something: None, and `none` where it is no value, are left out."""
    none_is_default = kind.model_fields.keys() - {*NONE_IS_A_VALUE}
    named = {k for k, v in arguments.items() if isinstance(v, str) and v.lower() == "none"}
    left_out = named & none_is_default
    return {k: v for k, v in arguments.items() if v is not None and k not in left_out}
