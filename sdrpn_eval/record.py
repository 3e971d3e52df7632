"""The record: what was asked, seen and answered, one JSON line a question, as batches finish.

lmms-eval's samples keep the answer alone; regions and maps have no place there. A folder may hold
several runs of several processes: each line names its run, and `read_records` takes the latest.
A run that went on from an earlier one holds that one's lines too, marked `resumed`.
"""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from loguru import logger

from sdrpn.io.atomic import as_json, parsed
from sdrpn_eval.schemas import RECORD, RecordLine

if TYPE_CHECKING:  # the reports read records, and must not wait for torch
    from sdrpn.engine import Answer

RUN_STAMP = "%Y%m%dT%H%M%S.%fZ"
"""A run's name: when it began, in UTC; names sort by time."""


class RecordWriter:
    """Appends lines to `DIR/record_{task}_rank{r}.jsonl`, flushed after every batch.

    run: name of this run, the same on all ranks; names must sort by time.
    """

    def __init__(self, folder: str | Path, run: str, rank: int) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = run
        self.rank = rank

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines that have a `task` each, with this run's name in front.

        Raises OSError that names the file where the disk is full.
        """
        by_task: dict[str, list[str]] = {}
        for line in lines:
            text = as_json({"run": self.run, **line}, ensure_ascii=False)
            by_task.setdefault(line["task"], []).append(text + "\n")
        for task, texts in by_task.items():
            path = self.folder / f"{_stem(task)}{self.rank}.jsonl"
            try:
                with path.open("ab+") as file:
                    if _is_cut_off(file):
                        file.write(b"\n")
                    file.write("".join(texts).encode())
            except OSError as error:
                raise OSError(
                    f"{path} cannot be written: {error}; mend that and start the same command "
                    "again, which asks nothing twice that stands there"
                ) from error


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


def _is_cut_off(file: BinaryIO) -> bool:
    """Whether an earlier run died in the middle of its last line."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def describe_answer(answer: Answer) -> dict[str, Any]:
    """The fields of a line that come from an answer."""
    return answer.to_dict() | encode_map(answer.roi_map)


def encode_map(roi_map: np.ndarray | None) -> dict[str, Any]:
    """A RoI map (rows, columns) in [0, 1] as 8 bits a cell, base64, row by row."""
    if roi_map is None:
        return {"map": None, "grid": None, "map_max": None}
    cells = np.rint(np.clip(roi_map, 0, 1) * 255).astype(np.uint8)
    return {
        "map": base64.b64encode(cells.tobytes()).decode("ascii"),
        "grid": list(roi_map.shape),
        "map_max": round(float(roi_map.max()), 6),
    }


def decode_map(line: Mapping[str, Any]) -> np.ndarray | None:
    """The RoI map of a line, float32 (rows, columns) in [0, 1]; None where there was none."""
    if line["map"] is None:
        return None
    cells = np.frombuffer(base64.b64decode(line["map"]), dtype=np.uint8)
    return cells.reshape(line["grid"]).astype(np.float32) / 255


def read_records(folder: str | Path) -> list[RecordLine]:
    """The lines of each task's latest run in a folder, by task and document.

    A line cut off by a crash, or damaged, is left out. Raises FileNotFoundError where there is no
    record.
    """
    lines = read_all_records(folder)
    latest: dict[str, str] = {}
    for line in lines:
        latest[line["task"]] = max(latest.get(line["task"], ""), line["run"])
    return [line for line in lines if line["run"] == latest[line["task"]]]


def read_all_records(folder: str | Path) -> list[RecordLine]:
    """The lines of every run in a folder, by task and document; else as `read_records`."""
    paths = sorted(Path(folder).expanduser().glob("record_*_rank*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no record_*_rank*.jsonl in {folder}; run with record={folder}")
    lines = [line for path in paths for line in _lines(path)]
    return sorted(lines, key=lambda line: (line["task"], line["doc_id"]))


def lines_of(folder: Path, task: str) -> Iterator[tuple[str, RecordLine]]:
    """Every whole line that any process of any run left of a task: its text, and what it says."""
    for path in sorted(folder.glob(f"{_stem(task)}*.jsonl")):
        for _, text, line in _read(path):
            if line is not None and line["task"] == task:
                yield text, line


def _lines(path: Path) -> Iterator[RecordLine]:
    for number, _, line in _read(path):
        if line is None:
            logger.warning(f"{path}, line {number}, was cut off or is damaged, and is left out")
        else:
            yield line


def _read(path: Path) -> Iterator[tuple[int, str, RecordLine | None]]:
    """Number, text and content of each line; None for the content of a damaged one."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, text, _parsed(text)


def _parsed(text: str) -> RecordLine | None:
    try:
        return parsed(RECORD, text)
    except ValueError:
        return None
