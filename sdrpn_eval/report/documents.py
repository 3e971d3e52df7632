"""The documents behind a task, loaded from what is on this machine: images and true boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn.io.atomic import read_parsed
from sdrpn_eval.report.scores import Document
from sdrpn_eval.schemas import BOXES


@dataclass(frozen=True)
class TaskData:
    """The documents of one task. task: lmms-eval's own object, which turns them into images."""

    task: Any

    def image(self, doc_id: int) -> Image.Image | None:
        """The first image of a document; None where it has none."""
        visuals = self.task.doc_to_visual(self.task.eval_docs[doc_id]) or []
        return next((v for v in visuals if isinstance(v, Image.Image)), None)

    def prompt(self, doc_id: int) -> str:
        """The question as the task words it."""
        return str(self.task.doc_to_text(self.task.eval_docs_no_media[doc_id]))

    def box(self, doc_id: int) -> PixelBox | None:
        """The document's own `box` in pixels of the image, half-open; None without."""
        box = self.task.eval_docs_no_media[doc_id].get("box")
        return PixelBox(*(int(v) for v in box)) if box else None

    @property
    def has_boxes(self) -> bool:
        """Whether its first document has a `box`."""
        return len(self.task.eval_docs_no_media) > 0 and self.box(0) is not None


def task_manager(include_path: Any = None, include_defaults: bool = True) -> Any:
    """lmms-eval's index of tasks: its own unless told not to, ours and those under include_path."""
    from lmms_eval.tasks import TaskManager

    from sdrpn_eval.plugin import add_tasks

    add_tasks()
    with quiet():
        return TaskManager("ERROR", include_path, include_defaults)


@contextmanager
def quiet() -> Iterator[None]:
    """Without lmms-eval's log, which tells of a run, and these commands are none."""
    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")


def load_data(
    tasks: Iterable[str], include_path: Any = None, manager: Any = None
) -> tuple[dict[str, TaskData], list[str]]:
    """Data of tasks by name, and one sentence for each that this machine does not hold.

    Nothing is fetched while HF_HUB_OFFLINE=1 is set, as the command line does.
    include_path: lmms-eval's, for tasks of the user's own. manager: an index already built.
    """
    from lmms_eval.tasks import get_task_dict

    tasks = list(tasks)
    manager = manager or _smallest_index(tasks, include_path)
    found: dict[str, TaskData] = {}
    notes = []
    for name in tasks:
        try:
            with quiet():
                found[name] = TaskData(get_task_dict([name], manager)[name])
        except Exception as error:  # whatever a task's own code raises: the page goes without
            cause = _cause(error)
            notes.append(f"{name}: no pictures, its data cannot be loaded here ({cause})")
    return found, notes


def _smallest_index(tasks: Sequence[str], include_path: Any) -> Any:
    """An index that holds the tasks: lmms-eval's own, thousands of files, only where needed."""
    manager = task_manager(include_path, include_defaults=False)
    if set(tasks) <= set(manager.all_tasks):
        return manager
    return task_manager(include_path)


def _cause(error: BaseException) -> str:
    """One line; lmms-eval wraps what went wrong in a retry's error."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    text = str(inner or error).splitlines() or [""]
    return f"{type(inner or error).__name__}: {text[0]}"[:160]


def boxes_of(
    data: Mapping[str, TaskData], documents: Sequence[Document], given: Mapping[Document, PixelBox]
) -> dict[Document, PixelBox]:
    """True boxes: those handed in, else the documents' own."""
    found = dict(given)
    for document in documents:
        task, doc_id = document
        if document not in found and task in data:
            box = data[task].box(doc_id)
            if box is not None:
                found[document] = box
    return found


def read_boxes(file: Path) -> dict[Document, PixelBox]:
    """A file of true boxes: {task: {document id: [x0, y0, x1, y1]}}, pixels, half-open."""
    try:
        content = read_parsed(BOXES, file)
        return {
            (task, doc_id): _valid(box, f"{task} {doc_id}")
            for task, boxes in content.items()
            for doc_id, box in boxes.items()
        }
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must hold {{task: {{document id: [x0, y0, x1, y1]}}}} in pixels: {error}"
        ) from None


def _valid(box: Sequence[Any], where: str) -> PixelBox:
    x0, y0, x1, y1 = (int(v) for v in box)
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"the box {list(box)} of {where} is empty or turned round")
    return PixelBox(x0, y0, x1, y1)
