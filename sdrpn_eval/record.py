"""The record: what was asked, seen and answered, one JSON line a question, as batches finish.

lmms-eval's samples keep the answer alone; regions and maps have no place there. A folder may hold
several runs of several processes: each line names its run, and `read_records` takes the latest.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from loguru import logger

from sdrpn.zoom import Answer

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
        """Write lines that have a `task` each, with the run's name added."""
        by_task: dict[str, list[str]] = {}
        for line in lines:
            text = json.dumps({"run": self.run, **line}, ensure_ascii=False)
            by_task.setdefault(line["task"], []).append(text + "\n")
        for task, texts in by_task.items():
            with self._path(task).open("ab+") as file:
                if _is_cut_off(file):
                    file.write(b"\n")
                file.write("".join(texts).encode())

    def _path(self, task: str) -> Path:
        safe = re.sub(r"[^\w.-]", "_", task)
        return self.folder / f"record_{safe}_rank{self.rank}.jsonl"


def _is_cut_off(file: BinaryIO) -> bool:
    """Whether an earlier run died in the middle of its last line."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def describe_answer(answer: Answer) -> dict[str, Any]:
    """The fields of a line that come from an answer."""
    return {
        "answer": answer.text,
        "regions": [[int(v) for v in box] for box in answer.regions],
        "no_zoom": answer.reason,
        **encode_map(answer.roi_map),
        "tokens": {
            "image": answer.image_tokens,
            "crop": answer.crop_tokens,
            "question": answer.question_tokens,
            "new": answer.new_tokens,
        },
        "seconds": round(answer.seconds, 4),
    }


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


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of each task's latest run in a folder, by task and document.

    A line cut off by a crash is left out. Raises FileNotFoundError where there is no record.
    """
    paths = sorted(Path(folder).expanduser().glob("record_*_rank*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no record_*_rank*.jsonl in {folder}; run with record={folder}")
    lines = [line for path in paths for line in _lines(path)]
    latest: dict[str, str] = {}
    for line in lines:
        latest[line["task"]] = max(latest.get(line["task"], ""), line["run"])
    kept = [line for line in lines if line["run"] == latest[line["task"]]]
    return sorted(kept, key=lambda line: (line["task"], line["doc_id"]))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            if text:
                yield json.loads(text)
        except json.JSONDecodeError:
            logger.warning(f"{path}, line {number}, was cut off and is left out")
