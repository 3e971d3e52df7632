"""A process that is killed at any one of its writes, and a disk that fills up at any one of them.

`run` runs a job in a process of its own, in which every write below a folder is counted: files
made, written, moved, removed, by Python or by the libraries that write on their own. At the chosen
one a signal comes: before it, or half-way through what it writes, as a real SIGKILL would leave it.
Or the write fails, as on a full disk.
"""

from __future__ import annotations

import builtins
import errno
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pyarrow.parquet
import safetensors.torch
import torch
from safetensors import SafetensorError

FULL = "No space left on device"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MOVES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Writes:
    """Counts writes below a folder; at number `at` (from 1) it sends a signal or fails.

    at: 0 only counts. full: fail with "No space left on device" from then on, instead of a signal;
    then moves are not counted, which need no room.
    """

    def __init__(
        self, folder: Path, at: int = 0, *, full: bool = False, sent: int = signal.SIGKILL
    ) -> None:
        self.folder, self.at, self.full, self.sent = str(folder), at, full, sent
        self.said: list[str] = []

    def watch(self) -> None:
        """From now on, in this process, for good: audit hooks cannot be taken off."""
        sys.addaudithook(self._audit)
        builtins.open = io.open = self._opening(builtins.open)
        # What writes on its own, to the path that is its second argument, and what it says then.
        for module, name, error in (
            (safetensors.torch, "serialize_file", SafetensorError(f"I/O error: {FULL}")),
            (torch, "save", RuntimeError("inline_container.cc: unexpected pos 576 vs 534")),
            (pyarrow.parquet, "write_table", OSError(f"Error writing bytes to file: {FULL}")),
        ):
            setattr(module, name, self._native(getattr(module, name), error))

    def _below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)

    def _hit(
        self,
        what: str,
        half: Callable[[], Any] = lambda: None,
        error: Exception | None = None,
    ) -> None:
        self.said.append(what)
        if self.at and (len(self.said) == self.at or (self.full and len(self.said) > self.at)):
            if self.sent == signal.SIGKILL:  # after another one, writing goes on
                half()
            if self.full:
                raise error or OSError(errno.ENOSPC, FULL)
            os.kill(os.getpid(), self.sent)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._below(arguments[0]):
            mode, flags = arguments[1], arguments[2]
            if (mode and set(mode) & set("wax+")) or (flags or 0) & WRITING:
                self._hit(f"open {arguments[0]}")
        elif event in MOVES and not self.full:
            path, descriptor = arguments[0], arguments[1]
            if event in ("os.remove", "os.rmdir") and descriptor >= 0:  # as shutil.rmtree does
                path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
            if self._below(path):
                self._hit(f"{event} {path}")

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            file = real(path, mode, *rest, **more)
            if self._below(path) and set(mode) & set("wax+"):
                write = file.write

                def half(data: Any) -> int:
                    def part() -> None:
                        write(data[: len(data) // 2])
                        file.flush()

                    self._hit(f"write {path}", part)
                    return write(data)

                file.write = half
            return file

        return opened

    def _native(self, real: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def written(content: Any, path: Any, *arguments: Any, **more: Any) -> Any:
            def half() -> None:
                real(content, path, *arguments, **more)
                os.truncate(path, os.path.getsize(path) // 2)

            if self._below(path):
                self._hit(f"{real.__name__} {path}", half, error)
            return real(content, path, *arguments, **more)

        return written


CONTEXT = multiprocessing.get_context("forkserver")


def _start_server(module: str) -> None:
    """A clean process with all imports of the jobs' module done, whose copies start at once.

    One that has trained cannot be forked: torch's threads do not come along.
    """
    CONTEXT.set_forkserver_preload([module])  # a name that it cannot import, it passes over
    before = os.environ.get("PYTHONPATH")
    # Up to Python 3.12 the server is not told where its imports are.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run(job: Callable[..., Any], *arguments: Any, writes: Writes | None = None) -> tuple[int, Any]:
    """Run a job of fault_jobs.py in a child: (its exit code, what it returned or raised).

    The exit code is -9 of one that was killed, 1 of one that raised. writes: gets `said`, what
    was written, of a child that was not killed.
    """
    _start_server(job.__module__)
    reading, writing = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_child, args=(writing, writes, job, arguments))
    child.start()
    writing.close()
    try:
        result, said = reading.recv()
    except EOFError:
        result, said = None, []
    child.join(60)
    if writes is not None:
        writes.said = said
    assert child.exitcode is not None, "the child does not end"
    return child.exitcode, result


def _child(pipe: Any, writes: Writes | None, job: Callable[..., Any], arguments: Any) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    # A fork's thread pool is made anew at its first use, which several threads must not race for.
    torch.set_num_threads(1)
    failed, result = True, None
    if writes is not None:
        writes.watch()
    try:
        result = job(*arguments)
        failed = False
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    pipe.send((result, writes.said if writes else []))
    sys.exit(failed)
