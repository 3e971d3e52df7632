"""Documents of tasks, images and true boxes, from data on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger
from PIL import Image

from sdrpn.boxes import PixelBox
from sdrpn.io.atomic import read_parsed
from sdrpn.io.images import image_key, load_image
from sdrpn_eval.results.comparability import Evidence
from sdrpn_eval.results.scores import Document
from sdrpn_eval.schemas import BOXES, HUB_ID


@dataclass
class StoredData:
    """The rows of a task's dataset, for tasks that show a column of images unchanged.

    Attributes:
        rows: A dataset of that column alone, undecoded.
        boxes: The column `box`; None without one.
    """

    rows: Any
    column: str
    boxes: Sequence[Sequence[float] | None] | None
    _keys: dict[bytes, str] = field(default_factory=dict)
    _last: tuple[bytes, Image.Image] | None = None

    def image(self, doc_id: int) -> Image.Image:
        """The image of a document."""
        return self._decoded(*self._file(doc_id))

    def key(self, doc_id: int) -> str:
        """Content hash of that image, see `sdrpn.io.images.image_key`."""
        digest, source = self._file(doc_id)
        if digest not in self._keys:  # documents share images
            self._keys[digest] = image_key(self._decoded(digest, source))
        return self._keys[digest]

    def _file(self, doc_id: int) -> tuple[bytes, bytes | Path]:
        """A digest of the stored file, and its content or path."""
        file = self.rows[doc_id][self.column]
        content = file["bytes"] or file["path"].encode()
        return hashlib.blake2b(content).digest(), file["bytes"] or Path(file["path"])

    def _decoded(self, digest: bytes, source: bytes | Path) -> Image.Image:
        if self._last is None or self._last[0] != digest:
            self._last = digest, load_image(source)
        return self._last[1]

    def prompt(self, doc_id: int) -> None:
        """None: only the task could tell how it words a question."""

    def box(self, doc_id: int) -> PixelBox | None:
        """The document's own `box` in pixels of its image, half-open; None without one."""
        return _as_box(self.boxes[doc_id] if self.boxes else None)


@dataclass(frozen=True)
class TaskData:
    """The documents of a task, through lmms-eval's own task object."""

    task: Any

    def image(self, doc_id: int) -> Image.Image | None:
        """The first image of a document; None without one."""
        visuals = self.task.doc_to_visual(self.task.eval_docs[doc_id]) or []
        return next((v for v in visuals if isinstance(v, Image.Image)), None)

    def key(self, doc_id: int) -> str | None:
        """Content hash of that image."""
        image = self.image(doc_id)
        return image_key(image) if image else None

    def prompt(self, doc_id: int) -> str:
        """The question as the task words it."""
        return str(self.task.doc_to_text(self.task.eval_docs_no_media[doc_id]))

    def box(self, doc_id: int) -> PixelBox | None:
        """The document's own `box` in pixels of the image, half-open; None without one."""
        return _as_box(self.task.eval_docs_no_media[doc_id].get("box"))

    @property
    def has_boxes(self) -> bool:
        """Whether its first document has a `box`."""
        return len(self.task.eval_docs_no_media) > 0 and self.box(0) is not None


Documents = StoredData | TaskData
"""The documents of a task that this machine holds."""


def _as_box(box: Sequence[float] | None) -> PixelBox | None:
    return PixelBox(*(int(v) for v in box)) if box else None


def task_manager(include_path: Any = None, include_defaults: bool = True) -> Any:
    """lmms-eval's index of tasks: ours, those under include_path, and by default its own."""
    from lmms_eval.tasks import TaskManager

    from sdrpn_eval.plugin import add_tasks

    add_tasks()
    with quiet():
        return TaskManager("ERROR", include_path, include_defaults)


@contextmanager
def quiet() -> Iterator[None]:
    """Disables what lmms-eval and SDRPN_DATA log about a run: these commands do not run one.

    Their index may be a small one, which does not know the tasks of all folders in SDRPN_DATA.
    """
    modules = ("lmms_eval", "sdrpn_eval.local_data")
    try:
        for module in modules:
            logger.disable(module)
        yield
    finally:
        for module in modules:
            logger.enable(module)


def documents_of(
    every: Sequence[Evidence], tasks: Sequence[str]
) -> tuple[dict[str, Documents], list[str]]:
    """Loads the documents that runs were asked, without lmms-eval if possible: its import is slow.

    Returns:
        Documents by task, and a sentence for each task whose data is not on this machine.
    """
    stored = {task: stored_data(every, task) for task in tasks}
    found: dict[str, Documents] = {task: data for task, data in stored.items() if data}
    rest = [task for task in tasks if task not in found]
    if not rest:
        return found, []
    loaded, notes = load_data(rest, every[0].run.cli.get("include_path"))
    return found | loaded, notes


