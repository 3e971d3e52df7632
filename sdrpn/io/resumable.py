"""The runner of long jobs: bulk answering, labelling and the lmms-eval model go through it.

`BatchRunner` prepares the next batch in a thread, halves batches that do not fit the memory, and
isolates items that fail. What makes a job resumable stands beside it: a guard of the settings that
a folder belongs to, and a file of JSON lines that survives a killed process.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from sdrpn.io.atomic import read_object, write_json
from sdrpn.io.plurals import agree, counted

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Result = TypeVar("Result")

ANEW = "; delete it and start anew"
"""Remedy for a settings file of ours that is broken."""


class DoesNotFit(ValueError):
    """An item that does not fit the memory even in a batch of its own."""


@dataclass
class BatchRunner(Generic[Item, Ready, Result]):
    """Runs batches so that neither memory nor one bad item ends the job.

    A batch that does not fit the memory is halved, and so are all batches after it. If a batch
    fails for another reason, each of its items runs alone, and `recover` decides about those that
    fail alone.

    Args:
        prepare: Makes one item ready, in a thread, while the previous batch runs.
        run: The results of a batch, one for each item.
        recover: The result of an item that failed, given what `prepare` made of it (None if that
            is what failed) and the error. Raises to end the job.
        describe: An item in words, for errors.
        batch_size: Largest batch; shrinks when the memory does not suffice.
        remedy: What to change if a single item does not fit the memory.
        workers: Threads that prepare the items of a batch.
        strict: Whether a batch that fails, though each of its items alone does not, ends the job.
        succeeded: Whether any item has run without `recover`, by an earlier process too.
        warn: Called with a sentence about batches that were halved or split.
    """

    prepare: Callable[[Item], Ready]
    run: Callable[[Sequence[Item], Sequence[Ready]], Sequence[Result]]
    recover: Callable[[Item, Ready | None, Exception], Result]
    describe: Callable[[Item], str]
    batch_size: int
    remedy: str
    workers: int = 1
    strict: bool = False
    succeeded: bool = False
    warn: Callable[[str], None] = logger.warning
    _refused_size: int = 0

    def __call__(
        self, batches: Iterable[Sequence[Item]], **progress: Any
    ) -> Generator[list[tuple[Item, Result]], None, None]:
        """Run batches and yield results in pieces, each to be saved before the next one runs.

        Within a batch, items that fail come last.

        Args:
            batches: Items that may run together.
            **progress: Arguments of `tqdm`, which counts items.

        Raises:
            DoesNotFit: If one item does not fit the memory.
        """
        with (
            ThreadPoolExecutor(self.workers, thread_name_prefix="prepare") as pool,
            closing(prefetch(batches, lambda b: list(pool.map(self._prepared, b)))) as coming,
            tqdm(**progress) as bar,
        ):
            for batch, ready in coming:
                for done in self._run_batch(batch, ready):
                    yield done
                    bar.update(len(done))

    def attempt(
        self,
        run: Callable[[Sequence[Item], Sequence[Ready]], Sequence[Result]],
        part: Sequence[tuple[Item, Ready]],
    ) -> list[tuple[Item, Result]] | Exception | None:
        """Run a batch once; returns its error if it fails, None if it is to be tried in halves.

        Raises errors after which nothing runs any more on the device, and DoesNotFit.
        """
        items, ready = zip(*part, strict=True)
        try:
            results = run(items, ready)
        except Exception as error:
            if _is_device_lost(error):
                raise
            if not is_out_of_memory(error):
                return error
            if len(part) == 1:
                raise DoesNotFit(
                    f"{self.describe(items[0])} does not fit the memory even alone; "
                    f"{self.remedy} ({first_line(error)})"
                ) from error
        else:
            self._report_halving()
            return list(zip(items, results, strict=True))
        # Out of the except block, so that the tensors in the error's frames are gone.
        clear_device_cache(garbage_collection=True)
        self._refused_size = self._refused_size or len(part)
        self.batch_size = (len(part) + 1) // 2
        return None

    def _prepared(self, item: Item) -> tuple[Ready | None, Exception | None]:
        try:
            return self.prepare(item), None
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None, error

    def _run_batch(
        self, batch: Sequence[Item], ready: Sequence[tuple[Ready | None, Exception | None]]
    ) -> Iterator[list[tuple[Item, Result]]]:
        waiting: Any = [
            (i, made) for i, (made, error) in zip(batch, ready, strict=True) if not error
        ]
        while waiting:
            part = waiting[: self.batch_size]
            done = self.attempt(self.run, part)
            if done is None:
                continue
            waiting = waiting[len(part) :]
            if isinstance(done, Exception):
                yield from self._run_each(part, done)
            else:
                self.succeeded = True
                yield done
        for item, (_, error) in zip(batch, ready, strict=True):
            if error is not None:
                yield [(item, self.recover(item, None, error))]

    def _run_each(
        self, part: Sequence[tuple[Item, Ready]], error: Exception
    ) -> Iterator[list[tuple[Item, Result]]]:
        """Run the items of a batch that failed one by one; those that fail again come last."""
        failed: list[tuple[Item, Ready, Exception]] = []
        for item, ready in part:
            done = error if len(part) == 1 else self.attempt(self.run, [(item, ready)])
            if isinstance(done, Exception):
                failed.append((item, ready, done))
            elif done is not None:
                self.succeeded = True
                yield done
        for item, ready, own in failed:
            yield [(item, self.recover(item, ready, own))]
        if not failed:
            if self.strict:
                raise error
            self.warn(
                f"a batch of {counted(len(part), 'question')} failed ({first_line(error)}), and "
                "each of them alone did not"
            )

    def _report_halving(self) -> None:
        if self._refused_size:
            self.warn(
                f"{counted(self._refused_size, 'question')} at a time "
                f"{agree(self._refused_size, 'does', 'do')} not fit the memory: going on with "
                f"{self.batch_size}"
            )
        self._refused_size = 0


def prefetch(
    items: Iterable[Item], make: Callable[[Item], Result]
) -> Generator[tuple[Item, Result], None, None]:
    """Yield each item with what `make` makes of it, one item ahead, in a thread.

    An error of `make` is raised where its item would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        coming: tuple[Item, Future[Result]] | None = None
        for item in items:
            following = item, pool.submit(make, item)
            if coming is not None:
                yield coming[0], coming[1].result()
            coming = following
        if coming is not None:
            yield coming[0], coming[1].result()


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory did not suffice, the device's or the machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    return "could not create a primitive" in str(error)  # oneDNN, on a full CPU


