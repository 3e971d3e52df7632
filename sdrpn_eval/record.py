"""The record: a JSON line per question with what was asked, seen and answered.

lmms-eval's samples hold the answer, but neither regions nor maps. A folder may hold several runs of
several processes: each line names its run, and `read_records` reads the latest. A resumed run also
holds the lines that it took from an earlier one, marked `resumed`.
"""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from loguru import logger
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from sdrpn.boxes import PixelBox, covered
from sdrpn.io.atomic import parsed
from sdrpn.io.plurals import counted
from sdrpn_eval.schemas import Count

if TYPE_CHECKING:  # the reports read records, and must not wait for torch
    from sdrpn.engine import Answer

FILES = "record_*_rank*.jsonl"
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class RecordedImage(BaseModel):
    """An image of a question: its content hash, and (width, height) in pixels, as shown."""

    model_config = ConfigDict(extra="allow", frozen=True)
    hash: str
    size: tuple[Positive, Positive]


class RecordLine(BaseModel):
    """One line of a `record_*.jsonl`: a question, what was seen of it, its answer or loss.

    Fields that a line lacks were not known, or not yet written by the version that wrote it.

    Attributes:
        origin: The run that asked, where a later one took the line from it.
        policy, threshold: How the map became boxes.
        regions: What was cropped, (x0, y0, x1, y1) in source pixels.
        reason: Why nothing was, else None.
        heat: The RoI map with 8 bits a cell, base64, row by row; `grid` is (rows, columns).
        tokens: By kind: image, crop, question, new.
        seconds: The question's share of its batch's time.
        continuation, loss, greedy: Of a question whose answer was given, to be scored.
        confidence: Smallest probability of a token of the answer without a zoom; with `gate=`.
        gate: The learned gate's probability that a zoom helps; with an RPN that has one.
        error: Why it was not answered as asked.
        key: What a later run finds the line by; None where its answer is left to chance, say.
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    run: str
    origin: str | None = Field(None, alias="from")
    task: str
    split: str | None = None
    doc_id: Count
    image_files: list[RecordedImage] = Field(alias="images")
    prompt: str
    proposer: str | None = None
    policy: str | None = None
    threshold: float | Literal["peak"] | None = None
    answer: str
    regions: tuple[PixelBox, ...]
    reason: str | None = Field(alias="no_zoom")
    heat: str | None = Field(alias="map")
    grid: tuple[Count, Count] | None
    map_max: float | None
    tokens: dict[str, Count]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    continuation: str | None = None
    loss: float | None = None
    greedy: bool | None = None
    confidence: Share | None = None
    gate: Share | None = None
    error: str | None = None
    key: str | None = None
    resumed: bool = False

    @model_validator(mode="after")
    def _is_drawn(self) -> Self:
        for box in self.regions:
            if not self.image_files or not (0 <= box.x0 < box.x1 and 0 <= box.y0 < box.y1):
                raise ValueError(f"the region {[*box]} is empty, or of no image")
        if self.heat is not None:
            try:
                cells = base64.b64decode(self.heat, validate=True)
            except (binascii.Error, ValueError):
                raise ValueError("its map is not in base64") from None
            if self.grid is None or len(cells) != prod(self.grid):
                raise ValueError(
                    f"its map has {counted(len(cells), 'cell')}, its grid is {self.grid}"
                )
        return self

    @property
    def images(self) -> tuple[str, ...]:
        """Hashes of the images' content."""
        return tuple(image.hash for image in self.image_files)

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the first image, in pixels; None without one."""
        return self.image_files[0].size if self.image_files else None

    @property
    def share(self) -> float | None:
        """Part of the image that the regions cover, in (0, 1]; None without a zoom."""
        if not self.regions or self.size is None:
            return None
        return covered(self.regions, PixelBox(0, 0, *self.size))

    @property
    def is_loss(self) -> bool:
        """Whether an answer was given to be scored, not asked for."""
        return self.greedy is not None

    @property
    def roi_map(self) -> np.ndarray | None:
        """The RoI map, float32 [rows, columns] in [0, 1]; None where there was none."""
        if self.heat is None or self.grid is None:
            return None
        cells = np.frombuffer(base64.b64decode(self.heat), dtype=np.uint8)
        return cells.reshape(self.grid).astype(np.float32) / 255

    def as_dict(self) -> dict[str, Any]:
        """What `as_json` writes, as JSON's own types."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def as_json(self) -> str:
        """The line as it is written; NaN and infinities, which JSON lacks, are null."""
        return self.model_dump_json(by_alias=True, exclude_unset=True)


