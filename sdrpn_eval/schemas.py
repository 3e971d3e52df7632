"""Schemas of the files of a run, which are validated as they are read.

Files may hold more than these fields, which is kept.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic's demand up to Python 3.11

OPEN = ConfigDict(extra="allow")
EXACT = ConfigDict(extra="forbid")
"""Of files that are also written by hand: unknown fields are typing errors."""
FINITE = ConfigDict(extra="forbid", allow_inf_nan=False)
"""EXACT, and without NaN and infinities."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
Hex = Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""Hub id of a dataset."""


def _is_name(text: str) -> str:
    if not text or "/" in text or "\0" in text:
        raise ValueError(f"{text[:40]!r} is no name of a task")
    return text


TaskName = Annotated[str, AfterValidator(_is_name)]

# lmms-eval's own


class TaskConfig(TypedDict):
    """The settings of a task that reports read."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    output_type: NotRequired[str | None]
    cluster_key: NotRequired[str | None]
    score_key: NotRequired[str | None]
    generation_kwargs: NotRequired[dict[str, Any] | None]
    filter_list: NotRequired[list[dict[str, Any]] | None]
    repeats: NotRequired[Count | None]


class RunConfig(TypedDict):
    """How a run was started."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    model: str
    model_args: NotRequired[str | dict[str, Any] | None]
    limit: NotRequired[int | float | None]
    offset: NotRequired[Count | None]
    resolved_cli_args: NotRequired[dict[str, Any] | None]


class Counts(TypedDict):
    """Number of documents of a task: in its dataset, and asked."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    original: NotRequired[Count]
    effective: NotRequired[int]


_Counted = TypedDict("_Counted", {"n-samples": NotRequired[dict[str, Counts]]})


class Results(_Counted):
    """A `*_results.json` of lmms-eval."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    results: dict[str, dict[str, Any]]
    configs: dict[TaskName, TaskConfig]
    config: RunConfig
    date: str
    total_evaluation_time_seconds: NotRequired[str | int | float | None]
    model_name_sanitized: NotRequired[str | None]
    higher_is_better: NotRequired[dict[str, dict[str, bool | None]]]
    group_subtasks: NotRequired[dict[str, list[str]]]
    rescored: NotRequired[dict[str, Any] | None]
    usage: NotRequired[dict[str, Any] | None]


class TokensOf(TypedDict):
    """Token counts of one answer."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    input_tokens: NotRequired[Count | None]
    output_tokens: NotRequired[Count | None]


class SampleLine(TypedDict):
    """A line of a `*_samples_*.jsonl` of lmms-eval; other fields are metrics."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    doc_id: Count
    token_counts: NotRequired[list[TokensOf | None] | None]


def _is_box(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = map(int, box)
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"the box {list(box)} is empty or turned round")
    return box


Box = Annotated[tuple[float, float, float, float], AfterValidator(_is_box)]
Boxes = dict[str, dict[int, Box]]
"""True boxes by task and document id, (x0, y0, x1, y1) in pixels."""

RESULTS = TypeAdapter(Results)
SAMPLE = TypeAdapter(SampleLine)
BOXES = TypeAdapter(Boxes, config=ConfigDict(allow_inf_nan=False))