def _is_device_lost(error: Exception) -> bool:
    return "CUDA error" in str(error) and not is_out_of_memory(error)


def first_line(error: Exception) -> str:
    """The first line of an error's message, without addresses; its type if there is none."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(error))
    return next(iter(text.splitlines()), type(error).__name__)


# What makes a job resumable


def guard_settings(path: Path, settings: Mapping[str, Any], what: Path | None = None) -> None:
    """Write the settings of a job, or compare them with those of the job that is resumed.

    Args:
        path: A JSON file; written if it does not exist.
        settings: What JSON holds.
        what: The file or folder that the settings belong to; the folder of `path` by default.

    Raises:
        ValueError: If an earlier job had other settings; names every one that differs.
    """
    wanted = json.loads(json.dumps(dict(settings)))  # as it reads back: tuples are lists
    if not path.exists():
        write_json(path, wanted)
        return
    earlier = read_object(path, ANEW)
    other = [k for k in {**wanted, **earlier} if earlier.get(k) != wanted.get(k)]
    if other:
        told = "; ".join(f"{k}: {earlier.get(k)} there, {wanted.get(k)} now" for k in other)
        raise ValueError(
            f"{what or path.parent} was begun with other settings ({told}); use another --out"
        )


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file; a line that a killed process left incomplete is ended first.

    Raises:
        OSError: Naming the file, if the disk is full, say.
    """
    try:
        with path.open("ab+") as file:
            if _ends_incomplete(file):
                file.write(b"\n")
            file.write("".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error}; make room and start the same command again, "
            "which asks nothing twice that stands there"
        ) from error


def drop_incomplete_line(path: Path) -> list[bytes]:
    """Cut off a last line that a killed process left incomplete; returns the others."""
    with path.open("rb+") as file:
        content = file.read()
        complete = content.rfind(b"\n") + 1
        file.truncate(complete)
    return content[:complete].splitlines()


def _ends_incomplete(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
