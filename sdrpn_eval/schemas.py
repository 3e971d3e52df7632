"""What the files of a run hold, checked as they are read: nothing else of them is relied on.

Files may hold more than what is named here, and it is kept.
"""

from __future__ import annotations

import base64
import binascii
from math import prod
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic's demand up to Python 3.11

from sdrpn.io.plurals import counted

OPEN = ConfigDict(extra="allow")
EXACT = ConfigDict(extra="forbid")
"""Of files that are written by hand too: a slip of the pen must not pass."""
FINITE = ConfigDict(extra="forbid", allow_inf_nan=False)
"""EXACT, and every number a finite one."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
Hex = Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]


def _is_name(text: str) -> str:
    if not text or "/" in text or "\0" in text:
        raise ValueError(f"{text[:40]!r} is no name of a task")
    return text


TaskName = Annotated[str, AfterValidator(_is_name)]

# lmms-eval's own


class TaskConfig(TypedDict):
    """The settings of a task that a report reads."""

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
    """Documents of a task: in its data set, and asked."""

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
    """What a model counted of one answer."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    input_tokens: NotRequired[Count | None]
    output_tokens: NotRequired[Count | None]


class SampleLine(TypedDict):
    """A line of a `*_samples_*.jsonl` of lmms-eval; what else it has are metrics."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    doc_id: Count
    token_counts: NotRequired[list[TokensOf | None] | None]


# Ours


class ImageFacts(TypedDict):
    """An image of a record's line. size: (width, height) in pixels, as shown."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    hash: str
    size: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)]


class RecordLine(TypedDict):
    """A line of a `record_*.jsonl`; see `sdrpn_eval.record`."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    run: str
    task: str
    doc_id: Count
    images: list[ImageFacts]
    prompt: str
    answer: str
    regions: list[Annotated[list[Count], Field(min_length=4, max_length=4)]]
    no_zoom: str | None
    map: str | None
    grid: Annotated[list[Count], Field(min_length=2, max_length=2)] | None
    map_max: float | None
    tokens: dict[str, Count]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    key: NotRequired[str | None]
    error: NotRequired[str | None]


def _is_drawn(line: RecordLine) -> RecordLine:
    """Raise ValueError for a map that is none, or a region without an image or a content."""
    for x0, y0, x1, y1 in line["regions"]:
        if not line["images"] or x0 >= x1 or y0 >= y1:
            raise ValueError(f"the region {[x0, y0, x1, y1]} is empty, or of no image")
    if line["map"] is not None:
        try:
            cells = base64.b64decode(line["map"], validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("its map is not in base64") from None
        if line["grid"] is None or len(cells) != prod(line["grid"]):
            raise ValueError(
                f"its map has {counted(len(cells), 'cell')}, its grid is {line['grid']}"
            )
    return line


class TaskMarks(TypedDict):
    """The fingerprints of a task in a process's run facts."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    data: Hex
    prompts: Hex
    scorer: str | None
    scorer_source: NotRequired[str | None]
    documents: NotRequired[Count]


class FactsFile(TypedDict):
    """A `run_facts_*.json`; see `sdrpn_eval.run_facts`."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    run: str
    rank: Count
    versions: dict[str, str]
    source: dict[str, Any] | None
    arguments: dict[str, Any]
    seeds: Any
    device: dict[str, Any]
    weights: dict[str, str]
    tasks: dict[str, TaskMarks]
    skipped: NotRequired[dict[str, Count]]


Boxes = dict[str, dict[int, tuple[float, float, float, float]]]
"""True boxes handed in: task -> document -> (x0, y0, x1, y1) in pixels."""

RESULTS = TypeAdapter(Results)
SAMPLE = TypeAdapter(SampleLine)
RECORD = TypeAdapter(Annotated[RecordLine, AfterValidator(_is_drawn)])
FACTS = TypeAdapter(FactsFile)
BOXES = TypeAdapter(Boxes, config=ConfigDict(allow_inf_nan=False))