def stored_data(every: Sequence[Evidence], task: str) -> StoredData | None:
    """Reads a task's rows without lmms-eval, from where the first run's results say.

    None if they do not hold the images that were shown, by the content hash of the first document's
    image in the record.
    """
    run = every[0].run
    config: Mapping[str, Any] = run.tasks[task].config
    documents = [(task, doc_id) for doc_id in run.tasks[task].samples]
    looks = next((e.record.looks for e in every if e.record.looks.keys() >= set(documents)), {})
    first = looks.get(min(documents))
    # With `process_docs`, document ids are not row numbers.
    if first is None or not first.images or config.get("process_docs"):
        return None
    try:
        columns = _read_rows(config)
        return next((c for c in columns if c.key(min(documents)[1]) == first.images[0]), None)
    except Exception:  # of any kind: lmms-eval tries next and reports the error
        return None


def _read_rows(config: Mapping[str, Any]) -> list[StoredData]:
    """Reads a task's split, once per column of images.

    Only local Parquet files and datasets on the Hub are opened: results files come from outside,
    and some formats of datasets unpickle their content.
    """
    path, kwargs = str(config.get("dataset_path")), config.get("dataset_kwargs") or {}
    files = kwargs.get("data_files")
    names = files.values() if isinstance(files, Mapping) else [files]
    every = [name for one in names for name in (one if isinstance(one, list) else [one])]
    local = path == "parquet" and all(Path(str(name)).is_file() for name in every)
    if not local and (not HUB_ID.fullmatch(path) or Path(path).exists() or files):
        return []
    # Imported here: slow, and only needed to show images.
    import datasets

    datasets.disable_progress_bars()
    given: dict[str, Any] = {"data_files": files} if local else {"revision": kwargs.get("revision")}
    split = config.get("test_split")
    rows: Any = datasets.load_dataset(path, config.get("dataset_name"), split=split, **given)
    boxes = rows["box"][:] if "box" in rows.column_names else None
    undecoded = datasets.Image(decode=False)
    return [
        StoredData(rows.select_columns(name).cast_column(name, undecoded), name, boxes)
        for name, kind in rows.features.items()
        if isinstance(kind, datasets.Image)
    ]


def load_data(
    tasks: Iterable[str], include_path: Any = None, manager: Any = None
) -> tuple[dict[str, TaskData], list[str]]:
    """Loads tasks with lmms-eval, from its index `manager` if there is one already.

    Nothing is downloaded while HF_HUB_OFFLINE=1 is set.

    Returns:
        Documents by task, and a sentence for each task that cannot be loaded.
    """
    from lmms_eval.tasks import get_task_dict

    tasks = list(tasks)
    if manager is None:
        manager = task_manager(include_path, include_defaults=False)
        if not set(tasks) <= set(manager.all_tasks):  # needs lmms-eval's own thousands of files
            manager = task_manager(include_path)
    found: dict[str, TaskData] = {}
    notes = []
    for name in tasks:
        try:
            with quiet():
                found[name] = TaskData(get_task_dict([name], manager)[name])
        except Exception as error:  # of any kind, from the task's own code
            cause = _cause(error)
            notes.append(f"{name}: no pictures, its data cannot be loaded here ({cause})")
    return found, notes


def _cause(error: BaseException) -> str:
    """The cause in one line; lmms-eval wraps it in a retry's error."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    text = str(inner or error).splitlines() or [""]
    return f"{type(inner or error).__name__}: {text[0]}"[:160]


def boxes_of(
    data: Mapping[str, Documents], documents: Sequence[Document], given: Mapping[Document, PixelBox]
) -> dict[Document, PixelBox]:
    """True boxes: the given ones, else the documents' own."""
    own = {(task, i): data[task].box(i) for task, i in documents if task in data}
    return {document: box for document, box in own.items() if box is not None} | dict(given)


def read_boxes(file: Path) -> dict[Document, PixelBox]:
    """Reads true boxes, {task: {document id: [x0, y0, x1, y1]}}, half-open, in pixels.

    Raises:
        ValueError: If the file has another form; names the file.
    """
    try:
        content = read_parsed(BOXES, file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must hold {{task: {{document id: [x0, y0, x1, y1]}}}} in pixels: {error}"
        ) from None
    return {
        (task, doc_id): PixelBox(*(int(v) for v in box))
        for task, boxes in content.items()
        for doc_id, box in boxes.items()
    }