LINE = TypeAdapter(RecordLine)


def describe_answer(answer: Answer) -> dict[str, Any]:
    """The fields of a line that come from an answer, by their names in JSON."""
    return answer.to_dict() | encode_map(answer.roi_map)


def encode_map(roi_map: np.ndarray | None) -> dict[str, Any]:
    """The fields of a line that hold a RoI map [rows, columns] in [0, 1]."""
    if roi_map is None:
        return {"map": None, "grid": None, "map_max": None}
    cells = np.rint(np.clip(roi_map, 0, 1) * 255).astype(np.uint8)
    return {
        "map": base64.b64encode(cells.tobytes()).decode("ascii"),
        "grid": roi_map.shape,
        "map_max": round(float(roi_map.max()), 6),
    }


# Files


class RecordWriter:
    """Appends lines to `DIR/record_{task}_rank{r}.jsonl`, flushed after every batch."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank

    def append(self, lines: Iterable[RecordLine]) -> None:
        """Write lines. Raises OSError that names the file, if the disk is full, say."""
        # Imported here: the reports that read records must not wait for torch.
        from sdrpn.io.resumable import append_lines

        by_task: dict[str, list[str]] = {}
        for line in lines:
            by_task.setdefault(line.task, []).append(line.as_json())
        for task, texts in by_task.items():
            append_lines(self.folder / f"{_stem(task)}{self.rank}.jsonl", texts)


def _stem(task: str) -> str:
    safe = re.sub(r"[^\w.-]", "_", task)
    return f"record_{safe}_rank"


def check_writable(folder: Path) -> None:
    """Raise OSError that names the folder where no record can be written: before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n" * 4096)
    except OSError as error:
        raise OSError(
            f"the record's folder {folder} cannot be written: {error}; give another one, "
            "record=FOLDER, or record=none"
        ) from error


def read_records(folder: str | Path) -> list[RecordLine]:
    """The lines of each task's latest run in a folder, by task and document.

    An incomplete or damaged line is left out. Raises FileNotFoundError where there is no record.
    """
    lines = read_all_records(folder)
    latest: dict[str, str] = {}
    for line in lines:
        latest[line.task] = max(latest.get(line.task, ""), line.run)
    return [line for line in lines if line.run == latest[line.task]]


def read_all_records(folder: str | Path) -> list[RecordLine]:
    """The lines of every run in a folder, by task and document; else as `read_records`."""
    paths = sorted(Path(folder).expanduser().glob(FILES))
    if not paths:
        raise FileNotFoundError(f"no {FILES} in {folder}; run with record={folder}")
    lines = []
    for path in paths:
        for number, line in _read(path):
            if line is None:
                logger.warning(f"{path}, line {number}, was cut off or is damaged, and is left out")
            else:
                lines.append(line)
    return sorted(lines, key=lambda line: (line.task, line.doc_id))


def lines_of(folder: Path, task: str) -> Iterator[RecordLine]:
    """Every complete line that any process of any run left of a task."""
    for path in sorted(folder.glob(f"{_stem(task)}*.jsonl")):
        for _, line in _read(path):
            if line is not None and line.task == task:
                yield line


def _read(path: Path) -> Iterator[tuple[int, RecordLine | None]]:
    """Number and content of each line; None for the content of a damaged one."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield number, parsed(LINE, text)
                except ValueError:
                    yield number, None
